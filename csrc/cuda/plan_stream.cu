// Row selection from long rows: no row of scores is ever whole. Scores come in chunks of columns,
// of which each row keeps what may still be selected: a key above the lowest of the `budget`
// highest before this chunk, as ties go to the lower index, or what is forced, which is told by
// tier when a row is pruned. Soon few do. They lie in no order until the end.
#include "plan_row.cuh"
#include "plan_scores.cuh"

namespace mra::cuda {
namespace {

// Two blocks of threads fit on a multiprocessor: one multiplies while the other prunes.
using Tile = ScoreTile<1, 4, 2, 4, 32, 3>;
constexpr int kRows = Tile::kRows, kChunk = Tile::kCols, kWarps = Tile::kWarps;
constexpr int kRowsEach = kRows / kWarps;  // a warp's: warp + kWarps i
constexpr int kMostBudget = 256;
constexpr int kBitWords = Tile::kRingWords / kWarps;  // a bit a key block, in the end
constexpr int kMostBlocks = 32 * kBitWords;
static_assert(kMostBlocks <= 1 << 16, "kept as uint16_t");

// A row that has kept more than this is pruned: less often, but more is kept meanwhile.
__host__ __device__ __forceinline__ int most_kept(int budget) {
  return budget <= 32 ? 64 : min(2 * budget, budget + 128);
}
constexpr int kMostKept = kMostBudget + 128;

struct Shared {
  alignas(16) float ring[Tile::kRingWords];
  alignas(16) uint32_t candidates[kWarps][kRanked];
  // What a row may take, and how many keys it has kept. Further ones are kept that are above
  // `lowest` or forced.
  int budget[kRows], count[kRows];
  uint32_t lowest[kRows];
};

// Behind it, of the rows, `room` each: the keys that they have kept, then their blocks.
__host__ __device__ __forceinline__ int room_of(int budget) {
  return (most_kept(budget) + kChunk + 31) / 32 * 32;
}
int shared_bytes(int budget) { return sizeof(Shared) + kRows * room_of(budget) * 6; }

// Key blocks that are forced for some query block of x0 .. x1, perhaps a few more: before `first`,
// and from `from` to before `to`.
struct ForcedBlocks {
  int first = 0, from = 0, to = 0;

  __device__ __forceinline__ ForcedBlocks(const PlanParams& p, int x0, int x1) {
    first = p.first_blocks;
    if (!p.causal && p.diagonal_reach < 0) return;
    const int64_t begin = int64_t{x0} * p.block_q, end = (int64_t{x1} + 1) * p.block_q;
    const int64_t reach = max(int64_t{p.diagonal_reach}, int64_t{0});
    from = static_cast<int>(min(int64_t{p.nk}, max(begin - reach, int64_t{0}) / p.block_k));
    to = static_cast<int>(min(int64_t{p.nk}, (end + reach + p.block_k - 1) / p.block_k));
  }
  __device__ __forceinline__ bool near(int y) const { return y < first || (y >= from && y < to); }
};

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

  // Those of two keys that are wanted, by any thread.
  __device__ __forceinline__ void add(int y, uint32_t even, uint32_t odd, bool has_even,
                                      bool has_odd) {
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

  // Leaves what query block x takes, with `budget`, of up to 32 kSteps: of equal keys those of
  // lower blocks; there are more than `budget`. By one warp.
  template <bool kTiered, int kSteps>
  __device__ __forceinline__ void prune(const PlanParams& p, int x, int budget,
                                        uint32_t* candidates) {
    const int lane = threadIdx.x % 32, kept = *count, steps = (kept + 31) / 32;
    if (kept + lane < 32 * steps) keys[kept + lane] = kAbsent;
    __syncwarp();
    Row<kSteps> row(keys, steps);
    [[maybe_unused]] const Row<kSteps> whole = row;
    uint32_t block[kSteps];
#pragma unroll
    for (int t = 0; t < kSteps; ++t) block[t] = t < steps ? blocks[32 * t + lane] : 0;
    Boundary edge = whole_boundary(kept, budget);
    if constexpr (kTiered) {
      int pairs[kTiers] = {};
      int tiers[kSteps];
      row.each([&](int t, uint32_t key) {
        tiers[t] = tier_of<false>(p, x, block[t]);
#pragma unroll
        for (int i = 0; i < kTiers; ++i) pairs[i] += key != kAbsent && tiers[t] == i;
      });
#pragma unroll
      for (int i = 0; i < kTiers; ++i) pairs[i] = __reduce_add_sync(kFullWarp, pairs[i]);
      edge = find_boundary(pairs, budget);
      row.map([&](int t, uint32_t key) {
        return key == kAbsent ? key : key_in_tier(key, tiers[t], edge.tier);
      });
    }
    const Cut cut = find_row_cut(row, edge, candidates);
    uint32_t last = 0xffff;  // that is taken of those equal to the cut's
    if (cut.ties != INT_MAX) {
      last = 0;
#pragma unroll 1
      for (uint32_t bit = 0x8000; bit > 0; bit /= 2) {
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
        keys[to] = kTiered ? whole.held[t] : key;
        blocks[to] = static_cast<uint16_t>(block[t]);
        if (edge.tier == 0) low = min(low, key);  // in the end of those that aren't forced
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

  template <bool kTiered>
  __device__ __forceinline__ void prune(const PlanParams& p, int x, int budget,
                                        uint32_t* candidates) {
    if (*count <= 128) {
      prune<kTiered, 4>(p, x, budget, candidates);
    } else if (*count <= 256) {
      prune<kTiered, 8>(p, x, budget, candidates);
    } else {
      prune<kTiered, (kMostKept + kChunk) / 32>(p, x, budget, candidates);
    }
  }

  // Writes the blocks, ascending, to index[0 .. count): by one warp, which has room for a bit for
  // each of the `words` times 32 blocks that there are.
  __device__ __forceinline__ void write(int32_t* index, uint32_t* bits, int words) const {
    const int lane = threadIdx.x % 32, each = (words + 31) / 32;
    for (int i = lane; i < words; i += 32) bits[i] = 0;
    __syncwarp();
    for (int t = lane; t < *count; t += 32) atomicOr(bits + blocks[t] / 32, 1u << blocks[t] % 32);
    __syncwarp();
    const int begin = min(lane * each, words), end = min(begin + each, words);
    int own = 0;
    for (int i = begin; i < end; ++i) own += __popc(bits[i]);
    int at = sum_up_to_lane(own, lane) - own;
    for (int i = begin; i < end; ++i) {
      for (uint32_t left = bits[i]; left != 0; left &= left - 1) {
        index[at++] = 32 * i + __ffs(left) - 1;
      }
    }
    __syncwarp();
  }
};

template <bool kTiered>
__global__ void __launch_bounds__(Tile::kThreads, 2) plan_stream_kernel(const PlanParams p) {
  extern __shared__ __align__(16) char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  clear_queues(p.queues);
  const int tiles = (p.nq + kRows - 1) / kRows, head = blockIdx.x / tiles;
  const int x0 = (tiles - 1 - (blockIdx.x - head * tiles)) * kRows;  // long rows first
  const int rows = min(kRows, p.nq - x0), cols = visible_blocks(p, x0 + rows - 1);
  const int room = room_of(p.row_capacity);
  [[maybe_unused]] const ForcedBlocks forced(p, x0, x0 + rows - 1);
  if (threadIdx.x < kRows) {
    s.budget[threadIdx.x] =
        budget_of(p, head % p.H, min(x0 + static_cast<int>(threadIdx.x), p.nq - 1));
    s.count[threadIdx.x] = 0;
    s.lowest[threadIdx.x] = kAbsent;
  }

  const auto store = [&](int row) {
    return [&, row, low0 = s.lowest[row], low1 = s.lowest[row + 8]](int i, int y, uint32_t even,
                                                                    uint32_t odd) {
      const uint32_t low = i == 0 ? low0 : low1;
      bool has_even = even > low, has_odd = odd > low;
      if constexpr (kTiered) {
        const int x = x0 + row + 8 * i;
        if (forced.near(y)) has_even |= even != kAbsent && tier_of<false>(p, x, y) > 0;
        if (forced.near(y + 1)) has_odd |= odd != kAbsent && tier_of<false>(p, x, y + 1) > 0;
      }
      Kept(s, room, row + 8 * i).add(y, even, odd, has_even, has_odd);
    };
  };
  const auto prune = [&](int y0) {
    __syncthreads();
    const int own = warp + kWarps * (lane % kRowsEach), budget = s.budget[own];
    const int limit = y0 + kChunk < cols ? most_kept(budget) : budget;
    const bool full = lane < kRowsEach && s.count[own] > limit;
    for (unsigned left = __ballot_sync(kFullWarp, full); left != 0; left &= left - 1) {
      const int r = warp + kWarps * (__ffs(left) - 1);
      Kept(s, room, r).prune<kTiered>(p, x0 + r, s.budget[r], s.candidates[warp]);
    }
  };
  Tile::each(p, head / p.H, head % p.H, x0, s.ring, (p.nk + 31) / 32 * 32, store, prune);

  // No copy is on its way any more, and all have met behind the last stage.
  uint32_t* const bits = reinterpret_cast<uint32_t*>(s.ring) + warp * kBitWords;
#pragma unroll 1
  for (int r = warp; r < rows; r += kWarps) {
    const Kept kept(s, room, r);
    const int64_t row = int64_t{head} * p.nq + x0 + r;
    const int64_t start = int64_t{x0 + r} * p.row_capacity;
    int32_t* index = p.index + row * p.row_capacity;
    kept.write(index, bits, (p.nk + 31) / 32);
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
  return p.row_capacity <= kMostBudget && p.nk <= kMostBlocks &&
         shared_bytes(p.row_capacity) <= device.max_smem;
}

cudaError_t plan_stream(const PlanParams& p, cudaStream_t stream) {
  const int64_t tiles = int64_t{p.B} * p.H * ((p.nq + kRows - 1) / kRows);
  const auto kernel = has_tiers(p) ? plan_stream_kernel<true> : plan_stream_kernel<false>;
  return launch_grid(kernel, tiles, Tile::kThreads, shared_bytes(p.row_capacity), stream,
                     Together{p.beside}, p);
}

}  // namespace mra::cuda
