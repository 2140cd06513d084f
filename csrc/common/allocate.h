// Tensors straight from an allocator. at::empty goes through the dispatcher, which takes twice as
// long, and a short call on a GPU waits for its host.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include <array>

namespace mra {

// Uninitialised, on the current device, which is that of the operator's tensors.
inline at::Tensor allocate(at::IntArrayRef sizes, at::IntArrayRef strides,
                           const at::TensorOptions& options, c10::Allocator* allocator) {
  return at::detail::empty_strided_generic(sizes, strides, allocator,
                                           c10::DispatchKeySet(options.computeDispatchKey()),
                                           c10::typeMetaToScalarType(options.dtype()));
}
// ... and contiguous.
inline at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options,
                           c10::Allocator* allocator) {
  return at::detail::empty_generic(sizes, allocator,
                                   c10::DispatchKeySet(options.computeDispatchKey()),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

// Strides of [B, H, L, D] laid out as (B, L, H, D).
inline std::array<int64_t, 4> heads_last_strides(at::IntArrayRef sizes) {
  const int64_t H = sizes[1], L = sizes[2], D = sizes[3];
  return {H * L * D, D, H * D, 1};
}
// Whether the gradient of x, [B, H, L, D], lies in memory as x does, so that a leaf takes it
// without a copy: where x is dense and its rows are in one piece. Others lie as (B, L, H, D).
inline bool grad_lies_alike(const at::Tensor& x) {
  return x.is_non_overlapping_and_dense() && x.sym_stride(3) == 1;
}
inline std::array<int64_t, 4> grad_strides(const at::Tensor& x) {
  if (!grad_lies_alike(x)) return heads_last_strides(x.sizes());
  return {x.stride(0), x.stride(1), x.stride(2), 1};
}

// From the allocator of `ours`, which the device's stages have made, with its options.
inline at::Tensor allocate_beside(const at::Tensor& ours, at::IntArrayRef sizes) {
  return allocate(sizes, ours.options(), ours.storage().allocator());
}
// No elements.
inline at::Tensor nothing_like(const at::Tensor& ours, at::ScalarType type) {
  return allocate({0}, ours.options().dtype(type), ours.storage().allocator());
}

}  // namespace mra
