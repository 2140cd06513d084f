// Short heads (forward_head.cuh): how the keys of a block weigh under pool = centred, and the means
// that they make.
#pragma once

#include "head_half.cuh"

namespace mra::cuda::sm90 {

// The mean query, columns lane and lane + 32 of this lane; the same for every warp.
template <int DP, class Shared>
__device__ __forceinline__ void mean_query(float (&mean)[DP / 32], const Shared& s,
                                           const HeadBlocks& blocks, int runs) {
  const int lane = threadIdx.x % 32;
  int count = lane < runs ? __popc(s.queries_there[lane]) : 0;
  const int n = __reduce_add_sync(kFullWarp, count);
  if (blocks.shift != 0) count += __shfl_down_sync(kFullWarp, count, 1);
#pragma unroll
  for (int i = 0; i < DP / 32; ++i) mean[i] = 0.f;
#pragma unroll 2
  for (int run = 0; run < runs; run += 1 << blocks.shift) {
    const auto of_block = static_cast<float>(__shfl_sync(kFullWarp, count, run));
#pragma unroll
    for (int i = 0; i < DP / 32; ++i) {
      mean[i] = fmaf(of_block, s.q_mean[run][lane + 32 * i], mean[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < DP / 32; ++i) mean[i] /= static_cast<float>(max(n, 1));
}

// Logit of key `lane` of a run with the mean query, log2 units: rounded to T, and what that lost.
template <typename T, int DP>
__device__ __forceinline__ float logit_of_key(const uint16_t (&keys)[kRun][DP],
                                              const float (&mean)[DP / 32], float scale,
                                              const PanelLane<DP>& panel) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float c[2][4] = {};
  const uint32_t base = smem_address(keys);
#pragma unroll
  for (int k = 0; k < DP / 16; ++k) {
    uint32_t right[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int d = 16 * k + 8 * i + 2 * t;
      float x = __shfl_sync(kFullWarp, mean[d / 32], d % 32);
      float y = __shfl_sync(kFullWarp, mean[d / 32], d % 32 + 1);
      const uint32_t high = Mma<T>::pack(x, y);
      const float2 kept = unpack2(high, T{});
      const uint32_t low = Mma<T>::pack(x - kept.x, y - kept.y);
      right[i] = g == 0 ? high : g == 1 ? low : 0u;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      typename Mma<T>::A a;
      ldmatrix_x4<false>(a.r, base + 16 * half * PanelLane<DP>::kRowBytes + panel.rows(k));
      Mma<T>::product(c[half], a, right[0], right[1]);
    }
  }
  // Columns 0 and 1, which thread 4 g has, of rows g and g + 8.
  float logit = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x =
        __shfl_sync(kFullWarp, c[i / 2][i % 2 * 2] + c[i / 2][i % 2 * 2 + 1], lane % 8 * 4);
    if (lane / 8 == i) logit = x;
  }
  return scale * logit;
}

// Of the logits of some keys, log2 units.
struct RunLogits {
  float top;       // the greatest, -inf where there are none
  float sum;       // of exponentials of what they are below that
  float weighted;  // sum of what they are below that, weighted by these exponentials
  float plain;     // their sum

  // Those of a run, one a lane, -inf where a key does not count; `weight`: its exponential.
  __device__ __forceinline__ RunLogits(float logit, float& weight) {
    top = warp_max(logit);
    const bool counts = logit != -INFINITY;
    const float below = counts ? logit - top : 0.f;
    weight = counts ? exp2_approx(below) : 0.f;
    sum = warp_sum(weight);
    weighted = warp_sum(weight * below);
    plain = warp_sum(counts ? logit : 0.f);
  }
  __device__ __forceinline__ explicit RunLogits(float4 x)
      : top(x.x), sum(x.y), weighted(x.z), plain(x.w) {}
  __device__ __forceinline__ float4 all() const { return make_float4(top, sum, weighted, plain); }

  // Takes in those of another run; by which factor the exponentials of this one have changed.
  __device__ __forceinline__ float add(const RunLogits& other) {
    const float highest = fmaxf(top, other.top);
    if (highest == -INFINITY) return 1.f;
    const float mine = exp2_approx(top - highest), its = exp2_approx(other.top - highest);
    weighted =
        (top == -INFINITY ? 0.f : mine * fmaf(top - highest, sum, weighted)) +
        (other.top == -INFINITY ? 0.f : its * fmaf(other.top - highest, other.sum, other.weighted));
    sum = mine * sum + its * other.sum;
    plain += other.plain;
    top = highest;
    return mine;
  }
};

// Weight of key `lane` of a run within its block, from its logit (-inf where it does not count). To
// shared memory: the weights times the block's count and, by the run that leads, the entropy of the
// block's weights, log2 units, -inf for an empty block, and what its scores are biased by.
template <typename T, class Shared>
__device__ __forceinline__ float weight_of_key(Shared& s, const HeadBlocks& blocks, int run,
                                               float logit, int phase) {
  const int lane = threadIdx.x % 32;
  float weight;
  RunLogits logits(logit, weight);
  int count = __popc(s.keys_there[run]);
  if (blocks.shift != 0) {
    if (lane == 0) s.coarse.of_run[run] = logits.all();
    blocks.meet(run);
    count += __popc(s.keys_there[run ^ 1]);
    weight *= logits.add(RunLogits(s.coarse.of_run[run ^ 1]));
  }
  const float inverse = count == 0 ? 0.f : 1.f / logits.sum, log_sum = log2_approx(logits.sum);
  weight *= inverse;
  if (lane == 0 && blocks.leads(run)) {
    const int y = blocks.of_run(run);
    s.coarse.log_mass[y] = count == 0 ? -INFINITY : log_sum - logits.weighted * inverse;
    const float half_mean = logits.plain / static_cast<float>(max(2 * count, 1));
    s.coarse.score_bias[y] = count == 0 ? 0.f : kLn2 * (0.25f * (logits.top + log_sum) - half_mean);
  }
  const float kept =
      weight * static_cast<float>(count) * kept_weight<T>(s.coarse.most[phase], blocks);
  const float next = __shfl_down_sync(kFullWarp, kept, 1);
  if (lane % 2 == 0) s.coarse.weights[(run * kRun + lane) / 2] = Mma<T>::pack(kept, next);
  return weight;
}

// Weights of a run's keys, one a lane, as left operands: rounded in rows 0 to 7, what that lost in
// rows 8 on.
template <typename T>
__device__ __forceinline__ void as_operands(typename Mma<T>::A (&a)[2], float weight) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = __shfl_sync(kFullWarp, weight, 8 * i + 2 * t);
    const float y = __shfl_sync(kFullWarp, weight, 8 * i + 2 * t + 1);
    const uint32_t high = Mma<T>::pack(x, y);
    const float2 kept = unpack2(high, T{});
    a[i / 2].r[i % 2 * 2] = high;
    a[i / 2].r[i % 2 * 2 + 1] = Mma<T>::pack(x - kept.x, y - kept.y);
  }
}

// Weighted sums of a run.
template <typename T, int DP>
__device__ __forceinline__ float2 weighted_sum(const uint16_t (&rows)[kRun][DP], uint32_t there,
                                               const typename Mma<T>::A (&weights)[2],
                                               const PanelLane<DP>& panel) {
  float sum[DP / 8][4];
  sum_run<T>(sum, rows, there, weights, panel);
#pragma unroll
  for (int n = 0; n < DP / 8; ++n) {
    sum[n][0] += sum[n][2];
    sum[n][1] += sum[n][3];
  }
  return of_column<DP>(sum);
}

// The weights of a run's keys as the mean query says, and the pooled key and value that they make.
template <typename T, int DP, class Shared, class Inputs>
__device__ __forceinline__ void weigh_run(const HeadParams& p, Shared& s, const Inputs& in,
                                          const HeadBlocks& blocks, int run, int phase) {
  const auto panel = panel_here<DP>();
  const int lane = threadIdx.x % 32, x = blocks.of_run(run);
  const uint32_t there = s.keys_there[run];
  float centre[DP / 32];
  mean_query<DP>(centre, s, blocks, Shared::kRows / kRun);
  if (run == 0) {
#pragma unroll
    for (int i = 0; i < DP / 32; ++i) {
      const float next = __shfl_down_sync(kFullWarp, centre[i], 1);
      if (lane % 2 == 0) s.coarse.centre[16 * i + lane / 2] = Mma<T>::pack(centre[i], next);
    }
  }
  float logit = logit_of_key<T>(s.run_of(in.k(), run), centre, p.fine.scale * kLog2e, panel);
  if (!(there >> lane & 1)) logit = -INFINITY;
  const float weight = weight_of_key<T>(s, blocks, run, logit, phase);
  typename Mma<T>::A weights[2];
  as_operands<T>(weights, weight);
  float2 k_mean = weighted_sum<T>(s.run_of(in.k(), run), there, weights, panel);
  barrier_wait(&s.full[2], phase);
  float2 v_mean = weighted_sum<T>(s.run_of(in.v(), run), there, weights, panel);
  if (blocks.shift != 0) {
    if (!blocks.leads(run)) {
      put_pair<DP>(s.coarse.of_second(0, x), v_mean);
      put_pair<DP>(s.coarse.of_second(1, x), k_mean);
    }
    blocks.meet(run);
    if (!blocks.leads(run)) return;
    v_mean = v_mean + get_pair<DP>(s.coarse.of_second(0, x));
    k_mean = k_mean + get_pair<DP>(s.coarse.of_second(1, x));
  }
  round_pair<T>(s.coarse.k, x, k_mean);
  round_pair<T>(s.coarse.v, x, v_mean);
}

}  // namespace mra::cuda::sm90
