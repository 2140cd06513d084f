// Online softmax of 16 rows a warp, in log2 units, with the accumulators of their output in
// registers as mma.sync and wgmma leave them: thread 4g + t of a warp holds columns 8n + 2t, 8n +
// 2t + 1 of rows g and g + 8.
#pragma once

#include "tile.cuh"

namespace mra::cuda {

// kShare: it also keeps what part of a row's mass is pooled.
template <typename T, int DP, bool kShare = true>
struct OnlineSoftmax {
  static constexpr int kTiles = DP / 8;
  float acc[kTiles][4];
  float max[2], sum[2];                // sum: of this thread's columns only
  float pooled_max[2], pooled_sum[2];  // state after the pooled keys

  // Starts empty, or (mean not null) from a state of D columns that all rows share; its mean is
  // zero where its lse is -inf.
  __device__ __forceinline__ void start(const float* mean, const float* lse, int D) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max[half] = -INFINITY;
      sum[half] = 0.f;
    }
    if (mean != nullptr && *lse != -INFINITY) {
      max[0] = max[1] = *lse * kLog2e;
      sum[0] = sum[1] = t == 0 ? 1.f : 0.f;
    }
    keep_pooled();
#pragma unroll
    for (int n = 0; n < kTiles; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.f;
    if (mean == nullptr) return;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int d = 8 * n + 2 * t;
      float2 u = make_float2(0.f, 0.f);
      if (d < D) u = *reinterpret_cast<const float2*>(mean + d);
      acc[n][0] = acc[n][2] = u.x;
      acc[n][1] = acc[n][3] = u.y;
    }
  }

  // Behind start: rows that don't count [of this warp's 16, `mask`] get no weight, so that what
  // they hold has no say in how the others of their warp are weighed.
  __device__ __forceinline__ void leave_out(const uint8_t* mask, int present) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = g + 8 * half;
      if (r < present && !mask[r]) max[half] = INFINITY;
    }
  }

  __device__ __forceinline__ void keep_pooled() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pooled_max[half] = max[half];
      pooled_sum[half] = sum[half];
    }
  }

  // Behind the last pooled keys: adds each row's bias [rows of the warp] (or null) to their logits.
  __device__ __forceinline__ void end_pooled(const float* bias, int present) {
    if (bias != nullptr) {
      const int g = threadIdx.x % 32 / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (g + 8 * half < present) max[half] += bias[g + 8 * half] * kLog2e;
      }
    }
    keep_pooled();
  }
  // The same with the biases of this thread's rows, log2 units.
  __device__ __forceinline__ void end_pooled(const float (&bias)[2]) {
    max[0] += bias[0];
    max[1] += bias[1];
    keep_pooled();
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      acc[n][0] *= factor[0];
      acc[n][1] *= factor[0];
      acc[n][2] *= factor[1];
      acc[n][3] *= factor[1];
    }
  }

  // Scores -> weights by a shift, which are added to the sums of this thread's rows.
  template <int kScores>
  static __device__ __forceinline__ void to_weights(float (&s)[kScores][4], float scale,
                                                    const float (&shift)[2], float (&sum)[2]) {
#pragma unroll
    for (int n = 0; n < kScores; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approx(fmaf(s[n][i], scale, -shift[i / 2]));
        sum[i / 2] += s[n][i];
      }
    }
  }

  // Logits (scores times `scale`) -> weights; factor: what the accumulators are due, true if that
  // is not 1 for some row of the warp. The shift follows the maximum only when that has grown by
  // more than 2^8: weights may exceed 1, which costs no accuracy, and most tiles rescale nothing.
  template <int kScores>
  __device__ __forceinline__ bool weigh(float (&s)[kScores][4], float scale, float (&factor)[2]) {
    constexpr float kSlack = 8.f;
    float shift[2];
    bool grown = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float m = s[0][2 * half];
#pragma unroll
      for (int n = 0; n < kScores; ++n) m = fmaxf(m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      m = quad_max(m) * scale;
      const float old = max[half];
      if (m > old + kSlack) {
        max[half] = m;
        grown = true;
      }
      shift[half] = max[half] == -INFINITY ? 0.f : max[half];
      factor[half] = exp2_approx(old - shift[half]);
    }
    grown = __any_sync(0xffffffffu, grown);
    if (grown) {
      sum[0] *= factor[0];
      sum[1] *= factor[1];
    }
    to_weights(s, scale, shift, sum);
    return grown;
  }

  // Whether all rows of the warp have a maximum: then weigh_on will do.
  __device__ __forceinline__ bool settled() const {
    return __all_sync(0xffffffffu, max[0] != -INFINITY && max[1] != -INFINITY);
  }
  // The same by the shift as it is, which costs no look at the maximum: weights may be large, as
  // long as T holds them and no sum overflows. False where they are too large for that (scores that
  // have grown by some 60 since the shift was found, in float16 by 14, in log2 units): nothing has
  // come of it then, and the scores are lost.
  template <int kScores>
  __device__ __forceinline__ bool weigh_on(float (&s)[kScores][4], float scale) {
    constexpr float kLargest = std::is_same_v<T, __half> ? 0x1p14f : 0x1p60f;
    float part[2] = {};
    to_weights(s, scale, max, part);
    if (__any_sync(0xffffffffu, part[0] > kLargest || part[1] > kLargest)) return false;
    sum[0] += part[0];
    sum[1] += part[1];
    return true;
  }

  template <int kScores>
  __device__ __forceinline__ void update(float (&s)[kScores][4], float scale) {
    float factor[2];
    if (weigh(s, scale, factor)) rescale(factor);
  }

  // To float32 precision where T has that.
  static __device__ __forceinline__ float inverse_of(float x) {
    if constexpr (sizeof(T) == 2) return reciprocal_approx(x);
    return 1.f / x;
  }
  static __device__ __forceinline__ float log2_of(float x) {
    if constexpr (sizeof(T) == 2) return log2_approx(x);
    return log2f(x);
  }

  // Divides by the mass, and writes lse and share of the warp's 16 rows from `row` of batch b, head
  // h on; `present` of them are there. `share`: of this thread's rows.
  __device__ __forceinline__ void finish(const ForwardParams& p, int b, int h, int row, int present,
                                         float (&share)[2]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float inverse[2], total[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = g + 8 * half;
      total[half] = quad_sum(sum[half]);
      const float pooled = quad_sum(pooled_sum[half]);
      if (p.row_mask != nullptr && r < present &&
          !p.row_mask[static_cast<int64_t>(b) * p.rows + row + r]) {
        total[half] = 0.f;
      }
      const bool weight = !(total[half] == 0.f);  // NaN in, NaN out
      inverse[half] = weight ? inverse_of(total[half]) : 0.f;
      share[half] = kShare && weight && pooled > 0.f
                        ? pooled * exp2_approx(pooled_max[half] - max[half]) * inverse[half]
                        : 0.f;
    }
    // Of the four threads of a row g and a row g + 8 the first writes for one, the second for the
    // other.
    const int r = g + 8 * t;
    if (t < 2 && r < present) {
      const float of_row = t == 0 ? total[0] : total[1], top = t == 0 ? max[0] : max[1];
      const int64_t at = (static_cast<int64_t>(b) * p.H + h) * p.rows + row + r;
      p.lse[at] = of_row == 0.f ? -INFINITY : (top + log2_of(of_row)) * kLn2;
      if (kShare && p.share != nullptr) p.share[at] = t == 0 ? share[0] : share[1];
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] *= inverse[i / 2];
    }
    if (p.row_mask == nullptr) return;
      // Rows that don't count may hold NaN.
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] = inverse[i / 2] == 0.f ? 0.f : acc[n][i];
    }
  }
};

}  // namespace mra::cuda
