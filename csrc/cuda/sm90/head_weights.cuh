// Short heads (forward_head.cuh): how the keys of a block weigh under pool = centred and sampled,
// and the means that they make.
#pragma once

#include "head_logits.cuh"

namespace mra::cuda::sm90 {

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

// Weights of keys 2 p and 2 p + 1 of a run within their block, which are this lane's key and
// another, from the logits of this lane's key (-inf where it does not count). To shared memory: the
// weights times the block's count and, by the run that leads, the entropy of the block's weights,
// log2 units, -inf for an empty block, and what its scores are biased by.
template <typename T, bool kSampled, class Shared>
__device__ __forceinline__ float2 weights_of_pair(Shared& s, const HeadBlocks& blocks, int run,
                                                  const KeyLogits& logit, int phase) {
  const int lane = threadIdx.x % 32;
  float weight, unused;
  RunLogits logits(logit.weight, weight), mean = logits;
  if constexpr (kSampled) mean = RunLogits(logit.mean, unused);
  int count = __popc(s.keys_there[run]);
  if (blocks.shift != 0) {
    if (lane == 0) {
      s.coarse.of_run[run] = logits.all();
      if constexpr (kSampled) s.coarse.of_run_mean[run] = mean.all();
    }
    blocks.meet(run);
    count += __popc(s.keys_there[run ^ 1]);
    weight *= logits.add(RunLogits(s.coarse.of_run[run ^ 1]));
    if constexpr (kSampled) {
      mean.add(RunLogits(s.coarse.of_run_mean[run ^ 1]));
    } else {
      mean = logits;
    }
  }
  const float inverse = count == 0 ? 0.f : reciprocal_approx(logits.sum);
  const float log_sum = log2_approx(logits.sum);
  weight *= inverse;
  if (lane == 0 && blocks.leads(run)) {
    const int y = blocks.of_run(run);
    s.coarse.log_mass[y] = count == 0 ? -INFINITY : log_sum - logits.weighted * inverse;
    const float half_mean = mean.plain / static_cast<float>(max(2 * count, 1));
    const float mean_sum = kSampled ? log2_approx(mean.sum) : log_sum;
    s.coarse.score_bias[y] = count == 0 ? 0.f : kLn2 * (0.25f * (mean.top + mean_sum) - half_mean);
  }
  const float other = __shfl_xor_sync(kFullWarp, weight, 4);
  const bool second = lane / 4 % 2 != 0;
  const float2 pair = second ? make_float2(other, weight) : make_float2(weight, other);
  const float kept = static_cast<float>(count) * kept_weight<T>(s.coarse.most[phase], blocks);
  if (!second) {
    s.coarse.weights[run * (kRun / 2) + lane / 8 * 4 + lane % 4] =
        Mma<T>::pack(pair.x * kept, pair.y * kept);
  }
  return pair;
}

// Weights of a run's keys, a pair a lane, as right operands: rounded in even columns, what that
// lost in odd ones.
template <typename T>
__device__ __forceinline__ void as_operands(uint32_t (&right)[2][2], float2 pair) {
  const int lane = threadIdx.x % 32, odd = lane / 4 % 2;
  const SplitPair<T> split(pair.x, pair.y);
  const uint32_t word = odd ? split.low : split.high;  // both lanes of a pair have it
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // keys 8 i + 2 t
    right[i / 2][i % 2] = __shfl_sync(kFullWarp, word, lane % 4 * 8 + 4 * odd + i);
  }
}

// What backward reads again of a run: the weight of this lane's key, the mass of the block that it
// leads, and from the first one the mean query.
template <int DP, class Shared>
__device__ __forceinline__ void keep_weights(const HeadParams& p, const Shared& s,
                                             const HeadPlace& at, const HeadBlocks& blocks, int run,
                                             const float (&mean)[DP / 32], float weight) {
  const int lane = threadIdx.x % 32, x = blocks.of_run(run);
  const int64_t head = at.key_head(p.fine);
  if (x < p.plan.nk) {
    p.weights[((head * p.plan.nk) << (5 + blocks.shift)) + run * kRun + own_of_32()] = weight;
    if (lane == 0 && blocks.leads(run)) {
      p.mass[head * p.plan.nk + x] = exp2f(s.coarse.log_mass[x]);
    }
  }
#pragma unroll
  for (int i = 0; i < DP / 32; ++i) {
    const int d = lane + 32 * i;
    if (run == 0 && d < p.fine.D) p.centre[head * p.fine.D + d] = mean[i];
  }
}

// The weights of a run's keys, and the pooled key and value that they make.
template <typename T, HeadForm kForm, int DP, class Shared, class Inputs>
__device__ __forceinline__ void weigh_run(const HeadParams& p, Shared& s, const Inputs& in,
                                          const HeadPlace& at, const HeadBlocks& blocks, int run,
                                          int phase) {
  const auto panel = panel_here<DP>();
  const int x = blocks.of_run(run);
  const uint32_t there = s.keys_there[run];
  float centre[DP / 32];
  mean_query<DP>(centre, s, blocks);
  const MeanPairs<T, DP> pairs(centre);
  if (run == 0) pairs.keep(s.coarse.centre);
  constexpr bool kSampled = kForm == HeadForm::sampled;
  KeyLogits logit;
  if constexpr (kSampled) {
    logit = sampled_logits<T, DP>(s, in, run, pairs, p.fine.scale * kLog2e, panel);
  } else {
    logit.mean = logit.weight =
        logit_of_key<T>(s.run_of(in.k(), run), pairs, p.fine.scale * kLog2e, panel);
  }
  if (!(there >> own_of_32() & 1)) logit.mean = logit.weight = -INFINITY;
  const float2 pair = weights_of_pair<T, kSampled>(s, blocks, run, logit, phase);
  const bool keeps = p.weights != nullptr && at.writes_keys;
  if (keeps) {
    keep_weights<DP>(p, s, at, blocks, run, centre, own_of_32() % 2 == 0 ? pair.x : pair.y);
  }
  uint32_t weights[2][2];
  as_operands<T>(weights, pair);
  OwnColumns<DP> k_mean = sum_run<T, false>(s.run_of(in.k(), run), there, weights, panel);
  barrier_wait(&s.full[2], phase);
  OwnColumns<DP> v_mean = sum_run<T, false>(s.run_of(in.v(), run), there, weights, panel);
  if (blocks.shift != 0) {
    if (!blocks.leads(run)) {
      v_mean.put(s.coarse.of_second(0, x));
      k_mean.put(s.coarse.of_second(1, x));
    }
    blocks.meet(run);
    if (!blocks.leads(run)) return;
    v_mean.add(s.coarse.of_second(0, x));
    k_mean.add(s.coarse.of_second(1, x));
  }
  if (keeps) {
    k_mean.write(p.k_mean, at.key_head(p.fine), p.plan.nk, x, p.fine.D);
    v_mean.write(p.v_mean, at.key_head(p.fine), p.plan.nk, x, p.fine.D);
  }
  k_mean.template round<T>(s.coarse.k, x);
  v_mean.template round<T>(s.coarse.v, x);
}

}  // namespace mra::cuda::sm90
