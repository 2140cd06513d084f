// Order 1 of the rows in the backward pass on Hopper; see forward.h.
#pragma once

#include "../types.h"

namespace mra::cuda::sm90 {

struct Order1Rows {
  const void *q, *grad_out;  // [B, H, N, D] bfloat16
  Strides q_strides, grad_out_strides;
  const void* moments;  // [B, Hk, 2, dim, dim] bfloat16: C and Sigma
  const float* share;   // [B, H, N]
  int B, H, Hk, N, D, chunks;
  float scale;

  // Weighted means (else null): of each row what makes b (RowWeightsParams), [B, H, N], in place of
  // delta and coarse_delta; the centre, [B, Hk, D], and its products with C and Sigma, [B, Hk, 2,
  // dim]. What the centre gets of rows is then left in parts, [B, H, chunks, 4, D].
  const float *variance, *slope, *coarse_sum, *centre, *centre_term;
  float* row_sums;

  // Even means. delta is made where out, [B, H, N, D] bfloat16 with rows aligned to 16 bytes, is
  // given, else read. grad_lse: [B, H, N] with strides lse_strides, or null.
  const void* out;
  const float* grad_lse;
  Strides out_strides, lse_strides;
  float *delta, *coarse_delta;  // [B, H, N]
  bool beside;                  // it may run beside the kernel launched before

  void* grad_q;  // [B, H, N, D] bfloat16
  Strides grad_q_strides;
  bool add;  // grad_q holds a part already
  // [B, H, chunks, 2, dim, dim]: parts of dC and of dSigma / 2, times n. Null where one part is all
  // of a key head: then dC and dSigma, [B, Hk, 2, dim, dim] bfloat16, and n from [B, nk].
  float* sums;
  void* moment_grads;
  const int* key_count;
  int nk;
};

// Head dims up to DP = 64 or 128.
template <int DP>
cudaError_t launch_order1_rows(const Order1Rows&, const Device&, cudaStream_t);

}  // namespace mra::cuda::sm90
