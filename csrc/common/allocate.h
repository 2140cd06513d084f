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

// No elements. `like`: what the device's stages have made.
inline at::Tensor nothing_like(const at::Tensor& like, at::ScalarType type) {
  return allocate({0}, like.options().dtype(type), like.storage().allocator());
}

}  // namespace mra
