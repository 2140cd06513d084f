// What the kernels of the order-1 term share: operand types, dispatch, sums of key counts.
#pragma once

#include <type_traits>

#include "order1.h"
#include "sm80/tile.cuh"

namespace mra::cuda {

// Type that T's values are multiplied in. float16 lacks the range of moments and of weighted rows;
// its values are exact in TF32, whose single product then serves.
template <typename T>
using Operand = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat16, float>;
template <typename T>
inline constexpr bool kSingleTf32 = std::is_same_v<T, __half>;

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>{}, integral_constant<int, dim>).
template <class F>
cudaError_t dispatch_order1(Dtype dtype, int dim, F f) {
  const auto by_dim = [&](auto t) {
    switch (dim) {
      case 32:
        return f(t, std::integral_constant<int, 32>{});
      case 64:
        return f(t, std::integral_constant<int, 64>{});
      case 128:
        return f(t, std::integral_constant<int, 128>{});
      default:
        return f(t, std::integral_constant<int, 256>{});
    }
  };
  switch (dtype) {
    case Dtype::f32:
      return by_dim(TypeTag<float>{});
    case Dtype::f16:
      return by_dim(TypeTag<__half>{});
    default:
      return by_dim(TypeTag<__nv_bfloat16>{});
  }
}

// kVec<T> values as operands to shared memory, 16-byte aligned.
template <typename T>
__device__ __forceinline__ void store_operands(Operand<T>* to, const float (&x)[kVec<T>]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    using M = Mma<__nv_bfloat16>;
    *reinterpret_cast<uint4*>(to) = make_uint4(M::pack(x[0], x[1]), M::pack(x[2], x[3]),
                                               M::pack(x[4], x[5]), M::pack(x[6], x[7]));
  } else {
#pragma unroll
    for (int e = 0; e < kVec<T>; e += 4) {
      *reinterpret_cast<float4*>(to + e) = make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]);
    }
  }
}

// The kVec<T> floats at p, 16-byte aligned, or zeros.
template <typename T>
__device__ __forceinline__ void load_floats(float (&x)[kVec<T>], const float* p, bool valid) {
#pragma unroll
  for (int e = 0; e < kVec<T>; e += 4) {
    const float4 u = valid ? __ldg(reinterpret_cast<const float4*>(p + e)) : float4{};
    x[e] = u.x, x[e + 1] = u.y, x[e + 2] = u.z, x[e + 3] = u.w;
  }
}

// Sum of counts[0 .. n) for every thread; `scratch` holds 32 ints. The whole block calls this.
__device__ __forceinline__ int sum_counts(const int* counts, int n, int* scratch) {
  int sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += counts[i];
  sum = __reduce_add_sync(0xffffffffu, sum);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < blockDim.x / 32; ++i) sum += scratch[i];
  __syncthreads();
  return sum;
}

}  // namespace mra::cuda
