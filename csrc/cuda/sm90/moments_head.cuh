// The other stages before fine, where a block of threads of the moments' kernel has all keys of a
// head (WholeHead): means of the queries and their centre before the keys, the plan and the
// centre's products with C and Sigma behind them. Means, scores and selection have the bits that
// the kernels of the stages give them.
#pragma once

#include "../centred.cuh"
#include "../plan_select.cuh"
#include "../pool_rows.cuh"
#include "moments_weights.cuh"

namespace mra::cuda::sm90 {

// Means of the head's queries, by all warps; their counts to `counts` too. A barrier has to follow.
template <typename T, int kDim>
__device__ __forceinline__ void pool_queries(const Moments& p, int head, int b, int h,
                                             int32_t* counts) {
  const PoolTensor& t = p.whole.query;
  const int window = pool_window_rows<kDim / 8>(t.log2_block);
  for (int x = warp_index(); x < t.n; x += blockDim.x / 32) {
    pool_rows<T, kDim / 8, false>(t, p.D, head, b, h, int64_t{x} * window, window, counts);
  }
}

// The mean query, to `centre` [DP] and memory, by all threads; as sample_queries makes it. sums:
// room. A barrier has to follow.
template <int DP>
__device__ __forceinline__ void find_centre(const Moments& p, int head, const int32_t* counts,
                                            float4 (&sums)[kShortHeadThreads], float* centre) {
  const int nq = p.whole.query.n;
  int n = 0;
  for (int x = threadIdx.x % 32; x < nq; x += 32) n += counts[x];
  n = __reduce_add_sync(kFullWarp, n);
  const Turns<kShortHeadThreads> own(p.D / 4);
  const float4* const mean = reinterpret_cast<const float4*>(p.whole.query.mean) +
                             static_cast<int64_t>(head) * nq * own.quads + own.quad;
  float4 sum = own.sum(sums, nq, [&](int x) {
    const float4 u = mean[x * own.quads];
    const float c = static_cast<float>(counts[x]);
    return make_float4(c * u.x, c * u.y, c * u.z, c * u.w);
  });
  if (own.turn == 0) {
    const float over_n = 1.f / static_cast<float>(max(n, 1));
    sum = make_float4(sum.x * over_n, sum.y * over_n, sum.z * over_n, sum.w * over_n);
    reinterpret_cast<float4*>(centre)[own.quad] = sum;
    float* const to = p.whole.centre + static_cast<int64_t>(head) * p.D;
    reinterpret_cast<float4*>(to)[own.quad] = sum;
  }
  if (threadIdx.x >= p.D && threadIdx.x < DP) centre[threadIdx.x] = 0.f;
}

// The centre times C and times Sigma, which are in memory, by the threads that multiply.
template <int kDim>
__device__ __forceinline__ void multiply_centre(const Moments& p, int head, const float* centre) {
  const int column = threadIdx.x;
  if (column >= 2 * kDim) return;
  const auto* const from = static_cast<const __nv_bfloat16*>(p.matrices) +
                           (static_cast<int64_t>(head) * 2 + column / kDim) * kDim * kDim +
                           column % kDim;
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < kDim; ++e) sum = fmaf(centre[e], to_float(from[e * kDim]), sum);
  p.whole.centre_term[static_cast<int64_t>(head) * 2 * kDim + column] = sum;
}

// Means of the blocks of a head, for its plan.
template <int kDim>
struct PlanMeans {
  static constexpr int kPitch = kDim + 4;  // 16 bytes of eight rows lie in all banks
  float key[kWholeKeyBlocks][kPitch];
  float query[kWholeQueryBlocks][kPitch];
};

// The lists of the head, by kWarps warps that have a barrier of their own. Counts: of its blocks.
template <int kDim, int kWarps, class Sync>
__device__ __forceinline__ void plan_head(const Moments& p, int head, PlanMeans<kDim>& s,
                                          const int32_t* q_count, const int32_t* k_count,
                                          const Sync& sync) {
  const PlanParams& plan = p.whole.plan;
  const int lane = threadIdx.x % 32, warp = warp_index();
  const int budget = budget_of(plan, head % plan.H, 0);  // of every row
  const auto load = [&](float(*to)[PlanMeans<kDim>::kPitch], const float* from, int rows) {
    from += static_cast<int64_t>(head) * rows * p.D;
    for (int i = threadIdx.x; i < rows * (kDim / 4); i += 32 * kWarps) {
      const int row = i / (kDim / 4), d = i % (kDim / 4) * 4;
      float4 x{};
      if (d < p.D) x = *reinterpret_cast<const float4*>(from + row * p.D + d);
      *reinterpret_cast<float4*>(&to[row][d]) = x;
    }
  };
  load(s.query, plan.q_mean, plan.nq);
  load(s.key, plan.k_mean, plan.nk);
  sync();

  const bool has_key = lane < plan.nk && k_count[lane] > 0;
  const float bias = plan.key_bias != nullptr && lane < plan.nk
                         ? plan.key_bias[static_cast<int64_t>(head) * plan.nk + lane]
                         : 0.f;
  constexpr int kRows = 4;  // at once
#pragma unroll 1
  for (int x0 = kRows * warp; x0 < plan.nq; x0 += kRows * kWarps) {
    float acc[kRows] = {};
#pragma unroll 4
    for (int d = 0; d < kDim; d += 4) {
      const float4 key = *reinterpret_cast<const float4*>(&s.key[lane][d]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 query = *reinterpret_cast<const float4*>(&s.query[x0 + i][d]);
        acc[i] = fmaf(query.x, key.x, acc[i]);
        acc[i] = fmaf(query.y, key.y, acc[i]);
        acc[i] = fmaf(query.z, key.z, acc[i]);
        acc[i] = fmaf(query.w, key.w, acc[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int x = x0 + i;
      if (x >= plan.nq) break;
      const bool exists = has_key && q_count[x] > 0;
      uint32_t key = exists ? key_of(fmaf(plan.scale, acc[i], bias)) : kAbsent;
      const int take = pairs_of_row(plan, x, exists, budget, key);
      const uint32_t taken = highest_lanes(key, take);
      const int64_t list = static_cast<int64_t>(head) * plan.nq + x;
      int32_t* const index = plan.index + list * plan.row_capacity;
      append(taken, lane, index, 0, plan.row_capacity);
      for (int j = __popc(taken) + lane; j < plan.row_capacity; j += 32) index[j] = 0;
      if (lane == 0) {
        plan.start[list] = x * plan.row_capacity;
        plan.count[list] = __popc(taken);
      }
    }
  }
}

}  // namespace mra::cuda::sm90
