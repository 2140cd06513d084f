// The door to every CUDA launch: current stream, launch check, new tensors, and the plain views of
// tensors that the .cu files take. The operators have made the device of their tensors the current
// one.
//
//   const Launch launch(x);
//   launch.check(pool_forward(params, launch.device, launch.stream));
//
// A .cu launcher returns the first error of its cudaFuncSetAttribute calls or cudaGetLastError().
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>

#include "../common/allocate.h"
#include "../common/stages.h"
#include "types.h"

namespace mra::cuda {

struct Launch {
  cudaStream_t stream;
  const cudaDeviceProp* prop;
  Device device;

  explicit Launch(const at::Tensor& t)
      : stream(at::cuda::getCurrentCUDAStream(t.get_device()).stream()),
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

// Uninitialised and contiguous; like `x`, which is contiguous.
inline at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return mra::allocate(sizes, options, c10::cuda::CUDACachingAllocator::get());
}
inline at::Tensor allocate_like(const at::Tensor& x) { return allocate(x.sizes(), x.options()); }

// (B, H, L, D), laid out as (B, L, H, D).
inline at::Tensor empty_heads_last(const at::Tensor& like) {
  return mra::allocate(like.sizes(), heads_last_strides(like.sizes()), like.options(),
                       c10::cuda::CUDACachingAllocator::get());
}
// For the gradients of the inputs.
inline at::Tensor empty_grad(const Inputs& in, const at::Tensor& of, int which) {
  return mra::allocate(of.sizes(), in.grad_strides[which], of.options(),
                       c10::cuda::CUDACachingAllocator::get());
}
inline at::Tensor empty_query_grad(const Inputs& in) { return empty_grad(in, in.query, 0); }
inline at::Tensor empty_key_grad(const Inputs& in) { return empty_grad(in, in.key, 1); }
inline at::Tensor empty_value_grad(const Inputs& in) { return empty_grad(in, in.value, 2); }

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
