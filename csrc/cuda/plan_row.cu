// Row selection: each query block takes the key blocks with the highest scores.
//
// A block of threads makes the scores of kRows query blocks, which stay on chip, then each warp
// selects within whole rows. Only the lists are written: no (N / block)^2 array.
#include <algorithm>

#include "plan_scores.cuh"

namespace mra::cuda {
namespace {

// One row of keys, 32 a step: lane l has the key of block 32 t + l at step t. Held in kSteps
// registers, or read from memory again each time (kSteps = 0).
template <int kSteps>
struct Row {
  uint32_t* keys;
  int steps;
  uint32_t held[kSteps > 0 ? kSteps : 1];

  __device__ Row(uint32_t* keys, int steps) : keys(keys), steps(steps) {
    if constexpr (kSteps > 0) {
#pragma unroll
      for (int t = 0; t < kSteps; ++t) {
        held[t] = t < steps ? keys[t * 32 + threadIdx.x % 32] : kAbsent;
      }
    }
  }

  // f(step, key) in order.
  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
    if constexpr (kSteps > 0) {
#pragma unroll
      for (int t = 0; t < kSteps; ++t) f(t, held[t]);
    } else {
#pragma unroll 8
      for (int t = 0; t < steps; ++t) f(t, keys[t * 32 + threadIdx.x % 32]);
    }
  }

  // key = f(step, key) in order.
  template <typename F>
  __device__ __forceinline__ void map(const F& f) {
    if constexpr (kSteps > 0) {
#pragma unroll
      for (int t = 0; t < kSteps; ++t) held[t] = f(t, held[t]);
    } else {
      for (int t = 0; t < steps; ++t) {
        uint32_t& key = keys[t * 32 + threadIdx.x % 32];
        key = f(t, key);
      }
    }
  }
};

// The list of query block x by one warp: writes index[0 .. returned).
template <int kSteps>
__device__ int select_row(const PlanParams& p, int x, Row<kSteps> row, int32_t* index) {
  const int lane = threadIdx.x % 32;
  int pairs[kTiers] = {0, 0, 0, 0, 0};
  if (has_tiers(p)) {
    row.each([&](int t, uint32_t key) {
      if (key == kAbsent) return;
      const int tier = tier_of<false>(p, x, t * 32 + lane);
#pragma unroll
      for (int i = 0; i < kTiers; ++i) pairs[i] += tier == i;
    });
#pragma unroll
    for (int i = 1; i < kTiers; ++i) pairs[i] = __reduce_add_sync(kFullWarp, pairs[i]);
  } else {
    row.each([&](int, uint32_t key) { pairs[0] += key != kAbsent; });
  }
  pairs[0] = __reduce_add_sync(kFullWarp, pairs[0]);

  const Boundary edge = find_boundary(pairs, row_budget(p, x));
  if (edge.take == 0) return 0;
  if (has_tiers(p)) {
    row.map([&](int t, uint32_t key) {
      if (key == kAbsent) return key;
      return key_in_tier(key, tier_of<false>(p, x, t * 32 + lane), edge.tier);
    });
  }

  uint32_t lo = kForced, hi = kAbsent;
  row.each([&](int, uint32_t key) {
    if (key == kAbsent || key == kForced) return;
    lo = min(lo, key);
    hi = max(hi, key);
  });
  Search search;
  search.lo = __reduce_min_sync(kFullWarp, lo);
  search.hi = __reduce_max_sync(kFullWarp, hi);
  search.at_least = edge.forced + edge.within;
  search.above = edge.forced;
  search.m = edge.take;
  while (!search.done()) {
    const uint32_t pivot = search.pivot();
    int count = 0;
    row.each([&](int, uint32_t key) { count += key >= pivot; });
    search.report(pivot, __reduce_add_sync(kFullWarp, count));
  }

  Cut cut = search.cut();
  int at = 0;
  row.each([&](int t, uint32_t key) {
    const unsigned taken = take_lanes(key, cut.key, cut.ties);
    const int mine = at + __popc(taken & ((1u << lane) - 1));
    if ((taken >> lane & 1) != 0 && mine < p.row_capacity) index[mine] = t * 32 + lane;
    at += __popc(taken);
  });
  return min(at, p.row_capacity);
}

template <int kRows, int kTileCols, bool kWorkspace>
__global__ void __launch_bounds__(kScoreThreads, (kScoreBlocks<kRows, kTileCols>))
    plan_row_kernel(const PlanParams p, int pitch, int tiles, uint32_t* workspace) {
  extern __shared__ __align__(16) float smem[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t* keys = reinterpret_cast<uint32_t*>(smem + score_floats(kRows, p.D, kTileCols));
  if constexpr (kWorkspace) keys = workspace + int64_t{blockIdx.x} * kRows * pitch;

  const int row_tiles = (p.nq + kRows - 1) / kRows;
  for (int64_t next = blockIdx.x; next < tiles; next += gridDim.x) {
    const int tile = static_cast<int>(next);
    const int head = tile / row_tiles;
    // Later query blocks see more under causality: they go first.
    const int x0 = (row_tiles - 1 - tile % row_tiles) * kRows;
    const int written =
        score_rows<kRows, kTileCols>(p, head / p.H, head % p.H, x0, smem, keys, pitch, pitch);
    __syncthreads();

    for (int r = warp; r < kRows && x0 + r < p.nq; r += kScoreWarps) {
      const int x = x0 + r;
      const int64_t start = int64_t{x} * p.row_capacity;
      const int64_t list = int64_t{head} * p.nq + x;
      int32_t* index = p.index + int64_t{head} * p.nq * p.row_capacity + start;
      uint32_t* row = keys + int64_t{r} * pitch;
      const int steps = written / 32;
      int count;
      if (steps <= 8) {
        count = select_row<8>(p, x, {row, steps}, index);
      } else if (steps <= 16) {
        count = select_row<16>(p, x, {row, steps}, index);
      } else if (steps <= 32) {
        count = select_row<32>(p, x, {row, steps}, index);
      } else {
        count = select_row<0>(p, x, {row, steps}, index);
      }
      if (lane == 0) {
        p.start[list] = static_cast<int32_t>(start);
        p.count[list] = count;
      }
    }
    // No barrier: the next tile's first copies go to the queries and the ring, which the selection
    // does not read, and its keys are written only after the barrier of its first stage.
  }
}

template <int kRows, int kTileCols, bool kWorkspace>
cudaError_t launch_row(const PlanParams& p, const PlanRowConfig& config, void* workspace,
                       cudaStream_t stream) {
  const auto kernel = plan_row_kernel<kRows, kTileCols, kWorkspace>;
  const int words = score_floats(kRows, p.D, kTileCols) + (kWorkspace ? 0 : kRows * config.pitch);
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, words * static_cast<int>(sizeof(float)));
  if (error != cudaSuccess) return error;
  const int tiles = p.B * p.H * ((p.nq + kRows - 1) / kRows);
  kernel<<<config.ctas, kScoreThreads, words * sizeof(float), stream>>>(
      p, config.pitch, tiles, static_cast<uint32_t*>(workspace));
  return cudaGetLastError();
}

}  // namespace

// The most rows that fit on chip and still give every multiprocessor a block of threads: more rows
// mean fewer reads of the pooled keys. Longer rows than fit go to a workspace, which is bounded by
// the number of multiprocessors.
PlanRowConfig plan_row_config(const PlanParams& p, const Device& device) {
  PlanRowConfig config{};
  config.pitch = (p.nk + 31) / 32 * 32;
  const auto tiles = [&](int rows) { return p.B * p.H * ((p.nq + rows - 1) / rows); };
  for (int rows = 32; rows >= 8; rows /= 2) {
    const int64_t words = score_floats(rows, p.D, tile_cols(p.nk)) + int64_t{rows} * config.pitch;
    if (words * 4 > device.max_smem) continue;
    config.rows = rows;
    config.ctas = tiles(rows);
    if (rows / 2 < p.nq && int64_t{config.ctas} * 10 >= int64_t{device.sms} * 9) return config;
  }
  if (config.rows > 0) return config;
  config.in_workspace = true;
  config.rows = p.nk > 16384 ? 16 : 32;
  config.ctas = std::min(tiles(config.rows), device.sms);
  return config;
}

cudaError_t plan_row(const PlanParams& params, const PlanRowConfig& config, void* workspace,
                     cudaStream_t stream) {
  if (config.in_workspace) {
    return config.rows == 16 ? launch_row<16, 256, true>(params, config, workspace, stream)
                             : launch_row<32, 256, true>(params, config, workspace, stream);
  }
  const bool narrow = tile_cols(params.nk) == 128;
  switch (config.rows) {
    case 8:
      return narrow ? launch_row<8, 128, false>(params, config, workspace, stream)
                    : launch_row<8, 256, false>(params, config, workspace, stream);
    case 16:
      return narrow ? launch_row<16, 128, false>(params, config, workspace, stream)
                    : launch_row<16, 256, false>(params, config, workspace, stream);
    default:
      return narrow ? launch_row<32, 128, false>(params, config, workspace, stream)
                    : launch_row<32, 256, false>(params, config, workspace, stream);
  }
}

}  // namespace mra::cuda
