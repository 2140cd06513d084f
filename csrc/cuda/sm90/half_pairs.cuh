// Pairs of a half type in a register: their arithmetic.
#pragma once

#include "../dtype.cuh"
#include "../sm80/mma.cuh"

namespace mra::cuda::sm90 {

// Pairs of a half type, element by element, rounded once.
template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
template <typename T>
__device__ __forceinline__ uint32_t less(uint32_t a, uint32_t b) {
  const Pair<T> d =
      __hsub2(reinterpret_cast<const Pair<T>&>(a), reinterpret_cast<const Pair<T>&>(b));
  return reinterpret_cast<const uint32_t&>(d);
}
template <typename T>
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
  const Pair<T> d =
      __hmul2(reinterpret_cast<const Pair<T>&>(a), reinterpret_cast<const Pair<T>&>(b));
  return reinterpret_cast<const uint32_t&>(d);
}

// Two numbers as a pair of T, and what its rounding has taken.
template <typename T>
struct SplitPair {
  uint32_t high, low;

  __device__ __forceinline__ SplitPair(float x, float y) : high(Mma<T>::pack(x, y)) {
    const float2 kept = unpack2(high, T{});
    low = Mma<T>::pack(x - kept.x, y - kept.y);
  }
};

}  // namespace mra::cuda::sm90
