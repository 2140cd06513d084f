// Global selection by one block of threads: reductions, and where each warp's entries go.
#pragma once

#include "plan_select.cuh"

namespace mra::cuda {

// Pairs of sums and of maxima over a block of threads, every thread of which gets the result. Two
// halves of `buffer` take turns, so that one barrier a call is enough: a warp can write a half
// again only after the barrier of the call between, which every warp reaches with its reading done.
class BlockReduce {
 public:
  static constexpr int kWords = 2 * 2 * 32;  // of `buffer`, in shared memory

  __device__ explicit BlockReduce(uint32_t* buffer) : buffer_(buffer) {}

  __device__ void sum(int& a, int& b) {
    uint32_t part_a = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(a));
    uint32_t part_b = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(b));
    exchange(part_a, part_b);
    a = static_cast<int>(__reduce_add_sync(kFullWarp, part_a));
    b = static_cast<int>(__reduce_add_sync(kFullWarp, part_b));
  }
  __device__ void max(uint32_t& a, uint32_t& b) {
    a = __reduce_max_sync(kFullWarp, a);
    b = __reduce_max_sync(kFullWarp, b);
    exchange(a, b);
    a = __reduce_max_sync(kFullWarp, a);
    b = __reduce_max_sync(kFullWarp, b);
  }
  // Lane w gets the parts of warp w, zeros where there is no such warp.
  __device__ void exchange(uint32_t& a, uint32_t& b) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    uint32_t* half = buffer_ + 64 * turn_;
    turn_ ^= 1;
    if (lane == 0) {
      half[warp] = a;
      half[32 + warp] = b;
    }
    __syncthreads();
    a = lane < warps ? half[lane] : 0u;
    b = lane < warps ? half[32 + lane] : 0u;
  }

 private:
  uint32_t* buffer_;
  int turn_ = 0;
};

__device__ __forceinline__ void sum_tiers(int (&pairs)[kTiers], bool has_tiers,
                                          BlockReduce& reduce) {
  reduce.sum(pairs[0], pairs[1]);
  if (!has_tiers) return;
  int none = 0;
  reduce.sum(pairs[2], pairs[3]);
  reduce.sum(pairs[4], none);
}

// The search over the keys that each(f) of all threads gives to f(key), and `higher` ones above all
// candidates. From `enough` candidates on the rest is left to the caller.
template <class Each>
__device__ void narrow(Search& search, int enough, BlockReduce& reduce, int higher,
                       const Each& each) {
  while (!search.done() && search.candidates() > enough) {
    uint32_t a, b;
    search.pivots(a, b);
    int at_a = 0, at_b = 0;
    each([&](uint32_t key) {
      count_above(at_a, key, a - 1);
      count_above(at_b, key, b - 1);
    });
    reduce.sum(at_a, at_b);
    search.report(a, higher + at_a, b, higher + at_b);
  }
}

// A search between the lowest and the highest key of the boundary's tier.
template <class Each>
__device__ Search start_search(const Boundary& edge, BlockReduce& reduce, const Each& each) {
  uint32_t lowest = 0, highest = 0;  // lowest: complement
  each([&](uint32_t key) {
    if (key == kAbsent || key == kForced) return;
    lowest = max(lowest, ~key);
    highest = max(highest, key);
  });
  reduce.max(lowest, highest);
  Search search;
  search.lo = ~lowest;
  search.hi = highest;
  search.at_least = edge.forced + edge.within;
  search.above = edge.forced;
  search.m = edge.take;
  return search;
}

// The candidates of a search -> candidates[0 .. their number), in an order that differs from run to
// run; ends with a barrier. Entries up to kRanked are filled up with kAbsent.
template <class Each>
__device__ void gather(const Search& search, uint32_t* candidates, int* cursor, const Each& each) {
  if (threadIdx.x == 0) *cursor = 0;
  if (threadIdx.x < kRanked) candidates[threadIdx.x] = kAbsent;
  __syncthreads();
  each([&](uint32_t key) {
    if (key >= search.lo && key <= search.hi) candidates[atomicAdd(cursor, 1)] = key;
  });
  __syncthreads();
}

// Where a warp's entries go in the lists, which lie one behind the other in the order of the warps.
struct Place {
  int first;  // of this warp's entries
  int total;  // of all warps' entries
  int ties;   // what is left of the cut's for this warp
};

// From how many of a warp's keys are higher than the cut's, or equal, each summed over lanes here.
__device__ __forceinline__ Place place_of_warp(int higher, int equal, const Cut& cut,
                                               BlockReduce& reduce) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t higher_of = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(higher));
  uint32_t equal_of = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(equal));
  reduce.exchange(higher_of, equal_of);  // now of warp `lane`
  higher = static_cast<int>(higher_of);
  equal = static_cast<int>(equal_of);
  const int ties = max(cut.ties - (sum_up_to_lane(equal, lane) - equal), 0);
  const int taken = higher + min(equal, ties);
  const int taken_sum = sum_up_to_lane(taken, lane);
  return {__shfl_sync(kFullWarp, taken_sum - taken, warp), __shfl_sync(kFullWarp, taken_sum, 31),
          __shfl_sync(kFullWarp, ties, warp)};
}

// Relative to its row's maximum, which is undefined where a score of the row is NaN.
__device__ __forceinline__ uint32_t relative_key(uint32_t key, uint32_t highest) {
  if (key == kAbsent) return key;
  if (highest == key_of(NAN)) return highest;  // fmaxf would drop it
  // As the reference: a row of -inf alone keeps -inf.
  return key_of(score_of(key) - fmaxf(score_of(highest), -FLT_MAX));
}

}  // namespace mra::cuda
