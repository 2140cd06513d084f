// Order 1 of the keys in the backward pass on Hopper; see forward.h.
#pragma once

#include "../types.h"

namespace mra::cuda::sm90 {

struct Order1Keys {
  const void *k, *v;  // [B, Hk, M, D] bfloat16
  Strides k_strides, v_strides;
  const uint8_t* mask;           // [B, M] or null
  const float *k_mean, *v_mean;  // [B, Hk, nk, D]
  const void* moment_grads;      // [B, Hk, 2, dim, dim] bfloat16: dC and dSigma
  int B, Hk, M, D, nk, log2_block_k, chunks;
  // Weighted means (else null): the weight of each key within its block, [B, Hk, nk <<
  // log2_block_k], and the gradients of the pooled keys and values, [2, B, Hk, nk, D].
  const float *weights, *shares;
  // With these gradients through the weights (docs/algorithm.md): of the log masses, [B, Hk, nk];
  // the centre, [B, Hk, D]; its gradient in parts, [B, Hk, chunks * order1_keys_warps, D].
  const float *mass_grad, *centre;
  float* centre_grads;
  float scale;
  void *grad_k, *grad_v;  // [B, Hk, M, D] bfloat16
  Strides grad_k_strides, grad_v_strides;
};

// Warps that multiply.
constexpr int order1_keys_warps(int dim) { return dim <= 64 ? 4 : 8; }

// Blocks of threads that a multiprocessor holds.
constexpr int order1_keys_resident(int dim, bool weighted, int log2_block_k) {
  return dim > 64 ? 1 : weighted || log2_block_k < 6 ? 3 : 2;
}

// Head dims up to DP = 64 or 128, key blocks of 16, 32 or 64.
template <int DP>
cudaError_t launch_order1_keys(const Order1Keys&, const Device&, cudaStream_t);

}  // namespace mra::cuda::sm90
