// Global selection by one block of threads or a cluster of them: reductions, and where each warp's
// entries go.
#pragma once

#include "cluster.cuh"
#include "plan_select.cuh"

namespace mra::cuda {

// Pairs of sums and of maxima over all threads of a cluster, every one of which gets the result.
// Each warp writes its part to every block's `Parts`. Two halves take turns, so that one meeting a
// call is enough: a warp can write a half again only after the meeting of the call between, which
// every warp reaches with its reading done.
template <bool kMany, int kWarps>
class MapReduce {
 public:
  static constexpr int kMost = kWarps * (kMany ? kMostOfCluster : 1);  // warps of a cluster
  struct Parts {
    uint2 of[2][kMost];
  };

  __device__ MapReduce(Parts& parts, const Cluster<kMany>& cluster)
      : parts_(parts), cluster_(cluster) {}

  __device__ void sum(int& a, int& b) {
    const uint2* parts = exchange(__reduce_add_sync(kFullWarp, static_cast<uint32_t>(a)),
                                  __reduce_add_sync(kFullWarp, static_cast<uint32_t>(b)));
    a = b = 0;
    each(parts, [&](int, uint2 part) {
      a += static_cast<int>(part.x);
      b += static_cast<int>(part.y);
    });
    a = static_cast<int>(__reduce_add_sync(kFullWarp, static_cast<uint32_t>(a)));
    b = static_cast<int>(__reduce_add_sync(kFullWarp, static_cast<uint32_t>(b)));
  }
  __device__ void max(uint32_t& a, uint32_t& b) {
    const uint2* parts = exchange(__reduce_max_sync(kFullWarp, a), __reduce_max_sync(kFullWarp, b));
    a = b = 0;
    each(parts, [&](int, uint2 part) {
      a = ::max(a, part.x);
      b = ::max(b, part.y);
    });
    a = __reduce_max_sync(kFullWarp, a);
    b = __reduce_max_sync(kFullWarp, b);
  }
  // The parts of all warps, in their order: `a` and `b` of each.
  __device__ const uint2* exchange(uint32_t a, uint32_t b) {
    uint2* half = parts_.of[turn_];
    turn_ ^= 1;
    const int lane = threadIdx.x % 32;
    if (lane < cluster_.blocks) cluster_.at(half, lane)[warp()] = make_uint2(a, b);
    cluster_.meet();
    return half;
  }
  // f(warp, its part) of all warps, each by one lane.
  template <class F>
  __device__ void each(const uint2* parts, const F& f) const {
#pragma unroll
    for (int i = 0; i < (kMost + 31) / 32; ++i) {
      const int other = i * 32 + static_cast<int>(threadIdx.x % 32);
      if (other < cluster_.blocks * kWarps) f(other, parts[other]);
    }
  }
  // This warp's number in the cluster.
  __device__ int warp() const {
    return cluster_.rank * kWarps + static_cast<int>(threadIdx.x / 32);
  }

 private:
  Parts& parts_;
  const Cluster<kMany>& cluster_;
  int turn_ = 0;
};

template <class Reduce>
__device__ __forceinline__ void sum_tiers(int (&pairs)[kTiers], bool has_tiers, Reduce& reduce) {
  reduce.sum(pairs[0], pairs[1]);
  if (!has_tiers) return;
  int none = 0;
  reduce.sum(pairs[2], pairs[3]);
  reduce.sum(pairs[4], none);
}

// The search over the keys that each(f) of all threads gives to f(key), and `higher` ones above all
// candidates. From `enough` candidates on the rest is left to the caller.
template <class Reduce, class Each>
__device__ void narrow(Search& search, int enough, Reduce& reduce, int higher, const Each& each) {
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
template <class Reduce, class Each>
__device__ Search start_search(const Boundary& edge, Reduce& reduce, const Each& each) {
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

// The candidates among the keys of the cluster's threads -> candidates[0 .. their number) of each
// of its blocks, in an order that differs from run to run; begins and ends with a meeting. Entries
// up to kRanked are filled up with kAbsent. `cursor`: a word of shared memory, at the end their
// number in the first block's.
template <bool kMany, class Each>
__device__ void gather(const Cluster<kMany>& cluster, const Search& search, uint32_t* candidates,
                       int* cursor, const Each& each) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) *cursor = 0;
  if (threadIdx.x < kRanked) candidates[threadIdx.x] = kAbsent;
  cluster.meet();
  const uint32_t range = search.hi - search.lo;
  int own = 0;
  each([&](uint32_t key) { own += key - search.lo <= range; });
  const int up_to = sum_up_to_lane(own, lane), total = __shfl_sync(kFullWarp, up_to, 31);
  if (total > 0) {  // the same for the whole warp
    int at = lane == 0 ? atomicAdd(cluster.at(cursor, 0), total) : 0;
    at = __shfl_sync(kFullWarp, at, 0) + up_to - own;
    each([&](uint32_t key) {
      if (key - search.lo > range) return;
      for (int of = 0; of < cluster.blocks; ++of) cluster.at(candidates, of)[at] = key;
      ++at;
    });
  }
  cluster.meet();
}

// The cut in the tier of the boundary, from the keys that each(f) of all threads gives to f(key).
// Rounds over all of them come first; once at most `room` are candidates, each block lists its own
// in `list` [room, at least kRanked]; the last ones are ranked. `ranked` [kRanked] and
// `cursor` [2] are shared memory, too.
template <bool kMany, class Reduce, class Each>
__device__ Cut find_cut(const Cluster<kMany>& cluster, const Boundary& edge, Reduce& reduce,
                        uint32_t* list, int room, uint32_t* ranked, int* cursor, const Each& each) {
  if (edge.take <= 0) return {kForced, 0};  // nothing; the same for the whole head
  Search search = start_search(edge, reduce, each);
  narrow(search, room, reduce, 0, each);
  if (search.done()) return search.cut();
  gather(Cluster<false>(), search, list, cursor, each);
  const int listed = *cursor;
  const auto those = [&](const auto& f) {
#pragma unroll 1
    for (int i = threadIdx.x; i < listed; i += blockDim.x) f(list[i]);
  };
  narrow(search, kRanked, reduce, search.above, those);
  if (search.done()) return search.cut();
  gather(cluster, search, ranked, cursor + 1, those);
  return rank_cut(ranked, search.m - search.above);
}

// Where a warp's entries go in the lists, which lie one behind the other in the order of the warps.
struct Place {
  int first;  // of this warp's entries
  int total;  // of all warps' entries
  int ties;   // what is left of the cut's for this warp
};

// From how many of a lane's keys are higher than the cut's, or equal.
template <class Reduce>
__device__ __forceinline__ Place place_of_warp(int higher, int equal, const Cut& cut,
                                               Reduce& reduce) {
  const uint2* parts = reduce.exchange(__reduce_add_sync(kFullWarp, static_cast<uint32_t>(higher)),
                                       __reduce_add_sync(kFullWarp, static_cast<uint32_t>(equal)));
  uint32_t above = 0, above_before = 0, same = 0, same_before = 0;
  reduce.each(parts, [&](int warp, uint2 part) {
    const bool before = warp < reduce.warp();
    above += part.x;
    same += part.y;
    above_before += before ? part.x : 0;
    same_before += before ? part.y : 0;
  });
  const auto sum = [](uint32_t x) { return static_cast<int>(__reduce_add_sync(kFullWarp, x)); };
  const int ties_before = min(cut.ties, sum(same_before));
  return {sum(above_before) + ties_before, sum(above) + min(cut.ties, sum(same)),
          cut.ties - ties_before};
}

}  // namespace mra::cuda
