// Row selection: each query block takes the key blocks with the highest scores.
//
// A block of threads makes the scores of some query blocks, which stay on chip, then each warp
// selects within whole rows. Only the lists are written: no (N / block)^2 array. What a row leaves
// is still there afterwards: the block-coarse state is made from it.
#include <algorithm>
#include <type_traits>

#include "plan_coarse.cuh"
#include "plan_row.cuh"
#include "plan_scores.cuh"

namespace mra::cuda {
namespace {

// The list of query block x, which may take `budget` blocks, by one warp: writes index[0 ..
// row_capacity), zeros behind the list, and returns how many are taken. With kCoarse, row.held then
// holds the keys of those that are left to the coarse part, kAbsent elsewhere.
template <bool kCoarse, int kSteps>
__device__ __forceinline__ int select_row(const PlanParams& p, int x, int budget, Row<kSteps>& row,
                                          int32_t* index, uint32_t* candidates) {
  const int lane = threadIdx.x % 32;
  Boundary edge;
  if (has_tiers(p)) {
    int pairs[kTiers] = {0, 0, 0, 0, 0};
    row.each([&](int t, uint32_t key) {
      if (key == kAbsent) return;
      const int tier = tier_of<false>(p, x, t * 32 + lane);
#pragma unroll
      for (int i = 0; i < kTiers; ++i) pairs[i] += tier == i;
    });
#pragma unroll
    for (int i = 0; i < kTiers; ++i) pairs[i] = __reduce_add_sync(kFullWarp, pairs[i]);
    edge = find_boundary(pairs, budget);
  } else {
    int pairs = 0;
    row.each([&](int, uint32_t key) { pairs += key != kAbsent; });
    pairs = __reduce_add_sync(kFullWarp, pairs);
    edge = whole_boundary(pairs, budget);
  }

  Cut cut{kForced, INT_MAX};  // nothing
  [[maybe_unused]] bool lowered = false;
  if (edge.take > 0) {
    if (has_tiers(p)) {
      row.map([&](int t, uint32_t key) {
        if (key == kAbsent) return key;
        return key_in_tier(key, tier_of<false>(p, x, t * 32 + lane), edge.tier);
      });
    }
    cut = find_row_cut(row, edge, candidates);
    lowered = cut.ties != INT_MAX;
    if (lowered) lower_ties(row, cut);
  }

  int at = 0;
  if constexpr (kSteps > 0) {
    // Lane t gets which blocks step t takes, and writes them.
    unsigned mine = 0;
    row.each([&](int t, uint32_t key) {
      const unsigned taken = __ballot_sync(kFullWarp, key >= cut.key);
      if (lane == t) mine = taken;
    });
    const int end = sum_up_to_lane<kSteps>(__popc(mine), lane);
    at = __shfl_sync(kFullWarp, end, kSteps - 1);
    for (int to = end - __popc(mine); mine != 0 && to < p.row_capacity; ++to, mine &= mine - 1) {
      index[to] = lane * 32 + __ffs(static_cast<int>(mine)) - 1;
    }
  } else {
    row.each([&](int t, uint32_t key) {
      const unsigned taken = __ballot_sync(kFullWarp, key >= cut.key);
      append(taken, t * 32 + lane, index, at, p.row_capacity);
      at += __popc(taken);
    });
  }
  if constexpr (kCoarse) {
    if (lowered || has_tiers(p)) {
      const int past = past_blocks(p, x);
      row.map([&](int t, uint32_t key) {
        const int y = t * 32 + lane;
        return key < cut.key && t < row.steps && y < past ? row.keys[y] : kAbsent;
      });
    } else {
      row.map([&](int, uint32_t key) { return key < cut.key ? key : kAbsent; });
    }
  }
  at = min(at, p.row_capacity);
  for (int i = at + lane; i < p.row_capacity; i += 32) index[i] = 0;
  return at;
}

// Keys of scores that are left -> weights in their place, c_y exp(score - top), by one warp. Writes
// the row's lse and returns 1 / sum of weights, 0 where there is none.
template <int kSteps>
__device__ __forceinline__ float weigh_left(const Row<kSteps>& row, const float* counts, bool tf32,
                                            float* lse) {
  const int lane = threadIdx.x % 32;
  uint32_t highest = kAbsent;
  row.each([&](int, uint32_t key) { highest = max(highest, key); });
  const float top = top_score(__reduce_max_sync(kFullWarp, highest));
  float* const weights = reinterpret_cast<float*>(row.keys);
  float sum = 0.f;
  row.each([&](int t, uint32_t key) {
    // Not by a branch: there is room for counts of all steps, whatever is in it.
    const float weight = weight_of(score_of(key), top, counts[t * 32 + lane]);
    const float left = key == kAbsent ? 0.f : weight;
    if (t < row.steps) weights[t * 32 + lane] = weight_operand(left, tf32);
    sum += left;
  });
  return finish_weights(sum, top, lse);
}

// Blocks of threads a multiprocessor that the registers leave room for.
template <class Tile, int kSteps>
inline constexpr int kRowBlocks = Tile::kThreads == 128                            ? 6
                                  : kSteps > 0 && kSteps < 32 && Tile::kRows == 16 ? 2
                                                                                   : 1;

// Words of the counts of a row's key blocks, of which `steps` steps read all.
__host__ __device__ constexpr int count_words(int steps, int pitch) {
  return pitch > 32 * steps ? pitch : 32 * steps;
}

template <class Tile, int kSteps, bool kWorkspace, bool kCoarse>
__global__ void __launch_bounds__(Tile::kThreads, (kRowBlocks<Tile, kSteps>))
    plan_row_kernel(const PlanParams p, int pitch, int tiles, uint32_t* workspace) {
  constexpr int kRows = Tile::kRows, kWarps = Tile::kWarps;
  extern __shared__ __align__(16) float ring[];
  __shared__ __align__(16) uint32_t candidates[kWarps][kRanked];
  __shared__ float inverse[kRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const counts = ring + Tile::kRingWords;  // of key blocks, with kCoarse
  uint32_t* keys = reinterpret_cast<uint32_t*>(counts + (kCoarse ? count_words(kSteps, pitch) : 0));
  if constexpr (kWorkspace) keys = workspace + int64_t{blockIdx.x} * kRows * pitch;

  clear_queues(p.queues);

  const int row_tiles = (p.nq + kRows - 1) / kRows;
  for (int64_t next = blockIdx.x; next < tiles; next += gridDim.x) {
    const int tile = static_cast<int>(next);
    const int head = tile / row_tiles, b = head / p.H, h = head % p.H;
    // Later query blocks see more under causality: they go first.
    const int x0 = (row_tiles - 1 - tile % row_tiles) * kRows, rows = min(kRows, p.nq - x0);
    if constexpr (kCoarse) {
      for (int y = threadIdx.x; y < p.nk; y += Tile::kThreads) {
        counts[y] = static_cast<float>(p.k_count[int64_t{b} * p.nk + y]);
      }
    }
    const int written = Tile::write(p, b, h, x0, ring, keys, pitch, pitch);
    __syncthreads();

#pragma unroll 1
    for (int r = warp; r < rows; r += kWarps) {
      const int x = x0 + r;
      const int64_t start = int64_t{x} * p.row_capacity;
      const int64_t list = int64_t{head} * p.nq + x;
      int32_t* index = p.index + int64_t{head} * p.nq * p.row_capacity + start;
      Row<kSteps> row(keys + int64_t{r} * pitch, written / 32);
      const int budget = budget_of(p, h, x);
      const int count = select_row<kCoarse>(p, x, budget, row, index, candidates[warp]);
      if (lane == 0) {
        p.start[list] = static_cast<int32_t>(start);
        p.count[list] = count;
      }
      if constexpr (kCoarse) {
        const float sum = weigh_left(row, counts, p.tf32, p.lse + list);
        if (lane == 0) inverse[r] = sum;
      }
    }
    if constexpr (kCoarse) {
      __syncthreads();
      constexpr int kBatch = kSteps >= 32 ? 16 : kSteps > 1 ? 8 : 4;
      mean_of_values<kRows / 8, kBatch>(p, b, h, x0, reinterpret_cast<const float*>(keys), pitch,
                                        inverse, rows, past_blocks(p, x0 + rows - 1), ring);
    }
    // No barrier: a next tile is there with a workspace only, and its keys are written after the
    // barrier of its first stage. Its copies go to the ring, which the selection does not read.
  }
  if (p.beside && blockIdx.x == 0) wait_for_previous();
}

template <class Tile, int kSteps, bool kWorkspace = false>
cudaError_t launch_row(const PlanParams& p, const PlanRowConfig& config, void* workspace,
                       cudaStream_t stream) {
  static_assert(kSteps == 0 || Tile::kRingWords >= 128 * Tile::kWarps * Tile::kRows / 8,
                "parts of means");
  const int of_rows = Tile::kRows * config.pitch + count_words(kSteps, config.pitch);
  const int words = Tile::kRingWords + (kWorkspace ? 0 : of_rows);
  const int tiles = p.B * p.H * ((p.nq + Tile::kRows - 1) / Tile::kRows);
  const auto launch = [&](auto coarse) {
    return launch_grid(plan_row_kernel<Tile, kSteps, kWorkspace, coarse>, config.ctas,
                       Tile::kThreads, words * sizeof(float), stream, Together{p.beside}, p,
                       config.pitch, tiles, static_cast<uint32_t*>(workspace));
  };
  if constexpr (kSteps > 0) {
    if (p.v_mean != nullptr) return launch(std::true_type{});
  }
  return launch(std::false_type{});
}

using Wide8 = ScoreTile<1, 4, 1, 8, 8>;  // 256 columns
using Wide16 = ScoreTile<1, 4, 1, 8>;
using Wide32 = ScoreTile<2, 2, 1, 16>;
constexpr int kHeldBlocks = 1024;  // longest row that a warp holds in registers

// The kSteps that a row has, 0 where it is not held.
int held_steps(int blocks) {
  if (blocks > kHeldBlocks) return 0;
  int steps = 1;
  while (32 * steps < blocks) steps *= 2;
  return steps;
}

}  // namespace

// 16 rows a block of threads, or 32 where they still give every multiprocessor work: more rows mean
// fewer reads of the pooled keys. Of long rows only 8 fit; longer ones go to a workspace, which is
// bounded by the number of multiprocessors.
PlanRowConfig plan_row_config(const PlanParams& p, const Device& device) {
  PlanRowConfig config{};
  config.stream = p.nk > kHeldBlocks && plan_stream_fits(p, device);
  if (config.stream) return config;
  config.pitch = score_pitch(p.nk);
  config.coarse = p.nk <= kHeldBlocks;
  const auto tiles = [&](int rows) { return p.B * p.H * ((p.nq + rows - 1) / rows); };
  const auto fits = [&](int rows, int ring) {
    const int64_t counts = count_words(held_steps(p.nk), config.pitch);
    return (ring + int64_t{rows} * config.pitch + counts) * 4 + 2048 <= device.max_smem;
  };
  const bool many = p.nk > 128 && int64_t{tiles(32)} * 10 >= int64_t{device.sms} * 18;
  config.rows = many && fits(32, Wide32::kRingWords) ? 32 : 16;
  if (!fits(config.rows, Wide16::kRingWords)) {
    config.in_workspace = !fits(8, Wide8::kRingWords);
    config.rows = config.in_workspace ? 32 : 8;
    config.coarse = false;
  }
  config.ctas = tiles(config.rows);
  if (config.in_workspace) config.ctas = std::min(config.ctas, device.sms);
  return config;
}

cudaError_t plan_row(const PlanParams& p, const PlanRowConfig& config, void* workspace,
                     cudaStream_t stream) {
  const auto run = [&](auto launch) { return launch(p, config, workspace, stream); };
  if (config.stream) return plan_stream(p, stream);
  if (config.in_workspace) return run(launch_row<Wide32, 0, true>);
  if (config.rows == 8) return run(launch_row<Wide8, 0>);
  const bool rows_32 = config.rows == 32;  // of more than 128 key blocks
  switch (held_steps(p.nk)) {
    case 1:
      return run(launch_row<ShortScoreTile, 1>);
    case 2:
      return run(launch_row<ScoreTile<1, 1, 1, 8>, 2>);
    case 4:
      return run(launch_row<ScoreTile<1, 2, 1, 8>, 4>);
    case 8:
      return run(rows_32 ? launch_row<Wide32, 8> : launch_row<Wide16, 8>);
    case 16:
      return run(rows_32 ? launch_row<Wide32, 16> : launch_row<Wide16, 16>);
    case 32:
      return run(rows_32 ? launch_row<Wide32, 32> : launch_row<Wide16, 32>);
    default:
      return run(rows_32 ? launch_row<Wide32, 0> : launch_row<Wide16, 0>);
  }
}

}  // namespace mra::cuda
