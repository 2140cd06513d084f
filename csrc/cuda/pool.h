// Block means on CUDA: what pool.cpp and fine.cpp hand to pool_fwd.cu.
#pragma once

#include "types.h"

namespace mra::cuda {

// One tensor and its means.
struct PoolTensor {
  const void* x;     // [B, H, L, D] T, rows 16-byte aligned
  Strides stride;    // of x
  const bool* mask;  // [B, L] contiguous, or null
  float* mean;       // [B, H, n, D]
  void* rounded;     // [B, H, n, D] T: the same in the type of x, or null
  int32_t* count;    // [B, n], or null
  // Weighted: the weight of each row within its block, [B, H, n << log2_block], 0 where masked. The
  // mean is then the sum with these weights.
  const float* weights;
  int H, n;  // B * H * n < 2^31
  int64_t L;
  int log2_block;
};

struct PoolParams {
  PoolTensor tensor[3];
  int tensors;
  bool weighted;  // all of them, or none
  int B, D;
  Dtype dtype;
  bool beside;  // it may run beside the kernel launched before
};

// All tensors in one launch.
cudaError_t pool_forward(const PoolParams& params, cudaStream_t stream);

// Means of keys and values in the type that attention multiplies: out[i] and out[n + i] are key[i]
// and value[i], n a multiple of 8. beside: as in PoolParams.
cudaError_t round_pooled(const float* key, const float* value, void* out, int64_t n, Dtype dtype,
                         bool beside, cudaStream_t stream);

}  // namespace mra::cuda
