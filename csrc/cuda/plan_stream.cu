// Row selection from long rows: no row of scores is ever whole. Scores come in chunks of columns,
// of which each row keeps what may still be selected: a key above the lowest of the `budget`
// highest before this chunk, as ties go to the lower index. Soon few do. They lie in no order until
// the end.
#include "plan_row.cuh"
#include "plan_scores.cuh"

namespace mra::cuda {
namespace {

// Two blocks of threads fit on a multiprocessor: one multiplies while the other prunes.
using Tile = ScoreTile<1, 4, 2, 4, 32, 3>;
constexpr int kRows = Tile::kRows, kChunk = Tile::kCols, kWarps = Tile::kWarps;
constexpr int kRowsEach = kRows / kWarps;  // a warp's: warp + kWarps i
constexpr int kMostBudget = 256, kMostBlocks = 1 << 16;

// A row that has kept more than this is pruned: less often, but more is kept meanwhile.
__host__ __device__ __forceinline__ int most_kept(int budget) {
  return budget <= 32 ? 64 : min(2 * budget, budget + 128);
}
constexpr int kMostKept = kMostBudget + 128;

struct Shared {
  alignas(16) float ring[Tile::kRingWords];
  alignas(16) uint32_t candidates[kWarps][kRanked];
  // What a row has kept: how many keys, of which all further ones are above `lowest`.
  int count[kRows];
  uint32_t lowest[kRows];
};

// Behind it, of the rows, `room` each: the keys that they have kept, then their blocks.
__host__ __device__ __forceinline__ int room_of(int budget) {
  return (most_kept(budget) + kChunk + 31) / 32 * 32;
}
int shared_bytes(int budget) { return sizeof(Shared) + kRows * room_of(budget) * 6; }

// What one row has kept.
struct Kept {
  uint32_t* keys;
  uint16_t* blocks;
  int* count;
  uint32_t* lowest;

  __device__ __forceinline__ Kept(Shared& s, int room, int r)
      : count(s.count + r), lowest(s.lowest + r) {
    auto* const of_rows = reinterpret_cast<uint32_t*>(&s + 1);
    keys = of_rows + r * room;
    blocks = reinterpret_cast<uint16_t*>(of_rows + kRows * room) + r * room;
  }

  // Those of two keys that are above `low`, by any thread.
  __device__ __forceinline__ void add(int y, uint32_t even, uint32_t odd, uint32_t low) {
    const bool has_even = even > low, has_odd = odd > low;
    if (!has_even && !has_odd) return;
    int at = atomicAdd(count, has_even + has_odd);
    if (has_even) {
      keys[at] = even;
      blocks[at++] = static_cast<uint16_t>(y);
    }
    if (has_odd) {
      keys[at] = odd;
      blocks[at] = static_cast<uint16_t>(y + 1);
    }
  }

  // Leaves the `budget` highest of up to 32 kSteps, of equal ones those of lower blocks; there are
  // more. By one warp.
  template <int kSteps>
  __device__ __forceinline__ void prune(int budget, uint32_t* candidates) {
    const int lane = threadIdx.x % 32, kept = *count, steps = (kept + 31) / 32;
    if (kept + lane < 32 * steps) keys[kept + lane] = kAbsent;
    __syncwarp();
    const Row<kSteps> row(keys, steps);
    uint32_t block[kSteps];
#pragma unroll
    for (int t = 0; t < kSteps; ++t) block[t] = t < steps ? blocks[32 * t + lane] : 0;
    const Cut cut = find_row_cut(row, Boundary{budget, 0, 0, kept}, candidates);
    uint32_t last = kMostBlocks;  // that is taken of those equal to the cut's
    if (cut.ties != INT_MAX) {
      last = 0;
#pragma unroll 1
      for (uint32_t bit = kMostBlocks / 2; bit > 0; bit /= 2) {
        int before = 0;
        row.each([&](int t, uint32_t key) { before += key == cut.key && block[t] < (last | bit); });
        if (__reduce_add_sync(kFullWarp, before) < cut.ties) last |= bit;
      }
    }
    __syncwarp();  // all have read what follows overwrites
    uint32_t low = kForced;
    int at = 0;
    row.each([&](int t, uint32_t key) {
      const bool take = key > cut.key || (key == cut.key && block[t] <= last);
      const unsigned taken = __ballot_sync(kFullWarp, take);
      if (take) {
        const int to = at + __popc(taken & ((1u << lane) - 1));
        keys[to] = key;
        blocks[to] = static_cast<uint16_t>(block[t]);
        low = min(low, key);
      }
      at += __popc(taken);
    });
    low = __reduce_min_sync(kFullWarp, low);
    if (lane == 0) {
      *count = at;
      *lowest = low;
    }
    __syncwarp();
  }

  __device__ __forceinline__ void prune_to(int budget, uint32_t* candidates) {
    if (*count <= 128) {
      prune<4>(budget, candidates);
    } else if (*count <= 256) {
      prune<8>(budget, candidates);
    } else {
      prune<(kMostKept + kChunk) / 32>(budget, candidates);
    }
  }

  // Writes the blocks, ascending, to index[0 .. count). By one warp.
  __device__ __forceinline__ void write(int32_t* index) const {
    const int lane = threadIdx.x % 32, kept = *count;
#pragma unroll 1
    for (int t = lane; t < kept; t += 32) {
      const int own = blocks[t];
      int before = 0;
#pragma unroll 4
      for (int i = 0; i < kept; ++i) before += blocks[i] < own;
      index[before] = own;
    }
  }
};

__global__ void __launch_bounds__(Tile::kThreads, 2) plan_stream_kernel(const PlanParams p) {
  extern __shared__ __align__(16) char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  clear_queues(p.queues);
  const int tiles = (p.nq + kRows - 1) / kRows, head = blockIdx.x / tiles;
  const int x0 = (blockIdx.x - head * tiles) * kRows, rows = min(kRows, p.nq - x0);
  const int budget = budget_of(p, head % p.H, 0);  // of every row of the head
  const int most = most_kept(budget), room = room_of(p.row_capacity);
  if (threadIdx.x < kRows) {
    s.count[threadIdx.x] = 0;
    s.lowest[threadIdx.x] = kAbsent;
  }

  const auto store = [&](int row) {
    return [&, row, low0 = s.lowest[row], low1 = s.lowest[row + 8]](int i, int y, uint32_t even,
                                                                    uint32_t odd) {
      Kept(s, room, row + 8 * i).add(y, even, odd, i == 0 ? low0 : low1);
    };
  };
  const auto prune = [&](int y0) {
    __syncthreads();
    const int limit = y0 + kChunk < p.nk ? most : budget;
    const bool full = lane < kRowsEach && s.count[warp + kWarps * (lane % kRowsEach)] > limit;
    for (unsigned left = __ballot_sync(kFullWarp, full); left != 0; left &= left - 1) {
      Kept(s, room, warp + kWarps * (__ffs(left) - 1)).prune_to(budget, s.candidates[warp]);
    }
  };
  Tile::each(p, head / p.H, head % p.H, x0, s.ring, (p.nk + 31) / 32 * 32, store, prune);

#pragma unroll 1
  for (int r = warp; r < rows; r += kWarps) {
    const Kept kept(s, room, r);
    const int64_t row = int64_t{head} * p.nq + x0 + r;
    const int64_t start = int64_t{x0 + r} * p.row_capacity;
    int32_t* index = p.index + row * p.row_capacity;
    kept.write(index);
    for (int t = *kept.count + lane; t < p.row_capacity; t += 32) index[t] = 0;
    if (lane == 0) {
      p.start[row] = static_cast<int32_t>(start);
      p.count[row] = *kept.count;
    }
  }
  if (p.beside && blockIdx.x == 0) wait_for_previous();
}

}  // namespace

bool plan_stream_fits(const PlanParams& p, const Device& device) {
  return !has_tiers(p) && p.row_capacity <= kMostBudget && p.nk <= kMostBlocks &&
         shared_bytes(p.row_capacity) <= device.max_smem;
}

cudaError_t plan_stream(const PlanParams& p, cudaStream_t stream) {
  const int64_t tiles = int64_t{p.B} * p.H * ((p.nq + kRows - 1) / kRows);
  return launch_grid(plan_stream_kernel, tiles, Tile::kThreads, shared_bytes(p.row_capacity),
                     stream, Beside{p.beside}, p);
}

}  // namespace mra::cuda
