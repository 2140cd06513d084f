// The door to every CUDA launch: device guard, current stream, launch check, and the plain views of
// tensors that the .cu files take.
//
//   const Launch launch(x);                      // guards x's device until the end of the scope
//   launch.check(pool_forward(params, launch.device, launch.stream));
//
// A .cu launcher returns the first error of its cudaFuncSetAttribute calls or cudaGetLastError().
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "types.h"

namespace mra::cuda {

struct Launch {
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
  const cudaDeviceProp* prop;
  Device device;

  explicit Launch(const at::Tensor& t)
      : guard(t.device()),
        stream(at::cuda::getCurrentCUDAStream(t.get_device()).stream()),
        prop(at::cuda::getDeviceProperties(t.get_device())),
        device{prop->multiProcessorCount, static_cast<int>(prop->sharedMemPerBlockOptin),
               prop->major} {}

  void check(cudaError_t error) const { C10_CUDA_CHECK(error); }
};

inline Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kHalf:
      return Dtype::f16;
    case at::kBFloat16:
      return Dtype::bf16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(
          false, "mra_attention on CUDA takes float32, float16 or bfloat16, not ", t.scalar_type());
  }
}

// Strides of a [B, H, L, D] tensor.
inline Strides strides_of(const at::Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// (B, H, L, D), laid out as (B, L, H, D).
inline at::Tensor empty_heads_last(const at::Tensor& like) {
  const auto s = like.sizes();
  return at::empty({s[0], s[2], s[1], s[3]}, like.options()).transpose(1, 2);
}

// Data pointer, or null for an undefined tensor.
template <typename T>
T* data_of(const at::Tensor& t) {
  return t.defined() ? t.mutable_data_ptr<T>() : nullptr;
}
inline const void* const_bytes_of(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr() : nullptr;
}
inline void* bytes_of(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// `t` itself if its rows can be read 16 bytes at a time (last stride 1, every row 16-byte aligned),
// otherwise a contiguous copy.
inline at::Tensor with_aligned_rows(const at::Tensor& t) {
  bool aligned = (t.size(-1) == 1 || t.stride(-1) == 1) &&
                 reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    aligned = aligned && (t.size(d) <= 1 || t.stride(d) * t.element_size() % 16 == 0);
  }
  return aligned ? t : t.clone(at::MemoryFormat::Contiguous);
}

}  // namespace mra::cuda
