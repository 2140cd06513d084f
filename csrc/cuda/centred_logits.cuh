// Logits of keys -> how they weigh within their blocks (pool = centred and sampled). Log2 units.
#pragma once

#include "centred.h"
#include "sm80/tile.cuh"

namespace mra::cuda {

constexpr float kLowest = -1e30f;  // below every logit, and finite

// Products with the rows of a sample, as mma.sync leaves them, -> logits: those of both parts of
// the mean query, the first two columns, make the first one. Nothing where the key does not count.
template <int kTiles>
__device__ __forceinline__ void to_sample_logits(float (&c)[kTiles][4], float scale,
                                                 const bool (&valid)[2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = valid[i / 2] ? c[n][i] * scale : -INFINITY;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float &high = c[0][2 * half], &low = c[0][2 * half + 1];
    if (threadIdx.x % 4 == 0) high += low, low = -INFINITY;
  }
}

// The lse of a row of a sample over all keys, from those of parts of them (WeightsParams), and what
// goes with it.
__device__ __forceinline__ float lse_of_row(const float2* parts, const float* offsets, int head,
                                            int chunks, int row) {
  parts += int64_t{head} * chunks * kSampleRows + row;
  float top = kLowest, sum = 0.f;
  for (int c = 0; c < chunks; ++c) top = fmaxf(top, parts[c * kSampleRows].x);
  for (int c = 0; c < chunks; ++c) {
    const float2 part = parts[c * kSampleRows];
    sum += part.y * exp2_approx(part.x - top);
  }
  return (sum > 0.f ? top + log2f(sum) : 0.f) + offsets[int64_t{head} * kSampleRows + row];
}

// Log weight of key g (half 0) or g + 8 of a sample's logits, `less` the lse of this thread's
// columns; the four threads that have a key's logits all get it.
template <int kTiles>
__device__ __forceinline__ float log_weight(const float (&c)[kTiles][4],
                                            const float (&less)[kTiles][2], int half) {
  float x[2 * kTiles], top = -INFINITY, sum = 0.f;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    x[i] = c[i / 2][2 * half + i % 2] - less[i / 2][i % 2];
    top = fmaxf(top, x[i]);
  }
  top = quad_max(top);
  if (top == -INFINITY) top = 0.f;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) sum += exp2_approx(x[i] - top);
  return top + log2_approx(quad_sum(sum));
}

// Of a block of keys: one a lane of a group of kLanes, in turns, -inf where there is no key. The
// groups of a warp have a block each.
template <int kTurns, int kLanes>
struct BlockLogits {
  struct Values {
    float x[kTurns];
  };
  Values l;
  float w[kTurns];  // exp of l - top; then the weights
  float top, sum;   // greatest logit, sum of all w
  int count;

  __device__ __forceinline__ explicit BlockLogits(const Values& logits)
      : l(logits), top(-INFINITY), sum(0.f), count(0) {
    const uint32_t mine =
        kLanes == 32 ? kFullWarp : ((1u << kLanes % 32) - 1) << threadIdx.x % 32 / kLanes * kLanes;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      count += __popc(__ballot_sync(kFullWarp, l.x[i] != -INFINITY) & mine);
      top = fmaxf(top, l.x[i]);
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, step));
    }
    if (count == 0) top = 0.f;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) sum += w[i] = exp2_approx(l.x[i] - top);
    sum = total(sum);
  }
  static __device__ __forceinline__ float total(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
    return x;
  }
  // What a plan adds to a block's scores, if these are the logits of the mean query: a quarter of
  // the log mass less half the mean logit, natural units.
  __device__ __forceinline__ float bias() const {
    float plain = 0.f;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) plain += l.x[i] != -INFINITY ? l.x[i] : 0.f;
    plain = total(plain);
    const float mean = __fdividef(plain, static_cast<float>(count));
    return count == 0 ? 0.f : kLn2 * (0.25f * (top + log2_approx(sum)) - 0.5f * mean);
  }
  // w -> weights; returns exp of their entropy, 0 for an empty block.
  __device__ __forceinline__ float finish() {
    const float over = count == 0 ? 0.f : reciprocal_approx(sum), log_sum = log2_approx(sum);
    float spread = 0.f;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      w[i] *= over;
      if (w[i] != 0.f) spread += w[i] * (log_sum - (l.x[i] - top));
    }
    spread = total(spread);
    return count == 0 ? 0.f : exp2_approx(spread);
  }
};

}  // namespace mra::cuda
