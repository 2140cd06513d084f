// Global selection: of a head's whole map, the pairs with the highest scores relative to their row.
//
// The first kernel writes the map of keys of `score - row maximum`. The second gives each head to
// one block of threads: each warp owns a run of the flat map, so that the lists of all rows, which
// lie one behind the other, come out of one ordered compaction.
#include <algorithm>

#include "plan_scores.cuh"

namespace mra::cuda {
namespace {

template <int kRows, int kTileCols>
__global__ void __launch_bounds__(kScoreThreads, (kScoreBlocks<kRows, kTileCols>))
    global_scores_kernel(const PlanParams p, uint32_t* map) {
  extern __shared__ __align__(16) float smem[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_tiles = (p.nq + kRows - 1) / kRows;
  const int head = static_cast<int>(blockIdx.x) / row_tiles;
  const int x0 = static_cast<int>(blockIdx.x) % row_tiles * kRows;
  uint32_t* keys = map + (int64_t{head} * p.nq + x0) * p.nk;
  const int written =
      score_rows<kRows, kTileCols>(p, head / p.H, head % p.H, x0, smem, keys, p.nk, p.nk);
  __syncthreads();

  for (int r = warp; r < kRows && x0 + r < p.nq; r += kScoreWarps) {
    uint32_t* row = keys + int64_t{r} * p.nk;
    uint32_t highest = kAbsent;
    for (int y = lane; y < written; y += 32) highest = max(highest, row[y]);
    highest = __reduce_max_sync(kFullWarp, highest);
    // As the reference: a row of -inf alone keeps -inf.
    const float maximum = fmaxf(score_of(highest), -FLT_MAX);
    const bool undefined = highest == key_of(NAN);  // fmaxf would drop it
    for (int y = lane; y < p.nk; y += 32) {
      uint32_t key = y < written ? row[y] : kAbsent;
      if (key != kAbsent) key = undefined ? key_of(NAN) : key_of(score_of(key) - maximum);
      row[y] = key;
    }
  }
}

// Sums, minima and maxima over a block of threads, every thread of which gets the result. Two
// halves of `buffer` take turns, so that one barrier a call is enough: a warp can write a half
// again only after the barrier of the call between, which every warp reaches with its reading done.
class BlockReduce {
 public:
  __device__ explicit BlockReduce(uint32_t* buffer) : buffer_(buffer) {}

  __device__ int sum(int v) {
    const uint32_t part = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(v));
    return static_cast<int>(__reduce_add_sync(kFullWarp, exchange(part, 0u)));
  }
  __device__ uint32_t min(uint32_t v) {
    const uint32_t part = __reduce_min_sync(kFullWarp, v);
    return __reduce_min_sync(kFullWarp, exchange(part, 0xffffffffu));
  }
  __device__ uint32_t max(uint32_t v) {
    const uint32_t part = __reduce_max_sync(kFullWarp, v);
    return __reduce_max_sync(kFullWarp, exchange(part, 0u));
  }

 private:
  // Lane w gets the part of warp w.
  __device__ uint32_t exchange(uint32_t part, uint32_t none) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    uint32_t* half = buffer_ + 32 * turn_;
    turn_ ^= 1;
    if (lane == 0) half[threadIdx.x / 32] = part;
    __syncthreads();
    return lane < warps ? half[lane] : none;
  }

  uint32_t* buffer_;  // [2][32] in shared memory
  int turn_ = 0;
};

constexpr int kSteps = 16;         // keys a thread can hold in registers
constexpr int kCandidates = 8192;  // keys that fit in shared memory once the search has narrowed

// The keys of this thread: element first + 32 t + lane of the flat map, t < steps, where `first`
// is its warp's. Held in registers, or in global memory for maps that are too big.
template <bool kHeld>
struct Run {
  uint32_t* map;
  int first, steps, size;  // size: of the map
  uint32_t held[kHeld ? kSteps : 1];

  __device__ Run(uint32_t* map, int first, int steps, int size)
      : map(map), first(first), steps(steps), size(size) {
    if constexpr (kHeld) {
#pragma unroll
      for (int t = 0; t < kSteps; ++t) {
        const int i = at(t);
        held[t] = t < steps && i < size ? map[i] : kAbsent;
      }
    }
  }

  __device__ int at(int t) const { return first + t * 32 + static_cast<int>(threadIdx.x % 32); }

  // f(element, key) in order, by whole warps; elements outside of the map are kAbsent.
  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int t = 0; t < kSteps; ++t) f(at(t), held[t]);
    } else {
#pragma unroll 4
      for (int t = 0; t < steps; ++t) {
        const int i = at(t);
        f(i, i < size ? map[i] : kAbsent);
      }
    }
  }

  // key = f(element, key).
  template <typename F>
  __device__ __forceinline__ void map_keys(const F& f) {
    if constexpr (kHeld) {
#pragma unroll
      for (int t = 0; t < kSteps; ++t) held[t] = f(at(t), held[t]);
    } else {
      for (int t = 0; t < steps; ++t) {
        const int i = at(t);
        if (i < size) map[i] = f(i, map[i]);
      }
    }
  }
};

// Finds the cut; ends with every thread of the block knowing it.
template <bool kHeld>
__device__ Cut find_cut(const Run<kHeld>& run, const Boundary& edge, BlockReduce& reduce,
                        uint32_t* candidates, int* cursor) {
  uint32_t lo = kForced, hi = kAbsent;
  run.each([&](int, uint32_t key) {
    if (key == kAbsent || key == kForced) return;
    lo = min(lo, key);
    hi = max(hi, key);
  });
  Search search;
  search.lo = reduce.min(lo);
  search.hi = reduce.max(hi);
  search.at_least = edge.forced + edge.within;
  search.above = edge.forced;
  search.m = edge.take;

  // Each round reads the whole run, until what lies between lo and hi fits in shared memory.
  const int enough = kHeld ? -1 : kCandidates;
  while (!search.done() && search.at_least - search.above > enough) {
    const uint32_t pivot = search.pivot();
    int count = 0;
    run.each([&](int, uint32_t key) { count += key >= pivot; });
    search.report(pivot, reduce.sum(count));
  }
  if constexpr (!kHeld) {
    if (!search.done()) {
      if (threadIdx.x == 0) *cursor = 0;
      __syncthreads();
      // Their order differs from run to run, their number and the counts below do not.
      run.each([&](int, uint32_t key) {
        if (key >= search.lo && key <= search.hi) candidates[atomicAdd(cursor, 1)] = key;
      });
      __syncthreads();
      const int n = search.at_least - search.above, above = search.above;
      while (!search.done()) {
        const uint32_t pivot = search.pivot();
        int count = 0;
        for (int i = threadIdx.x; i < n; i += blockDim.x) count += candidates[i] >= pivot;
        search.report(pivot, above + reduce.sum(count));
      }
    }
  }
  return search.cut();
}

template <bool kHeld>
__global__ void __launch_bounds__(1024)
    global_select_kernel(const PlanParams p, int64_t budget, uint32_t* map) {
  extern __shared__ uint32_t candidates[];  // [kCandidates], for maps that are not held
  __shared__ uint32_t reduce_buffer[64];
  __shared__ int equal_of[32], higher_of[32], cursor;
  const int head = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int size = p.nq * p.nk;
  const auto column_of = [&](int i, int x) { return i - x * p.nk; };
  int32_t* start = p.start + int64_t{head} * p.nq;
  int32_t* count = p.count + int64_t{head} * p.nq;
  const int64_t capacity = int64_t{p.nq} * p.row_capacity;
  int32_t* index = p.index + head * capacity;

  const int steps = kHeld ? kSteps : ((size + warps - 1) / warps + 31) / 32;
  // Past the end for the last warps of a small map; their product may not fit in 32 bits.
  const auto first = static_cast<int>(min(int64_t{warp} * steps * 32, int64_t{size}));
  Run<kHeld> run(map + int64_t{head} * size, first, steps, size);
  BlockReduce reduce(reduce_buffer);

  // How many pairs exist, by tier.
  int pairs[kTiers] = {0, 0, 0, 0, 0};
  if (has_tiers(p)) {
    run.each([&](int i, uint32_t key) {
      if (key == kAbsent) return;
      const int x = i / p.nk;
      const int tier = tier_of<true>(p, x, column_of(i, x));
#pragma unroll
      for (int t = 0; t < kTiers; ++t) pairs[t] += tier == t;
    });
#pragma unroll
    for (int t = 1; t < kTiers; ++t) pairs[t] = reduce.sum(pairs[t]);
  } else {
    run.each([&](int, uint32_t key) { pairs[0] += key != kAbsent; });
  }
  pairs[0] = reduce.sum(pairs[0]);

  const Boundary edge = find_boundary(pairs, budget);
  if (edge.take == 0) {  // the same for the whole block
    for (int x = threadIdx.x; x < p.nq; x += blockDim.x) start[x] = count[x] = 0;
    return;
  }
  if (has_tiers(p)) {
    run.map_keys([&](int i, uint32_t key) {
      if (key == kAbsent) return key;
      const int x = i / p.nk;
      return key_in_tier(key, tier_of<true>(p, x, column_of(i, x)), edge.tier);
    });
  }
  Cut cut = find_cut(run, edge, reduce, candidates, &cursor);

  // Where this warp's entries go, and how many of the cut's ties are left for it.
  int equal = 0, higher = 0;
  run.each([&](int, uint32_t key) {
    equal += key == cut.key;
    higher += key > cut.key;
  });
  equal = __reduce_add_sync(kFullWarp, equal);
  higher = __reduce_add_sync(kFullWarp, higher);
  if (lane == 0) {
    equal_of[warp] = equal;
    higher_of[warp] = higher;
  }
  __syncthreads();
  equal = lane < warps ? equal_of[lane] : 0;
  higher = lane < warps ? higher_of[lane] : 0;
  int equal_sum = equal;  // of the warps up to warp `lane`
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, equal_sum, step);
    if (lane >= step) equal_sum += other;
  }
  const int ties_left = max(cut.ties - (equal_sum - equal), 0);
  const int taken_here = higher + min(equal, ties_left);
  int taken_sum = taken_here;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, taken_sum, step);
    if (lane >= step) taken_sum += other;
  }
  const int total = __shfl_sync(kFullWarp, taken_sum, 31);
  int position = __shfl_sync(kFullWarp, taken_sum - taken_here, warp);
  cut.ties = __shfl_sync(kFullWarp, ties_left, warp);

  run.each([&](int i, uint32_t key) {
    const unsigned taken = take_lanes(key, cut.key, cut.ties);
    const int mine = position + __popc(taken & ((1u << lane) - 1));
    if (i < size) {
      const int y = column_of(i, i / p.nk);
      if (y == 0) start[i / p.nk] = mine;
      if ((taken >> lane & 1) != 0 && mine < capacity) index[mine] = y;
    }
    position += __popc(taken);
  });
  __syncthreads();  // start is written, and this block reads it
  for (int x = threadIdx.x; x < p.nq; x += blockDim.x) {
    count[x] = (x + 1 < p.nq ? start[x + 1] : total) - start[x];
  }
}

template <int kRows, int kTileCols>
cudaError_t launch_scores_of(const PlanParams& p, uint32_t* map, cudaStream_t stream) {
  const auto kernel = global_scores_kernel<kRows, kTileCols>;
  const int smem = score_floats(kRows, p.D, kTileCols) * static_cast<int>(sizeof(float));
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  if (error != cudaSuccess) return error;
  const int tiles = p.B * p.H * ((p.nq + kRows - 1) / kRows);
  kernel<<<tiles, kScoreThreads, smem, stream>>>(p, map);
  return cudaGetLastError();
}

template <int kTileCols>
cudaError_t launch_scores(const PlanParams& p, uint32_t* map, cudaStream_t stream) {
  if (p.nq <= 8) return launch_scores_of<8, kTileCols>(p, map, stream);
  if (p.nq <= 16) return launch_scores_of<16, kTileCols>(p, map, stream);
  return launch_scores_of<32, kTileCols>(p, map, stream);
}

}  // namespace

cudaError_t plan_global(const PlanParams& p, int64_t budget, uint32_t* map, cudaStream_t stream) {
  const cudaError_t error = tile_cols(p.nk) == 128 ? launch_scores<128>(p, map, stream)
                                                   : launch_scores<256>(p, map, stream);
  if (error != cudaSuccess) return error;

  const int64_t size = int64_t{p.nq} * p.nk;
  const int heads = p.B * p.H;
  if (size <= 1024 * kSteps) {
    const auto threads = static_cast<int>((size + kSteps * 32 - 1) / (kSteps * 32) * 32);
    global_select_kernel<true><<<heads, threads, 0, stream>>>(p, budget, map);
  } else {
    constexpr int kSmem = kCandidates * sizeof(uint32_t);
    global_select_kernel<false><<<heads, 1024, kSmem, stream>>>(p, budget, map);
  }
  return cudaGetLastError();
}

}  // namespace mra::cuda
