// Selection with levels, one resolution a launch, the coarsest first. A block of threads takes
// query blocks of the same parent: they have the same candidates, the children of what the parent
// has chosen. It makes their scores, which stay on chip, then each warp selects within whole rows.
#include <algorithm>

#include "levels.h"
#include "plan_row.cuh"
#include "sm80/levels.cuh"

namespace mra::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kMostRows = 16;
constexpr int kChunk = 64;  // candidates whose means are in shared memory at a time
constexpr int kQuad = 4;    // rows of a lane

__host__ __device__ constexpr int key_pitch(int D) { return D + 4; }

// Forcing conditions that a cell meets; 4 where the diagonal crosses it.
__device__ __forceinline__ int tier_of(const PlanLevel& p, int x, int y) {
  const int64_t q = int64_t{x} * p.plan.block_q, k = int64_t{y} * p.plan.block_k;
  if (p.plan.causal && k + p.plan.block_k > q) return 4;
  int tier = k < p.first;
  if (p.plan.diagonal_reach >= 0) {
    tier += k < q + p.plan.block_q + p.plan.diagonal_reach &&
            k + p.plan.block_k > q - p.plan.diagonal_reach;
  }
  return tier;
}

// The list of query block x by one warp: writes index[0 .. row_capacity), zeros behind the list,
// and returns how many are taken.
__device__ int select_row(const PlanLevel& p, int x, const Candidates& all, Row<0> row,
                          int32_t* index, uint32_t* candidates) {
  const int lane = threadIdx.x % 32;
  const bool tiers = p.plan.causal || p.plan.diagonal_reach >= 0 || p.first > 0;
  const auto tier = [&](int t) { return tiers ? tier_of(p, x, all.at(t * 32 + lane)) : 0; };
  int pairs[kTiers] = {0, 0, 0, 0, 0};
  row.each([&](int t, uint32_t key) {
    if (key == kAbsent) return;
    const int own = tier(t);
#pragma unroll
    for (int i = 0; i < kTiers; ++i) pairs[i] += own == i;
  });
  int forced = 0;
#pragma unroll
  for (int i = 0; i < kTiers; ++i) {
    pairs[i] = __reduce_add_sync(kFullWarp, pairs[i]);
    if (i > 0) forced += pairs[i];
  }
  // Above block_size forced cells are split even beyond the budget.
  int budget = row_budget(p.plan, 0, x);
  if (p.r > 0) budget = max(budget, forced);
  const Boundary edge = find_boundary(pairs, budget);
  Cut cut{kForced, 0};  // nothing
  if (edge.take > 0) {
    if (tiers) {
      row.map([&](int t, uint32_t key) {
        return key == kAbsent ? key : key_in_tier(key, tier(t), edge.tier);
      });
      __syncwarp();
    }
    cut = find_row_cut(row, edge, candidates);
  }
  int at = 0;
  const int room = p.plan.row_capacity;
#pragma unroll 1
  for (int t = 0; t < row.steps && at < edge.take; ++t) {
    const unsigned taken = take_lanes(row.keys[t * 32 + lane], cut.key, cut.ties);
    const bool mine = (taken >> lane & 1) != 0;
    append(taken, mine ? all.at(t * 32 + lane) : 0, index, at, room);
    at += __popc(taken);
  }
  at = min(at, room);
  for (int i = at + lane; i < room; i += 32) index[i] = 0;
  return at;
}

// How a launch is cut: `rows` query blocks for a block of threads.
struct Cutting {
  int rows, pitch;  // pitch: words in a row of scores
  int64_t tiles, ctas;
  bool in_workspace;
};

template <bool kWorkspace>
__global__ void __launch_bounds__(kThreads)
    plan_level_kernel(const __grid_constant__ PlanLevel p, Cutting c, uint32_t* workspace) {
  extern __shared__ __align__(16) float smem[];
  __shared__ __align__(16) uint32_t ranked[kWarps][kRanked];
  __shared__ int found[kChunk];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Levels& l = p.levels;
  const ResolutionBlocks& at = l.at[p.r];
  const int D = p.plan.D, pitch = key_pitch(D), quads = D / 4;
  float* q = smem;                                                   // [kMostRows][D]
  float* k = q + kMostRows * D;                                      // [kChunk][pitch]
  uint32_t* keys = reinterpret_cast<uint32_t*>(k + kChunk * pitch);  // [rows][c.pitch]
  if constexpr (kWorkspace) keys = workspace + int64_t{blockIdx.x} * c.rows * c.pitch;
  clear_queues(p.plan.queues);

  const int row_tiles = (at.nq + c.rows - 1) / c.rows;
  for (int64_t next = blockIdx.x; next < c.tiles; next += gridDim.x) {
    const int head = static_cast<int>(next / row_tiles), b = head / p.plan.H;
    // Later query blocks see more under causality: they go first.
    const int x0 = (row_tiles - 1 - static_cast<int>(next % row_tiles)) * c.rows;
    const int rows = min(c.rows, at.nq - x0), hk = head % p.plan.H / (p.plan.H / p.plan.Hk);
    const float* q_mean = p.plan.q_mean + (int64_t{head} * l.query_blocks + at.first_q + x0) * D;
    const float* k_mean =
        p.plan.k_mean + ((int64_t{b} * p.plan.Hk + hk) * l.key_blocks + at.first_k) * D;
    const int32_t* q_count = p.plan.q_count + int64_t{b} * l.query_blocks + at.first_q + x0;
    const Candidates all = candidates_of(l, b, head, p.r, x0, seen_blocks(l, p.r, x0 + rows - 1));

    __syncthreads();  // the turn before is done with what is written here
    for (int i = threadIdx.x; i < kMostRows * quads; i += kThreads) {
      reinterpret_cast<float4*>(q)[i] = i < rows * quads
                                            ? reinterpret_cast<const float4*>(q_mean)[i]
                                            : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    for (int t0 = 0; t0 < all.positions; t0 += kChunk) {
      if (threadIdx.x < kChunk) {
        const int t = t0 + threadIdx.x;
        found[threadIdx.x] = t < all.positions ? all.at(t) : -1;
      }
      __syncthreads();
      for (int i = threadIdx.x; i < kChunk * quads; i += kThreads) {
        const int y = found[i / quads], d = i % quads * 4;
        *reinterpret_cast<float4*>(k + i / quads * pitch + d) =
            y < 0 ? make_float4(0.f, 0.f, 0.f, 0.f)
                  : *reinterpret_cast<const float4*>(k_mean + int64_t{y} * D + d);
      }
      __syncthreads();
      // Four rows against 32 candidates at a time; each sum in the order of the dimensions.
      for (int job = warp; job < (rows + kQuad - 1) / kQuad * (kChunk / 32); job += kWarps) {
        const int r0 = job / (kChunk / 32) * kQuad, column = job % (kChunk / 32) * 32 + lane;
        const float *query = q + r0 * D, *key = k + column * pitch;
        float sum[kQuad] = {};
#pragma unroll 4
        for (int d = 0; d < D; d += 4) {
          const float4 u = *reinterpret_cast<const float4*>(key + d);
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            const float4 w = *reinterpret_cast<const float4*>(query + i * D + d);
            sum[i] = fmaf(w.x, u.x, sum[i]);
            sum[i] = fmaf(w.y, u.y, sum[i]);
            sum[i] = fmaf(w.z, u.z, sum[i]);
            sum[i] = fmaf(w.w, u.w, sum[i]);
          }
        }
        const int y = found[column];
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          const int r = r0 + i;
          if (r >= rows) break;
          const bool exists = y >= 0 && q_count[r] > 0 && y < seen_blocks(l, p.r, x0 + r);
          keys[int64_t{r} * c.pitch + t0 + column] =
              exists ? key_of(p.plan.scale * sum[i]) : kAbsent;
        }
      }
      __syncthreads();
    }

    for (int r = warp; r < rows; r += kWarps) {
      const int x = x0 + r;
      const int64_t list = int64_t{head} * l.query_blocks + at.first_q + x;
      const int64_t start = p.offset + int64_t{x} * p.plan.row_capacity;
      const Row<0> row(keys + int64_t{r} * c.pitch, (all.positions + 31) / 32);
      const int count = select_row(p, x, all, row,
                                   p.plan.index + int64_t{head} * p.capacity + start, ranked[warp]);
      if (lane == 0) {
        p.plan.start[list] = static_cast<int32_t>(start);
        p.plan.count[list] = count;
      }
    }
  }
}

int64_t shared_bytes(const PlanLevel& p, int64_t words) {
  const int D = p.plan.D;
  return (int64_t{kMostRows} * D + kChunk * key_pitch(D) + words) * 4;
}

Cutting cutting(const PlanLevel& p, const Device& device) {
  const ResolutionBlocks& at = p.levels.at[p.r];
  Cutting c{};
  int64_t positions = at.nk;
  c.rows = kMostRows;
  if (p.r + 1 < p.levels.count) {
    const ResolutionBlocks& up = p.levels.at[p.r + 1];
    // No parent has more entries than its own list has room for.
    positions = std::min<int64_t>(up.nk, p.parent_capacity) << (up.log2_k - at.log2_k);
    c.rows = std::min(c.rows, 1 << (up.log2_q - at.log2_q));
  }
  c.pitch = static_cast<int>((positions + kChunk - 1) / kChunk * kChunk);
  const auto fits = [&] {
    return shared_bytes(p, int64_t{c.rows} * c.pitch) + 2048 <= device.max_smem;
  };
  while (c.rows > 1 && !fits()) c.rows /= 2;
  c.in_workspace = !fits();
  c.tiles = int64_t{p.plan.B} * p.plan.H * ((at.nq + c.rows - 1) / c.rows);
  c.ctas = c.in_workspace ? std::min<int64_t>(c.tiles, 4 * device.sms) : c.tiles;
  return c;
}

}  // namespace

int64_t plan_level_workspace(const PlanLevel& p, const Device& device) {
  const Cutting c = cutting(p, device);
  return c.in_workspace ? c.ctas * c.rows * c.pitch * 4 : 0;
}

cudaError_t plan_level(const PlanLevel& p, void* workspace, const Device& device,
                       cudaStream_t stream) {
  const Cutting c = cutting(p, device);
  const auto kernel = c.in_workspace ? plan_level_kernel<true> : plan_level_kernel<false>;
  const int64_t bytes = shared_bytes(p, c.in_workspace ? 0 : int64_t{c.rows} * c.pitch);
  return launch_grid(kernel, c.ctas, kThreads, bytes, stream, p, c,
                     static_cast<uint32_t*>(workspace));
}

}  // namespace mra::cuda
