// What the plan kernels share of the selection: order-preserving keys, which pairs exist, in which
// tier they are, and the search for the cut.
#pragma once

#include <cfloat>
#include <climits>

#include "grid.cuh"
#include "plan.h"

namespace mra::cuda {

// Keys order like the scores. Of no score: kAbsent, a pair that does not exist, and kForced, one
// that is taken before any score is looked at.
constexpr uint32_t kAbsent = 0u;
constexpr uint32_t kForced = 0xffffffffu;

// -0 counts as +0 and every NaN as one value above +inf, so that keys lie in
// [0x007fffff, 0xffc00000].
__device__ __forceinline__ uint32_t key_of(float score) {
  uint32_t bits = __float_as_uint(score + 0.f);
  if (score != score) bits = 0x7fc00000u;
  return bits ^ (static_cast<uint32_t>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key ^ (~static_cast<uint32_t>(static_cast<int>(key) >> 31) | 0x80000000u));
}

// common/budget.h, in the same arithmetic.
__device__ __forceinline__ int visible_blocks(const PlanParams& p, int x) {
  if (!p.causal) return p.nk;
  const int64_t last = min((int64_t{x} + 1) * p.block_q, p.N) - 1;
  return static_cast<int>(min(int64_t{p.nk}, last / p.block_k + 1));
}

// Key blocks wholly before query block x: what its coarse part may see.
__device__ __forceinline__ int past_blocks(const PlanParams& p, int x) {
  if (!p.causal) return p.nk;
  return static_cast<int>(min(int64_t{p.nk}, int64_t{x} * p.block_q / p.block_k));
}

__device__ __forceinline__ int row_budget(const PlanParams& p, int h, int x) {
  const int64_t seen = visible_blocks(p, x);
  if (p.blocks_per_row > 0) return static_cast<int>(min(p.blocks_per_row, seen));
  const double density = p.by_head ? p.head_density[h] : p.density;
  const auto m = static_cast<int64_t>(ceil(density * static_cast<double>(seen)));
  return static_cast<int>(min(seen, max(int64_t{1}, m)));
}

// The same without levels: where all rows may take as many, the room for a list.
__device__ __forceinline__ int budget_of(const PlanParams& p, int h, int x) {
  return p.causal || p.by_head ? row_budget(p, h, x) : p.row_capacity;
}

constexpr int kTiers = 5;

__host__ __device__ __forceinline__ bool has_tiers(const PlanParams& p) {
  return p.causal || p.diagonal_reach >= 0 || p.first_blocks > 0;
}

// Of a pair that exists: 4 where the diagonal crosses it, else how many forcing conditions it
// meets.
template <bool kGlobal>
__device__ __forceinline__ int tier_of(const PlanParams& p, int x, int y) {
  const int64_t q_begin = int64_t{x} * p.block_q, k_begin = int64_t{y} * p.block_k;
  const int64_t q_end = q_begin + p.block_q, k_end = k_begin + p.block_k;
  if (p.causal && k_end > q_begin) return 4;
  int tier = y < p.first_blocks;
  if (p.diagonal_reach >= 0) {
    tier += k_begin < q_end + p.diagonal_reach && k_end > q_begin - p.diagonal_reach;
  }
  if (kGlobal) tier += x < p.first_blocks;
  return tier;
}

// From how many pairs each tier has to the tier in which the budget ends.
struct Boundary {
  int take;    // pairs to take in all
  int tier;    // every pair of the higher tiers is taken, and none of the lower ones
  int forced;  // pairs in the higher tiers
  int within;  // pairs in this tier
};

__device__ __forceinline__ Boundary find_boundary(const int (&pairs)[kTiers], int64_t budget) {
  int existing = 0;
#pragma unroll
  for (int t = 0; t < kTiers; ++t) existing += pairs[t];
  Boundary b;
  b.take = static_cast<int>(min(max(budget, int64_t{pairs[4]}), int64_t{existing}));
  b.tier = kTiers;
  b.forced = 0;
  b.within = 0;
#pragma unroll
  for (int t = kTiers - 1; t >= 0; --t) {
    if (b.forced + b.within < b.take) {
      b.forced += b.within;
      b.within = pairs[t];
      b.tier = t;
    }
  }
  return b;
}

// The same where all pairs are in one tier.
__device__ __forceinline__ Boundary whole_boundary(int pairs, int64_t budget) {
  return {static_cast<int>(min(budget, int64_t{pairs})), 0, 0, pairs};
}

// What the keys of a row with this highest one are made relative to, as scores: NaN where one of
// them is NaN, and as the reference -inf stays -inf in a row of nothing else.
__device__ __forceinline__ float relative_to(uint32_t highest) {
  return highest == key_of(NAN) ? NAN : fmaxf(score_of(highest), -FLT_MAX);
}
__device__ __forceinline__ uint32_t relative_key(uint32_t key, float to) {
  return key == kAbsent ? kAbsent : key_of(score_of(key) - to);
}

// The key under the boundary: higher tiers are forced, lower ones absent.
__device__ __forceinline__ uint32_t key_in_tier(uint32_t key, int tier, int boundary) {
  return tier == boundary ? key : tier > boundary ? kForced : kAbsent;
}

// How many pairs a warp takes of row x of a plan by row, whose lanes are its key blocks: which
// exist, and with what keys, which become keys under the boundary.
__device__ __forceinline__ int pairs_of_row(const PlanParams& p, int x, bool exists, int budget,
                                            uint32_t& key) {
  if (!has_tiers(p)) return min(budget, __popc(__ballot_sync(kFullWarp, exists)));
  const int tier = tier_of<false>(p, x, threadIdx.x % 32);
  int pairs[kTiers];
#pragma unroll
  for (int t = 0; t < kTiers; ++t) {
    pairs[t] = __popc(__ballot_sync(kFullWarp, exists && tier == t));
  }
  const Boundary edge = find_boundary(pairs, budget);
  if (exists) key = key_in_tier(key, tier, edge.tier);
  return edge.take;
}

// All keys above `key` are taken, and of those equal to it the first `ties`; INT_MAX: all.
struct Cut {
  uint32_t key;
  int ties;
};

// Search for the m-th largest key, two pivots a round: close on both sides of where the cut would
// be if the scores between lo and hi were spread evenly, or, at first and whenever that has gained
// little, by thirds. From kScoreRounds on it is thirds of the keys, which ends whatever they are.
// It is done as soon as exactly m keys are at or above lo; a few candidates are better ranked
// (rank_cut).
struct Search {
  static constexpr int kScoreRounds = 12;
  uint32_t lo, hi;  // count(key >= lo) >= m > count(key > hi)
  int at_least;     // count(key >= lo)
  int above;        // count(key > hi)
  int m;
  int rounds = 0;
  bool thirds = true;

  __device__ bool done() const { return lo >= hi || at_least == m; }
  __device__ int candidates() const { return at_least - above; }

  // lo < a <= b <= hi
  __device__ void pivots(uint32_t& a, uint32_t& b) {
    a = lo + (hi - lo + 2) / 3;
    b = hi - (hi - lo) / 3;
    if (rounds < kScoreRounds) {
      float middle = 0.5f, margin = 1.f / 6.f;
      if (!thirds) {
        const auto n = static_cast<float>(candidates());
        middle = __fdividef(static_cast<float>(at_least - m), n);
        margin = 1.5f * rsqrtf(n);  // three times what a count of n / 2 spreads by
      }
      const float from = score_of(lo), width = score_of(hi) - from;
      const uint32_t u = key_of(from + (middle - margin) * width);
      const uint32_t v = key_of(from + (middle + margin) * width);
      const bool u_inside = u > lo && u <= hi, v_inside = v > lo && v <= hi;
      if (u_inside || v_inside) {
        a = u_inside ? u : v;
        b = v_inside && v > a ? v : a;
      }
    }
    ++rounds;
  }

  // The counts of keys at or above the pivots.
  __device__ void report(uint32_t a, int at_a, uint32_t b, int at_b) {
    const int before = candidates();
    if (at_b >= m) {
      lo = b;
      at_least = at_b;
    } else {
      hi = b - 1;
      above = at_b;
      if (at_a >= m) {
        lo = a;
        at_least = at_a;
      } else {
        hi = a - 1;
        above = at_a;
      }
    }
    thirds = candidates() > before / 2;
  }

  __device__ Cut cut() const { return at_least == m ? Cut{lo, INT_MAX} : Cut{lo, m - above}; }
};

// n += key > other. Two instructions; the compiler makes three of it.
__device__ __forceinline__ void count_above(int& n, uint32_t key, uint32_t other) {
  asm("{\n.reg .pred p;\nsetp.gt.u32 p, %1, %2;\n@p add.s32 %0, %0, 1;\n}"
      : "+r"(n)
      : "r"(key), "r"(other));
}

constexpr int kRanked = 32;  // candidates that are ranked instead of searched

// The cut at the m-th largest of `candidates` [kRanked], kAbsent where there are fewer; by each
// warp.
__device__ __forceinline__ Cut rank_cut(const uint32_t* candidates, int m) {
  const uint32_t key = candidates[threadIdx.x % 32];
  int higher = 0;
#pragma unroll
  for (int i = 0; i < kRanked / 4; ++i) {
    const uint4 other = reinterpret_cast<const uint4*>(candidates)[i];
    count_above(higher, other.x, key);
    count_above(higher, other.y, key);
    count_above(higher, other.z, key);
    count_above(higher, other.w, key);
  }
  const int equal = __popc(__match_any_sync(kFullWarp, key));
  const bool here = key != kAbsent && higher < m && m <= higher + equal;
  const int lane = max(0, __ffs(static_cast<int>(__ballot_sync(kFullWarp, here))) - 1);
  const int ties = m - higher < equal ? m - higher : INT_MAX;
  return {__shfl_sync(kFullWarp, key, lane), __shfl_sync(kFullWarp, ties, lane)};
}

// Which lanes' keys are taken; `ties` is what is left of the cut's, and goes down.
__device__ __forceinline__ unsigned take_lanes(uint32_t key, uint32_t cut, int& ties) {
  unsigned taken = __ballot_sync(kFullWarp, key > cut);
  const unsigned equal = __ballot_sync(kFullWarp, key == cut);
  if (equal != 0 && ties > 0) {  // the same for the whole warp
    const int lane = threadIdx.x % 32;
    const bool mine = (equal >> lane & 1) != 0 && __popc(equal & ((1u << lane) - 1)) < ties;
    taken |= __ballot_sync(kFullWarp, mine);
    if (ties != INT_MAX) ties -= min(ties, __popc(equal));
  }
  return taken;
}

// The `take` highest keys that the lanes have, as bits; of equal ones those of lower lanes.
__device__ __forceinline__ uint32_t highest_lanes(uint32_t key, int take) {
  uint32_t taken = 0;
#pragma unroll 1
  while (take > 0) {
    const uint32_t top = __reduce_max_sync(kFullWarp, key);
    uint32_t same = __ballot_sync(kFullWarp, key == top);
    const int count = __popc(same);
    for (int more = count - take; more > 0; --more) same ^= 1u << (31 - __clz(same));
    taken |= same;
    take -= count;
    if (key == top) key = kAbsent;
  }
  return taken;
}

// Writes the blocks y of the lanes in `taken` behind `at` entries of a list with room for `room`;
// returns whether this lane's is one of them.
__device__ __forceinline__ bool append(unsigned taken, int y, int32_t* index, int at,
                                       int64_t room) {
  const int lane = threadIdx.x % 32;
  const bool mine = (taken >> lane & 1) != 0;
  const int to = at + __popc(taken & ((1u << lane) - 1));
  if (mine && to < room) index[to] = y;
  return mine;
}

}  // namespace mra::cuda
