// Tensors straight from an allocator. at::empty goes through the dispatcher, which takes twice as
// long, and a short call on a GPU waits for its host.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

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

// From the allocator of `ours`, which the device's stages have made, with its options.
inline at::Tensor allocate_beside(const at::Tensor& ours, at::IntArrayRef sizes) {
  return allocate(sizes, ours.options(), ours.storage().allocator());
}
// No elements.
inline at::Tensor nothing_like(const at::Tensor& ours, at::ScalarType type) {
  return allocate({0}, ours.options().dtype(type), ours.storage().allocator());
}

}  // namespace mra
