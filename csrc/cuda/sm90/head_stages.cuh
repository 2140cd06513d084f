// What each warp of forward_head.cuh does of the stages before the attention itself. What it
// computes is what the kernels of a stage compute: means and scores in the same order, so that they
// have the same bits (pool_fwd.cu, plan_scores.cuh), and the same selection.
#pragma once

#include "../block_sum.cuh"
#include "../head.h"
#include "../plan_block.cuh"
#include "warp_products.cuh"

namespace mra::cuda::sm90 {

constexpr int kHeadBlock = 32;  // rows

// kWarps: the most blocks of queries, and of keys.
template <int kWarps>
struct HeadShared {
  static constexpr int kRows = kHeadBlock * kWarps;
  static_assert(kWarps <= kHeadBlocks && kHeadBlocks == 16, "half a warp has a row of pairs");
  // Rows of four words more than 64: eight lanes that read 16 bytes of eight rows hit all banks.
  using Means = float[kWarps][64 + 4];
  struct Inputs {
    uint16_t q[kRows][64], k[kRows][64], v[kRows][64];
  } in;
  Means q_mean, k_mean, v_mean;
  alignas(16) float state_mean[kWarps][64];
  alignas(16) uint32_t map[kWarps][kHeadBlocks];  // keys of scores
  float state_lse[kWarps];
  uint32_t taken[kWarps];       // bit y: query block x takes key block y
  uint32_t keys_there[kWarps];  // bit r: key r of the block counts
  int pairs[kTiers];
  int queries_read;  // warps that are done with q
  uint64_t full[3];  // q, k, v
};

// Whether this warp is the last of `warps` to come here; the counter is then at zero again.
__device__ __forceinline__ bool last_to_leave(int& counter, int warps) {
  __syncwarp();
  int before = 0;
  if (threadIdx.x % 32 == 0) {
    __threadfence_block();
    before = atomicAdd(&counter, 1);
    if (before == warps - 1) counter = 0;
  }
  return __shfl_sync(kFullWarp, before, 0) == warps - 1;
}

// The mean of a block's 32 rows, by one warp: to `mean`, zeros beyond D, and, unless null, to
// `out`. `rows` are in the tensor, those whose mask is 0 don't count; bit r of the result: row r
// does. kLanes share a row.
template <typename T, int kLanes>
__device__ __forceinline__ uint32_t pool_block(const uint16_t (*block)[64], int rows,
                                               const uint8_t* mask, float* mean, float* out,
                                               int D) {
  const int lane = threadIdx.x % 32, chunk = lane % kLanes;
  const bool counts = lane < rows && (mask == nullptr || mask[lane]);
  const uint32_t there = __ballot_sync(kFullWarp, counts);
  float sum[8] = {};
#pragma unroll
  for (int i = 0; i < kHeadBlock; i += 32 / kLanes) {
    const int r = i + lane / kLanes;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (there >> r & 1) bits = *reinterpret_cast<const uint4*>(&block[r][(chunk ^ r % 8) * 8]);
    float v[8];
    unpack16<T>(bits, v);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] += v[e];
  }
  scatter_sums<kLanes>(sum);
  const auto count = static_cast<float>(max(__popc(there), 1));
  constexpr int kKept = kept<8, kLanes>;
  const int column = chunk * 8 + first_kept<8, kLanes>();
#pragma unroll
  for (int e = 0; e < kKept; ++e) sum[e] /= count;
  store_values<kKept>(mean + column, sum);
  if (out != nullptr && column < D) store_values<kKept>(out + column, sum);
  if (kLanes < 8) mean[32 + lane] = 0.f;
  return there;
}

template <typename T>
__device__ __forceinline__ uint32_t pool_block(const uint16_t (*block)[64], int rows,
                                               const uint8_t* mask, float* mean, float* out,
                                               int D) {
  return D > 32 ? pool_block<T, 8>(block, rows, mask, mean, out, D)
                : pool_block<T, 4>(block, rows, mask, mean, out, D);
}

// The key of the score of a pair: of query block x and the block of this lane.
__device__ __forceinline__ uint32_t score_key(const float* q, const float* k, float scale) {
  float acc = 0.f;
#pragma unroll 4
  for (int d = 0; d < 64; d += 4) {
    const float4 u = *reinterpret_cast<const float4*>(q + d);
    const float4 w = *reinterpret_cast<const float4*>(k + d);
    acc = fmaf(u.x, w.x, acc);
    acc = fmaf(u.y, w.y, acc);
    acc = fmaf(u.z, w.z, acc);
    acc = fmaf(u.w, w.w, acc);
  }
  return key_of(scale * acc);
}

// How many keys of rows first .. first + rows of the map come before that of pair (x, y): higher
// ones, and of equal ones those of lower index.
template <int kRows>
__device__ __forceinline__ int rank_key(const uint32_t (*map)[kHeadBlocks], int first, int x, int y,
                                        uint32_t key) {
  int rank = 0;
#pragma unroll
  for (int r = first; r < first + kRows; ++r) {
    const uint32_t above = r < x ? key - 1 : key;
#pragma unroll
    for (int i = 0; i < kHeadBlocks / 4; ++i) {
      const uint4 other = reinterpret_cast<const uint4*>(map[r])[i];
      rank += (other.x > above) + (other.y > above) + (other.z > above) + (other.w > above);
    }
  }
  return rank;
}

// The blocks that query block x takes, as bits, by its warp, which has the key of its lane's pair;
// written as its list. Global selection: by all warps, with barriers.
template <bool kGlobal, int kWarps>
__device__ __forceinline__ uint32_t select_blocks(const HeadParams& p, HeadShared<kWarps>& s,
                                                  int64_t head, int x, uint32_t key) {
  const PlanParams& plan = p.plan;
  const int lane = threadIdx.x % 32, y = lane % kHeadBlocks;
  if (kGlobal) key = relative_key(key, __reduce_max_sync(kFullWarp, key));
  int tier = 0;
  if (has_tiers(plan)) {
    tier = kGlobal ? tier_of<true>(plan, x, lane) : tier_of<false>(plan, x, lane);
  }
  int pairs[kTiers];
#pragma unroll
  for (int i = 0; i < kTiers; ++i) {
    pairs[i] = __popc(__ballot_sync(kFullWarp, key != kAbsent && tier == i));
  }
  if (kGlobal) {
#pragma unroll
    for (int i = 0; i < kTiers; ++i) {
      if (lane == 0 && pairs[i] > 0) atomicAdd(&s.pairs[i], pairs[i]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTiers; ++i) pairs[i] = s.pairs[i];
  }
  const Boundary edge = find_boundary(pairs, p.budget);
  if (key != kAbsent) key = key_in_tier(key, tier, edge.tier);
  if (lane < kHeadBlocks) s.map[x][lane] = key;

  // Every lane counts for the pair of lane y: in global selection half of the rows each.
  key = __shfl_sync(kFullWarp, key, y);
  const uint32_t same = __match_any_sync(kFullWarp, key);
  int rank = __popc(same & ((1u << y) - 1));
  if (kGlobal) {
    __syncthreads();
    int part = rank_key<kWarps / 2>(s.map, lane / kHeadBlocks * (kWarps / 2), x, y, key);
    rank += part + __shfl_xor_sync(kFullWarp, part, kHeadBlocks);
  } else {
    __syncwarp();
    rank += rank_key<1>(s.map, x, x, y, key);
  }
  const uint32_t taken =
      __ballot_sync(kFullWarp, lane < kHeadBlocks && key != kAbsent && rank < edge.take);
  const int count = __popc(taken), capacity = plan.nq * plan.row_capacity;
  int start = x * plan.row_capacity, end = start + plan.row_capacity;
  if (kGlobal) {
    if (lane == 0) s.taken[x] = taken;
    __syncthreads();
    start = __reduce_add_sync(kFullWarp, lane < x ? __popc(s.taken[lane]) : 0);
    end = capacity;
  }
  if (x < plan.nq) {
    int32_t* const index = plan.index + head * capacity;
    append(taken, lane, index, start, end);
    if (!kGlobal || x == plan.nq - 1) {
      for (int i = start + count + lane; i < end; i += 32) index[i] = 0;
    }
    if (lane == 0) {
      plan.start[head * plan.nq + x] = start;
      plan.count[head * plan.nq + x] = count;
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

// The block-coarse state of query block x, by its warp: softmax over the blocks that are left, the
// mean of their values. `key`: of the score of this lane's pair.
template <int kWarps>
__device__ __forceinline__ void make_state(HeadShared<kWarps>& s, int x, int nk, uint32_t key,
                                           bool left) {
  const int lane = threadIdx.x % 32;
  const float score = left ? score_of(key) : -INFINITY;
  float top = score_of(__reduce_max_sync(kFullWarp, key_of(score)));
  if (top == -INFINITY) top = 0.f;
  const int count = lane < nk ? __popc(s.keys_there[lane]) : 0;
  const float weight = static_cast<float>(count) * exp2_approx((score - top) * kLog2e);
  float sum = weight;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  const bool any = !(sum == 0.f);  // NaN in, NaN out
  float2 mean = make_float2(0.f, 0.f);
#pragma unroll 4
  for (int y = 0; y < nk; ++y) {
    const float w = __shfl_sync(kFullWarp, weight, y);
    const float2 v = *reinterpret_cast<const float2*>(&s.v_mean[y][2 * lane]);
    mean.x = fmaf(w, v.x, mean.x);
    mean.y = fmaf(w, v.y, mean.y);
  }
  const float inverse = any ? 1.f / sum : 0.f;
  *reinterpret_cast<float2*>(&s.state_mean[x][2 * lane]) =
      make_float2(mean.x * inverse, mean.y * inverse);
  if (lane == 0) s.state_lse[x] = any ? top + logf(sum) : -INFINITY;
}

// Scores of a block -> logits in log2 units, -inf for keys whose bit is not set.
__device__ __forceinline__ void to_logits(float (&c)[4][4], uint32_t there, float scale) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c[n][i] = there >> (8 * n + 2 * t + i % 2) & 1 ? c[n][i] * scale : -INFINITY;
    }
  }
}

// A warp's 16 rows of accumulators to memory: four lanes that share a row trade columns until each
// has 16 bytes that lie together. `present` of the rows are there.
template <typename T>
__device__ __forceinline__ void store_rows(T* out, int64_t stride, int present, int D,
                                           const float (&acc)[8][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[i] = Mma<T>::pack(acc[j + i][2 * half], acc[j + i][2 * half + 1]);
      }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const bool upper = t & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i & step) continue;
          const uint32_t got = __shfl_xor_sync(kFullWarp, upper ? w[i] : w[i + step], step);
          if (upper) {
            w[i] = got;
          } else {
            w[i + step] = got;
          }
        }
      }
      const int row = g + 8 * half, column = (j + t) * 8;
      if (row < present && column < D) {
        *reinterpret_cast<uint4*>(out + row * stride + column) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
}

}  // namespace mra::cuda::sm90
