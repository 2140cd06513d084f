// A row of keys that one warp selects from.
#pragma once

#include "plan_select.cuh"

namespace mra::cuda {

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

// The cut of a row, found by taking the highest keys away, one after the other.
template <int kSteps>
__device__ __forceinline__ Cut take_highest(const Row<kSteps>& row, const Boundary& edge) {
  uint32_t below = kForced;
  int left = edge.take - edge.forced;
#pragma unroll 1
  for (;;) {
    uint32_t top = kAbsent;
    row.each([&](int, uint32_t key) { top = max(top, key < below ? key : kAbsent); });
    top = __reduce_max_sync(kFullWarp, top);
    int equal = 0;
    row.each([&](int, uint32_t key) { equal += __popc(__ballot_sync(kFullWarp, key == top)); });
    if (equal >= left || top == kAbsent) return {top, equal == left ? INT_MAX : left};
    left -= equal;
    below = top;
  }
}

// Of the keys equal to the cut's those that aren't taken are lowered by one: all from the cut's on
// are.
template <int kSteps>
__device__ __forceinline__ void lower_ties(Row<kSteps>& row, Cut& cut) {
  row.map([&](int, uint32_t key) {
    const unsigned equal = __ballot_sync(kFullWarp, key == cut.key);
    const int before = __popc(equal & ((1u << threadIdx.x % 32) - 1));
    const bool lower = key == cut.key && before >= cut.ties;
    cut.ties -= min(cut.ties, __popc(equal));
    return lower ? key - 1 : key;
  });
  cut.ties = INT_MAX;
}

// The cut of a row, by one warp; `candidates` [kRanked] is its own.
template <int kSteps>
__device__ Cut find_row_cut(const Row<kSteps>& row, const Boundary& edge, uint32_t* candidates) {
  constexpr int kFew = kSteps == 1 || kSteps == 2 ? 8 : 0;  // quicker than a search
  if (edge.take - edge.forced <= kFew) return take_highest(row, edge);
  const int lane = threadIdx.x % 32;
  // Below kAbsent lies kForced, above kForced kAbsent: neither is lowest or highest.
  uint32_t lo = kForced, hi = kAbsent;
  row.each([&](int, uint32_t key) {
    lo = min(lo, key - 1);
    hi = max(hi, key + 1);
  });
  Search search;
  search.lo = __reduce_min_sync(kFullWarp, lo) + 1;
  search.hi = __reduce_max_sync(kFullWarp, hi) - 1;
  search.at_least = edge.forced + edge.within;
  search.above = edge.forced;
  search.m = edge.take;
  while (!search.done() && search.candidates() > kRanked) {
    uint32_t a, b;
    search.pivots(a, b);
    int at_a = 0, at_b = 0;
    row.each([&](int, uint32_t key) {
      count_above(at_a, key, a - 1);
      count_above(at_b, key, b - 1);
    });
    search.report(a, __reduce_add_sync(kFullWarp, at_a), b, __reduce_add_sync(kFullWarp, at_b));
  }
  if (search.done()) return search.cut();

  // The candidates of a lane lie one behind the other.
  const uint32_t range = search.hi - search.lo;
  int own = 0;
  row.each([&](int, uint32_t key) { own += key - search.lo <= range; });
  int at = sum_up_to_lane(own, lane);
  if (lane >= __shfl_sync(kFullWarp, at, 31)) candidates[lane] = kAbsent;
  at -= own;
  row.each([&](int, uint32_t key) {
    if (key - search.lo <= range) candidates[at++] = key;
  });
  __syncwarp();
  const Cut cut = rank_cut(candidates, search.m - search.above);
  __syncwarp();  // all have read what the next row overwrites
  return cut;
}

}  // namespace mra::cuda
