// Short heads (forward_head.cuh): logits of the keys with the mean query, and with a sample of
// queries.
#pragma once

#include "../centred_logits.cuh"
#include "head_half.cuh"

namespace mra::cuda::sm90 {

// The mean query, columns lane and lane + 32 of this lane; the same for every warp.
template <int DP, class Shared>
__device__ __forceinline__ void mean_query(float (&mean)[DP / 32], const Shared& s,
                                           const HeadBlocks& blocks) {
  constexpr int kRuns = Shared::kRows / kRun;
  const int lane = threadIdx.x % 32;
  int count = lane < kRuns ? __popc(s.queries_there[lane]) : 0;
  const int n = __reduce_add_sync(kFullWarp, count);
  if (blocks.shift != 0) {
    const int next = __shfl_down_sync(kFullWarp, count, 1);
    count = blocks.leads(lane) ? count + next : 0;
  }
  const float share = __fdividef(static_cast<float>(count), static_cast<float>(max(n, 1)));
#pragma unroll
  for (int i = 0; i < DP / 32; ++i) mean[i] = 0.f;
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const float of_block = __shfl_sync(kFullWarp, share, run);
#pragma unroll
    for (int i = 0; i < DP / 32; ++i) {
      mean[i] = fmaf(of_block, s.q_mean[run][lane + 32 * i], mean[i]);
    }
  }
}

// The mean query, rounded to T, and what that lost: pairs of columns, one word of either a lane, or
// with 32 columns one in all.
template <typename T, int DP>
struct MeanPairs {
  uint32_t words[DP / 32];

  __device__ __forceinline__ explicit MeanPairs(const float (&mean)[DP / 32]) {
    const int lane = threadIdx.x % 32, from = 2 * lane % 32;
    float x = __shfl_sync(kFullWarp, mean[0], from);
    float y = __shfl_sync(kFullWarp, mean[0], from + 1);
    if constexpr (DP == 64) {
      const float u = __shfl_sync(kFullWarp, mean[1], from);
      const float w = __shfl_sync(kFullWarp, mean[1], from + 1);
      if (lane >= 16) x = u, y = w;
    }
    const SplitPair<T> pair(x, y);
    words[0] = DP == 64 || lane < 16 ? pair.high : pair.low;
    if constexpr (DP == 64) words[1] = pair.low;
  }
  // Pair `lane` of what is rounded.
  __device__ __forceinline__ void keep(uint32_t (&to)[DP / 2]) const {
    const int lane = threadIdx.x % 32;
    if (lane < DP / 2) to[lane] = words[0];
  }
  // Right operand of columns 16 k on: rounded in even columns of the product, what that lost in odd
  // ones.
  __device__ __forceinline__ void operand(uint32_t (&right)[2], int k) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pair = 8 * k + 4 * i + t;
      if constexpr (DP == 64) {
        const uint32_t high = __shfl_sync(kFullWarp, words[0], pair);
        const uint32_t low = __shfl_sync(kFullWarp, words[1], pair);
        right[i] = g % 2 == 0 ? high : low;
      } else {
        right[i] = __shfl_sync(kFullWarp, words[0], g % 2 * 16 + pair);
      }
    }
  }
};

// Logit of this lane's key of a run with the mean query, log2 units.
template <typename T, int DP>
__device__ __forceinline__ float logit_of_key(const uint16_t (&keys)[kRun][DP],
                                              const MeanPairs<T, DP>& mean, float scale,
                                              const PanelLane<DP>& panel) {
  float c[2][4] = {};
  const uint32_t base = smem_address(keys);
#pragma unroll
  for (int k = 0; k < DP / 16; ++k) {
    uint32_t right[2];
    mean.operand(right, k);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      typename Mma<T>::A a;
      ldmatrix_x4<false>(a.r, base + 16 * half * PanelLane<DP>::kRowBytes + panel.rows(k));
      Mma<T>::product(c[half], a, right[0], right[1]);
    }
  }
  float logits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) logits[i] = c[i / 2][i % 2 * 2] + c[i / 2][i % 2 * 2 + 1];
  return scale * own_of_32(logits);
}

// Of one key, log2 units; the second up to what a block has in common.
struct KeyLogits {
  float mean, weight;  // logit with the mean query; log weight
};

// Lane i: the query of the head that is row i of the sample, and what goes with its lse; +inf where
// there is no such row.
struct SampledQuery {
  int row;
  float offset;

  template <class Shared>
  __device__ __forceinline__ SampledQuery(const Shared& s, int runs) {
    const int lane = threadIdx.x % 32, t = lane - kMeanRows;
    // Valid ones to the run's end.
    const int upto = sum_up_to_lane(lane < runs ? __popc(s.queries_there[lane]) : 0, lane);
    const int n = __shfl_sync(kFullWarp, upto, 31), r = min(n, kSampledQueries);
    const bool there = 0 <= t && t < r;
    const int rank = !there ? 0 : n > r ? (2 * t + 1) * n / (2 * r) : t;
    int run = 0, left = rank;
    for (int i = 0; i + 1 < runs; ++i) {
      const int end = __shfl_sync(kFullWarp, upto, i);
      if (end <= rank) run = i + 1, left = rank - end;
    }
    const uint32_t bits = s.queries_there[run];
    int at = 0;
#pragma unroll
    for (int width = 16; width > 0; width /= 2) {
      const int below = __popc(bits >> at & ((1u << width) - 1));
      if (left >= below) left -= below, at += width;
    }
    row = there ? kRun * run + at : 0;
    offset = lane == 0              ? -log2_approx(static_cast<float>(max(r, 1)) / 4)
             : lane < kMeanRows + r ? 0.f
                                    : INFINITY;
  }
};

constexpr int kSampleTiles = kSampleRows / 8;
// Of 32 keys with the sample: of keys g and g + 8 of each half, columns 2 t and 2 t + 1 of a tile.
using SampleProducts = float[2][kSampleTiles][4];
// One value a column of those of a thread.
using OfColumns = float[kSampleTiles][2];

// Products of the keys of a run with the sample.
template <typename T, int DP, class Shared, class Inputs>
__device__ __forceinline__ void multiply_sample(SampleProducts& c, const Shared& s,
                                                const Inputs& in, int run,
                                                const SampledQuery& query,
                                                const MeanPairs<T, DP>& mean,
                                                const PanelLane<DP>& panel) {
  const int lane = threadIdx.x % 32, g = lane / 4;
  const uint32_t keys = smem_address(s.run_of(in.k(), run));
#pragma unroll
  for (int j = 0; j < DP / 32; ++j) {
    uint32_t words[kSampleTiles][4];
#pragma unroll
    for (int n = 0; n < kSampleTiles; ++n) {
      const int row = __shfl_sync(kFullWarp, query.row, 8 * n + lane % 8);
      const bool there = __shfl_sync(kFullWarp, query.offset, 8 * n + g) != INFINITY;
      const int chunk = swizzled<DP>(4 * j + lane / 8, row);
      ldmatrix_x4<false>(words[n], smem_address(&in.q()[row][8 * chunk]));
#pragma unroll
      for (uint32_t& word : words[n]) word = there ? word : 0u;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = 2 * j + i;
      uint32_t of_mean[2];
      mean.operand(of_mean, k);
      if (g < 2) words[0][2 * i] = of_mean[0], words[0][2 * i + 1] = of_mean[1];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        typename Mma<T>::A a;
        ldmatrix_x4<false>(a.r, keys + 16 * half * PanelLane<DP>::kRowBytes + panel.rows(k));
#pragma unroll
        for (int n = 0; n < kSampleTiles; ++n) {
          Mma<T>::product(c[half][n], a, words[n][2 * i], words[n][2 * i + 1]);
        }
      }
    }
  }
}

// Logits of a run -> exponentials of what they are below the greatest of their column, `top`; that
// and the sum of these go to `to`.
__device__ __forceinline__ void to_exponentials(SampleProducts& c, OfColumns& top, float2* to) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kSampleTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float highest = kLowest, sum = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) highest = fmaxf(highest, c[i / 2][n][i % 2 * 2 + e]);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, step));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = c[i / 2][n][i % 2 * 2 + e];
        sum += x = exp2_approx(x - highest);
      }
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
      top[n][e] = highest;
      if (g == 0) to[8 * n + 2 * t + e] = make_float2(highest, sum);
    }
  }
}

// The lse of row lane % 16 of the sample over all keys, from what the runs have left.
template <class Shared>
__device__ __forceinline__ float lse_of_sample(Shared& s, int runs) {
  static_assert(kSampleRows == 16, "half a warp has a row each");
  const int lane = threadIdx.x % 32;
  float2 all = make_float2(kLowest, 0.f);  // of every second run
  const auto add = [&](float2 part) {
    const float higher = fmaxf(all.x, part.x);
    all.y = all.y * exp2_approx(all.x - higher) + part.y * exp2_approx(part.x - higher);
    all.x = higher;
  };
#pragma unroll 4
  for (int i = lane / 16; i < runs; i += 2) add(s.coarse.of_sample(i)[lane % 16]);
  add(make_float2(__shfl_xor_sync(kFullWarp, all.x, 16), __shfl_xor_sync(kFullWarp, all.y, 16)));
  return all.y > 0.f ? all.x + log2_approx(all.y) : 0.f;
}

// Log weights of keys g, g + 8, g + 16 and g + 24 of a run, from to_exponentials and the lse of
// each row of the sample, one a lane. What is too small for a run is 2^-123 of its greatest.
__device__ __forceinline__ void to_log_weights(float (&weight)[4], const SampleProducts& c,
                                               const OfColumns& top, float lse) {
  const int t = threadIdx.x % 4;
  OfColumns factor;
  float most = -INFINITY;
#pragma unroll
  for (int n = 0; n < kSampleTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      factor[n][e] = top[n][e] - __shfl_sync(kFullWarp, lse, 8 * n + 2 * t + e);
      most = fmaxf(most, factor[n][e]);
    }
  }
  most = quad_max(most);
#pragma unroll
  for (int n = 0; n < kSampleTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) factor[n][e] = exp2_approx(factor[n][e] - most);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < kSampleTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) sum = fmaf(c[i / 2][n][i % 2 * 2 + e], factor[n][e], sum);
    }
    weight[i] = most + log2_approx(fmaxf(quad_sum(sum), 0x1p-123f));
  }
}

// Logits of this lane's key of a run as the sample of queries makes them. All warps call this.
template <typename T, int DP, class Shared, class Inputs>
__device__ __forceinline__ KeyLogits sampled_logits(Shared& s, const Inputs& in, int run,
                                                    const MeanPairs<T, DP>& mean, float scale,
                                                    const PanelLane<DP>& panel) {
  constexpr int kRuns = Shared::kRows / kRun;
  const int g = threadIdx.x % 32 / 4;
  const SampledQuery query(s, kRuns);
  SampleProducts c = {};
  multiply_sample<T, DP>(c, s, in, run, query, mean, panel);
  const uint32_t there = s.keys_there[run];
  float logits[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t bits = there >> (16 * half + g);
    const bool counts[2] = {(bits & 1) != 0, (bits >> 8 & 1) != 0};
    to_sample_logits(c[half], scale, counts);
    logits[2 * half] = c[half][0][0];
    logits[2 * half + 1] = c[half][0][2];
  }
#pragma unroll
  for (float& logit : logits) logit = __shfl_sync(kFullWarp, logit, threadIdx.x % 32 & ~3);
  KeyLogits result;
  result.mean = own_of_32(logits);
  OfColumns top;
  to_exponentials(c, top, s.coarse.of_sample(run));
  __syncthreads();
  const float offset = __shfl_sync(kFullWarp, query.offset, threadIdx.x % 16);
  to_log_weights(logits, c, top, lse_of_sample(s, kRuns) + offset);
  result.weight = own_of_32(logits);
  return result;
}

}  // namespace mra::cuda::sm90
