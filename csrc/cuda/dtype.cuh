// Device-side element types: 16 bytes at a time from global memory, as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "grid.cuh"
#include "types.h"

namespace mra::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Elements of T in 16 bytes.
template <typename T>
inline constexpr int kVec = 16 / sizeof(T);

// Reads 16 bytes that no thread writes during the kernel. `p` is 16-byte aligned.
template <typename T>
__device__ __forceinline__ uint4 load16(const T* p) {
  return __ldg(reinterpret_cast<const uint4*>(p));
}

__device__ __forceinline__ float2 unpack2(uint32_t bits, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
__device__ __forceinline__ float2 unpack2(uint32_t bits, __nv_bfloat16) {
  // A bfloat16 is the upper half of a float.
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

// Two neighbouring elements as floats.
__device__ __forceinline__ float2 load_pair(const float* p) {
  return *reinterpret_cast<const float2*>(p);
}
template <typename T>
__device__ __forceinline__ float2 load_pair(const T* p) {
  return unpack2(*reinterpret_cast<const uint32_t*>(p), T{});
}

// The kVec<T> elements in 16 loaded bytes.
template <typename T>
__device__ __forceinline__ void unpack16(const uint4& v, float (&out)[kVec<T>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack2(words[i], T{});
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  }
}

}  // namespace mra::cuda
