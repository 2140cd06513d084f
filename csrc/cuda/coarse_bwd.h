// What coarse.cpp hands to coarse_bwd.cu.
#pragma once

#include "sm80/params.h"

namespace mra::cuda {

// Everything contiguous; sums of query blocks as BlockRows of common/stages.h.
struct CoarseBackwardParams {
  int B, H, Hk, nq, nk, D;
  int block_q, block_k;
  float scale;
  bool causal;

  const float* q_mean;                  // [B, H, nq, D]
  const float *k_mean, *v_mean;         // [B, Hk, nk, D]
  const int *q_count, *k_count;         // [B, nq], [B, nk]
  const float *lse, *grad_out, *delta;  // [B, H, nq], [B, H, nq, D], [B, H, nq]
  Lists row_lists, column_lists;

  // Gradients divided by the counts: what each row of a block gets.
  float* grad_q;           // [B, H, nq, D]
  float *grad_k, *grad_v;  // [B, Hk, nk, D]
};

// For head dims up to 128, with products of operands of 16 bits: good for half inputs.
// cudaErrorNotSupported: not a case for this kernel.
cudaError_t coarse_backward(const CoarseBackwardParams& params, const Device& device,
                            cudaStream_t stream);

}  // namespace mra::cuda
