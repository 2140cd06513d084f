// Short heads (forward_head.cuh): how float16 holds moments.
#pragma once

#include "half_pairs.cuh"
#include "head_pool.cuh"

namespace mra::cuda::sm90 {

// What moments are kept in for backward (moments_type of common/stages.h).
template <typename T>
using Kept = std::conditional_t<std::is_same_v<T, __half>, float, T>;

// float16 lacks the range of moments: by which powers of two they are brought to 2^14 at most, and
// back. `most`: the largest key and value of the head, bits of T; a deviation from a mean is no
// more than twice that.
template <typename T>
struct MomentScale {
  __device__ explicit MomentScale(const uint32_t (&)[2]) {}
  __device__ float of(bool /*sigma*/) const { return 1.f; }
  __device__ float back(bool /*sigma*/) const { return 1.f; }
};
template <>
struct MomentScale<__half> {
  int of_c, of_sigma;  // exponents

  __device__ explicit MomentScale(const uint32_t (&most)[2]) {
    const float k = value(most[0]), v = value(most[1]);
    of_c = exponent(4.f * k * v);
    of_sigma = exponent(4.f * k * k);
  }
  static __device__ float value(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
  static __device__ int exponent(float bound) {
    return bound == 0.f ? 0 : 14 - (static_cast<int>(__float_as_uint(bound) >> 23) - 126);
  }
  static __device__ float power(int e) { return __uint_as_float((127 + e) << 23); }
  __device__ float of(bool sigma) const { return power(sigma ? of_sigma : of_c); }
  __device__ float back(bool sigma) const { return power(-(sigma ? of_sigma : of_c)); }
};

// By which power of two weights times counts of keys are multiplied where they are kept in float16:
// their products with keys or values, at most those of a quarter of a block, fit it then.
template <typename T>
__device__ __forceinline__ float kept_weight(const uint32_t (&most)[2], const HeadBlocks& blocks) {
  if constexpr (std::is_same_v<T, __half>) {
    using Scale = MomentScale<__half>;
    const float largest = fmaxf(Scale::value(most[0]), Scale::value(most[1]));
    return Scale::power(min(9, Scale::exponent(0.5f * (kRun << blocks.shift) * largest)));
  }
  return 1.f;
}

// The largest value of a run, by a warp, to *most.
template <typename T, int DP>
__device__ __forceinline__ void take_most(uint32_t* most, const uint16_t (&rows)[kRun][DP],
                                          uint32_t there, const PanelLane<DP>& panel) {
  const int g = threadIdx.x % 32 / 4;
  uint32_t highest = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < DP / 16; ++i) {
      uint32_t r[4];
      ldmatrix_x4<false>(r, smem_address(rows) + 16 * half * panel.kRowBytes + panel.rows(i));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!(there >> (16 * half + g + e % 2 * 8) & 1)) continue;
        highest = max(highest, max(r[e] & 0x7fffu, r[e] >> 16 & 0x7fffu));
      }
    }
  }
  highest = __reduce_max_sync(kFullWarp, highest);
  if (threadIdx.x % 32 == 0) atomicMax(most, highest);
}

}  // namespace mra::cuda::sm90
