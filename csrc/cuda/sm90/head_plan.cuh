// Short heads (forward_head.cuh): scores of pairs of blocks and the selection, a row of pairs a
// warp, and the block-coarse state. The selection is that of the kernels of the stage.
#pragma once

#include "head_pool.cuh"

namespace mra::cuda::sm90 {

// The key of the score of a pair: of a query block and the key block of this lane, which `bias`
// belongs to. Summed up as the kernels of the stage do it.
template <int DP>
__device__ __forceinline__ uint32_t score_key(const float* q, const float* k, float scale,
                                              float bias) {
  float acc = 0.f;
#pragma unroll
  for (int d = 0; d < DP; d += 4) {
    const float4 u = *reinterpret_cast<const float4*>(q + d);
    const float4 w = *reinterpret_cast<const float4*>(k + d);
    acc = fmaf(u.x, w.x, acc);
    acc = fmaf(u.y, w.y, acc);
    acc = fmaf(u.z, w.z, acc);
    acc = fmaf(u.w, w.w, acc);
  }
  return key_of(fmaf(scale, acc, bias));
}

// How many keys of rows first .. first + rows of the map come before that of pair (x, y): higher
// ones, and of equal ones those of lower index.
template <int kRows>
__device__ __forceinline__ int rank_key(const uint32_t (*map)[kHeadRuns], int first, int x, int y,
                                        uint32_t key) {
  int rank = 0;
#pragma unroll
  for (int r = first; r < first + kRows; ++r) {
    const uint32_t above = r < x ? key - 1 : key;
#pragma unroll
    for (int i = 0; i < kHeadRuns / 4; ++i) {
      const uint4 other = reinterpret_cast<const uint4*>(map[r])[i];
      rank += (other.x > above) + (other.y > above) + (other.z > above) + (other.w > above);
    }
  }
  return rank;
}

// How many pairs a head takes of its map, by all warps at once; of row x those whose keys the lanes
// hold, which become keys under the boundary.
template <class Shared>
__device__ __forceinline__ int pairs_of_map(const HeadParams& p, Shared& s, int x, uint32_t& key) {
  const int lane = threadIdx.x % 32;
  const int tier = has_tiers(p.plan) ? tier_of<true>(p.plan, x, lane) : 0;
  const bool exists = key != kAbsent && lane < kHeadRuns;
  int pairs[kTiers];
#pragma unroll
  for (int i = 0; i < kTiers; ++i) {
    pairs[i] = __popc(__ballot_sync(kFullWarp, exists && tier == i));
  }
#pragma unroll
  for (int i = 0; i < kTiers; ++i) {
    if (lane == 0 && pairs[i] > 0) atomicAdd(&s.pairs[i], pairs[i]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTiers; ++i) pairs[i] = s.pairs[i];
  const Boundary edge = find_boundary(pairs, p.budget);
  if (key != kAbsent) key = key_in_tier(key, tier, edge.tier);
  return edge.take;
}

// The blocks that query block x takes, as bits, by the warp of a run of it, which has the key of
// its lane's pair; written as the block's list for the run that leads. Global selection: by all
// warps at once, with barriers.
template <bool kGlobal, class Shared>
__device__ __forceinline__ uint32_t select_blocks(const HeadParams& p, Shared& s,
                                                  const typename Shared::At& at, int run, int x,
                                                  bool leads, uint32_t key) {
  constexpr int kRuns = Shared::kRows / kRun;
  const PlanParams& plan = p.plan;
  const int lane = threadIdx.x % 32, y = lane % kHeadRuns;
  // Of a map it is read before the barriers, else where it is needed: measured in registers.
  int64_t known = 0;
  if constexpr (kGlobal) known = at.head;
  const auto head = [&]() -> int64_t { return kGlobal ? known : at.head; };
  if (kGlobal) key = relative_key(key, relative_to(__reduce_max_sync(kFullWarp, key)));
  uint32_t taken;
  if constexpr (kGlobal) {
    const int take = pairs_of_map(p, s, x, key);
    // Every lane counts for the pair of lane y in half of the rows.
    if (lane < kHeadRuns) s.map[run][lane] = key;
    key = __shfl_sync(kFullWarp, key, y);
    const uint32_t same = __match_any_sync(kFullWarp, key);
    __syncthreads();
    int part = rank_key<kRuns / 2>(s.map, lane / kHeadRuns * (kRuns / 2), x, y, key);
    part += __shfl_xor_sync(kFullWarp, part, kHeadRuns);
    const int rank = part + __popc(same & ((1u << y) - 1));
    taken = __ballot_sync(kFullWarp, lane < kHeadRuns && key != kAbsent && rank < take);
  } else {
    const bool exists = key != kAbsent && lane < kHeadRuns;
    const int take = pairs_of_row(plan, x, exists, at.budget, key);
    taken = highest_lanes(lane < kHeadRuns ? key : kAbsent, take);
  }
  const int count = __popc(taken), capacity = plan.nq * plan.row_capacity;
  int start = x * plan.row_capacity, end = start + plan.row_capacity;
  if (kGlobal) {
    if (lane == 0) s.taken[x] = taken;
    __syncthreads();
    start = __reduce_add_sync(kFullWarp, lane < x ? __popc(s.taken[lane]) : 0);
    end = capacity;
  }
  if (x < plan.nq && leads) {
    int32_t* const index = plan.index + head() * capacity;
    append(taken, lane, index, start, end);
    if (!kGlobal || x == plan.nq - 1) {
      for (int i = start + count + lane; i < end; i += 32) index[i] = 0;
    }
    if (lane == 0) {
      plan.start[head() * plan.nq + x] = start;
      plan.count[head() * plan.nq + x] = count;
    }
  }
  return taken;
}

// Which block to go on with behind block x: that with as few key blocks as x has many, so that
// warps which take half of the rows of both have about the same to do.
__device__ __forceinline__ int evened_out(const uint32_t* taken, int blocks, int x) {
  const int lane = threadIdx.x % 32, count = lane < blocks ? __popc(taken[lane]) : -1;
  int place = 0;  // of block `lane`, most key blocks first
  for (int i = 0; i < blocks; ++i) {
    const int other = __shfl_sync(kFullWarp, count, i);
    place += other > count || (other == count && i < lane);
  }
  const int wanted = blocks - 1 - __shfl_sync(kFullWarp, place, x);
  return max(0, __ffs(static_cast<int>(__ballot_sync(kFullWarp, place == wanted))) - 1);
}

// The block-coarse state of a run's query block: softmax over the blocks that are left, the mean of
// their values. `key`: of the score of this lane's pair.
template <int DP, class Shared>
__device__ __forceinline__ void make_state(Shared& s, const HeadBlocks& blocks, int run, int nk,
                                           uint32_t key, bool left) {
  constexpr int kColumns = DP / 32;  // of a lane
  const int lane = threadIdx.x % 32;
  const float score = left ? score_of(key) : -INFINITY;
  float top = score_of(__reduce_max_sync(kFullWarp, key_of(score)));
  if (top == -INFINITY) top = 0.f;
  int count = 0;
  if (lane < nk) {
    count = __popc(s.keys_there[blocks.lead(lane)]);
    if (blocks.shift != 0) count += __popc(s.keys_there[blocks.lead(lane) + 1]);
  }
  const float weight = static_cast<float>(count) * exp2_approx((score - top) * kLog2e);
  const float sum = warp_sum(weight);
  const bool any = !(sum == 0.f);  // NaN in, NaN out
  float mean[kColumns] = {};
#pragma unroll 4
  for (int y = 0; y < nk; ++y) {
    const float w = __shfl_sync(kFullWarp, weight, y);
    const float* const of_block = s.coarse.v_mean[blocks.lead(y)] + lane;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) mean[i] = fmaf(w, of_block[32 * i], mean[i]);
  }
  const float inverse = any ? 1.f / sum : 0.f;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) s.coarse.state_mean[run][lane + 32 * i] = mean[i] * inverse;
  if (lane == 0) s.coarse.state_lse[run] = any ? top + log2_approx(sum) * kLn2 : -INFINITY;
}

// The row of scores of a run's query block: the key of this lane's pair, kAbsent where there is no
// such pair.
template <HeadForm kForm, int DP, class Shared>
__device__ __forceinline__ uint32_t score_run(const HeadParams& p, const Shared& s, int run,
                                              const HeadBlocks& blocks) {
  constexpr int kRuns = Shared::kRows / kRun;
  const int y = threadIdx.x % 32 % kHeadRuns;
  const int lead_q = blocks.lead(blocks.of_run(run)), lead_k = blocks.lead(y) % kRuns;
  uint32_t queries = s.queries_there[lead_q], keys = s.keys_there[lead_k];
  if (blocks.shift != 0) {
    queries |= s.queries_there[lead_q + 1];
    keys |= s.keys_there[lead_k + 1];
  }
  float bias = 0.f;
  if constexpr (is_weighted(kForm)) bias = s.coarse.score_bias[y];
  const uint32_t key = score_key<DP>(s.q_mean[lead_q], s.k_mean[lead_k], p.plan.scale, bias);
  return queries != 0 && y < p.plan.nk && keys != 0 ? key : kAbsent;
}

}  // namespace mra::cuda::sm90
