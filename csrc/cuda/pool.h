// Block means on CUDA: what pool.cpp hands to pool_fwd.cu.
#pragma once

#include "types.h"

namespace mra::cuda {

struct PoolParams {
  const void* x;     // [B, H, L, D], rows 16-byte aligned
  Strides stride;    // of x
  const bool* mask;  // [B, L] contiguous, or null
  float* mean;       // [B, H, n, D]
  int32_t* count;    // [B, n]
  int B, H, n;       // B * H * n < 2^31
  int64_t L;
  int D, block;
  Dtype dtype;
};

cudaError_t pool_forward(const PoolParams& params, cudaStream_t stream);

}  // namespace mra::cuda
