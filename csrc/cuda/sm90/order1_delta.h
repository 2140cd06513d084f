// What the backward pass with weighted means needs of each row before all else, on Hopper; see
// forward.h.
#pragma once

#include "../types.h"

namespace mra::cuda::sm90 {

struct Order1Delta {
  const void *q, *grad_out, *out;  // [B, H, N, D] bfloat16
  Strides q_strides, grad_out_strides, out_strides;
  const void* moments;  // [B, Hk, 2, dim, dim] bfloat16: C and Sigma
  // The centre, [B, Hk, D], and its products with C and Sigma, [B, Hk, 2, dim].
  const float *centre, *centre_term;
  const float* share;     // [B, H, N]
  const float* grad_lse;  // [B, H, N] with strides lse_strides, or null
  Strides lse_strides;
  int B, H, Hk, N, D, chunks;
  float scale;

  // All [B, H, N]; slope: gamma u.dO, coarse_delta: delta less that.
  float *delta, *coarse_delta, *variance, *row_bias, *slope;
};

// Blocks of threads that a multiprocessor holds.
constexpr int order1_delta_resident(int dim) { return dim > 64 ? 1 : 3; }

// Head dims up to DP = 64 or 128.
template <int DP>
cudaError_t launch_order1_delta(const Order1Delta&, const Device&, cudaStream_t);

}  // namespace mra::cuda::sm90
