// Order 1 of the rows in the backward pass on Hopper; see forward.h.
#pragma once

#include "../types.h"

namespace mra::cuda::sm90 {

struct Order1Rows {
  const void *q, *grad_out;  // [B, H, N, D] bfloat16
  Strides q_strides, grad_out_strides;
  const void* moments;         // [B, Hk, 2, dim, dim] bfloat16: C and Sigma
  const float *share, *delta;  // [B, H, N]
  int B, H, Hk, N, D, chunks;
  float scale;

  // Weighted means (else null): a and b of each row, [B, H, N], in place of share, delta and
  // coarse_delta; the centre, [B, Hk, D]; what CentreProductsParams calls shift, [B, Hk, 2, dim];
  // and which queries count, [B, N] or null. grad_q is then added to.
  const float *a, *b, *centre, *shift;
  const uint8_t* mask;

  float* coarse_delta;  // [B, H, N]
  void* grad_q;         // [B, H, N, D] bfloat16
  Strides grad_q_strides;
  bool add;     // grad_q holds a part already
  float* sums;  // [B, H, chunks, 2, dim, dim]: parts of dC and of dSigma / 2, times n
};

// Head dims up to DP = 64 or 128.
template <int DP>
cudaError_t launch_order1_rows(const Order1Rows&, const Device&, cudaStream_t);

}  // namespace mra::cuda::sm90
