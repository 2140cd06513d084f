// Row selection from long rows: scores come in chunks of columns, of which each row keeps what may
// still be selected. Few do once as many as the budget are there: a key has to lie above the lowest
// of those, as ties go to the lower index. No row of scores is ever whole.
#include "plan_row.cuh"
#include "plan_scores.cuh"

namespace mra::cuda {
namespace {

using Tile = ScoreTile<2, 4, 1, 8>;
constexpr int kRows = Tile::kRows, kChunk = Tile::kCols, kWarps = Tile::kWarps;
constexpr int kRowsEach = kRows / kWarps;  // rows of a warp
constexpr int kMostBudget = 256, kRoom = kMostBudget + kChunk;
constexpr int kMostBlocks = 1 << 16;

struct Shared {
  alignas(16) float ring[Tile::kRingWords];
  alignas(8) uint32_t chunk[kRows][kChunk];
  uint32_t keys[kRows][kRoom];  // what a row has kept, in order
  uint16_t blocks[kRows][kRoom];
  alignas(16) uint32_t candidates[kWarps][kRanked];
};

// What one row has kept; by one warp.
struct Kept {
  int count = 0;
  uint32_t lowest = kAbsent;  // only keys above it are kept

  // The `columns` keys of a chunk that starts at key block y0.
  __device__ __forceinline__ void add(Shared& s, int r, int y0, int columns) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < kChunk / 32; ++t) {
      const int y = 32 * t + lane;
      const uint32_t key = y < columns ? s.chunk[r][y] : kAbsent;
      const unsigned kept = __ballot_sync(kFullWarp, key > lowest);
      if (kept >> lane & 1) {
        const int at = count + __popc(kept & ((1u << lane) - 1));
        s.keys[r][at] = key;
        s.blocks[r][at] = static_cast<uint16_t>(y0 + y);
      }
      count += __popc(kept);
    }
  }

  // Leaves the `budget` highest; there are more.
  __device__ __forceinline__ void prune(Shared& s, int r, int budget) {
    const int lane = threadIdx.x % 32, steps = (count + 31) / 32;
    if (count + lane < 32 * steps) s.keys[r][count + lane] = kAbsent;
    __syncwarp();
    const Row<kRoom / 32> row(s.keys[r], steps);
    const Boundary edge{budget, 0, 0, count};
    Cut cut = find_row_cut(row, edge, s.candidates[threadIdx.x / 32]);
    uint32_t low = kForced;
    count = 0;
    row.each([&](int t, uint32_t key) {
      const unsigned taken = take_lanes(key, cut.key, cut.ties);
      const uint16_t block = s.blocks[r][32 * t + lane];
      __syncwarp();
      if (taken >> lane & 1) {
        const int at = count + __popc(taken & ((1u << lane) - 1));
        s.keys[r][at] = key;
        s.blocks[r][at] = block;
        low = min(low, key);
      }
      count += __popc(taken);
      __syncwarp();
    });
    lowest = __reduce_min_sync(kFullWarp, low);
  }
};

__global__ void __launch_bounds__(Tile::kThreads, 1) plan_stream_kernel(const PlanParams p) {
  extern __shared__ __align__(16) char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  clear_queues(p.queues);
  const int tiles = (p.nq + kRows - 1) / kRows, head = blockIdx.x / tiles;
  const int x0 = (blockIdx.x - head * tiles) * kRows, rows = min(kRows, p.nq - x0);
  const int budget = budget_of(p, head % p.H, 0);  // of every row of the head
  const int limit = min(kMostBudget, max(2 * budget, 64));

  Kept kept[kRowsEach];
  const auto store = [&](int r, int y, uint32_t even, uint32_t odd) {
    *reinterpret_cast<uint2*>(&s.chunk[r][y % kChunk]) = make_uint2(even, odd);
  };
  const auto select = [&](int y0) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      const int r = warp + kWarps * i;
      if (r >= rows) break;
      kept[i].add(s, r, y0, min(kChunk, p.nk - y0));
      if (kept[i].count > limit) kept[i].prune(s, r, budget);
    }
  };
  Tile::each(p, head / p.H, head % p.H, x0, s.ring, (p.nk + 31) / 32 * 32, store, select);

#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    const int r = warp + kWarps * i, x = x0 + r;
    if (r >= rows) break;
    if (kept[i].count > budget) kept[i].prune(s, r, budget);
    __syncwarp();
    const int64_t start = int64_t{x} * p.row_capacity, list = int64_t{head} * p.nq + x;
    int32_t* index = p.index + int64_t{head} * p.nq * p.row_capacity + start;
    for (int t = lane; t < p.row_capacity; t += 32)
      index[t] = t < kept[i].count ? s.blocks[r][t] : 0;
    if (lane == 0) {
      p.start[list] = static_cast<int32_t>(start);
      p.count[list] = kept[i].count;
    }
  }
  if (p.beside && blockIdx.x == 0) wait_for_previous();
}

}  // namespace

bool plan_stream_fits(const PlanParams& p, const Device& device) {
  return !has_tiers(p) && p.row_capacity <= kMostBudget && p.nk <= kMostBlocks &&
         static_cast<int>(sizeof(Shared)) <= device.max_smem;
}

cudaError_t plan_stream(const PlanParams& p, cudaStream_t stream) {
  const int64_t tiles = int64_t{p.B} * p.H * ((p.nq + kRows - 1) / kRows);
  return launch_grid(plan_stream_kernel, tiles, Tile::kThreads, sizeof(Shared), stream,
                     Beside{p.beside}, p);
}

}  // namespace mra::cuda
