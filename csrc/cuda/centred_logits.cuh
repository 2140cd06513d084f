// Logits of keys -> how they weigh within their blocks (pool = centred and sampled). Log2 units.
#pragma once

#include "sm80/tile.cuh"

namespace mra::cuda {

// Products -> logits: those of both parts of the mean query, the first two columns of its tile,
// make the first one; the others of that tile are nothing. And nothing where the key does not
// count.
template <int kTiles>
__device__ __forceinline__ void to_logits(float (&c)[kTiles][4], float scale,
                                          const bool (&valid)[2]) {
  float(&mean)[4] = c[kTiles - 1];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = valid[i / 2] ? c[n][i] * scale : -INFINITY;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mean[2 * half] = threadIdx.x % 4 == 0 ? mean[2 * half] + mean[2 * half + 1] : -INFINITY;
    mean[2 * half + 1] = -INFINITY;
  }
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
    return count == 0 ? 0.f : kLn2 * (0.25f * (top + log2f(sum)) - plain / (2 * count));
  }
  // w -> weights; returns exp of their entropy, 0 for an empty block.
  __device__ __forceinline__ float finish() {
    const float over = count == 0 ? 0.f : 1.f / sum, log_sum = log2f(sum);
    float spread = 0.f;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      w[i] *= over;
      if (w[i] != 0.f) spread += w[i] * (log_sum - (l.x[i] - top));
    }
    spread = total(spread);
    return count == 0 ? 0.f : exp2f(spread);
  }
};

}  // namespace mra::cuda
