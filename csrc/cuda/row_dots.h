// Dot products of rows of two tensors [B, H, N, D], as [B, H, N] float32: delta.cpp.
#pragma once

#include "../common/stages.h"

namespace mra::cuda {

// dO.o of each row, less grad_lse where that is defined.
Tensor delta(const Tensor& grad_out, const Tensor& out, const Tensor& grad_lse);
// As delta, for x and y that the launch before may write, or where memory of its inputs may have
// been given back: it runs behind that launch.
Tensor row_dots(const Tensor& x, const Tensor& y, const Tensor& grad_lse = {});

}  // namespace mra::cuda
