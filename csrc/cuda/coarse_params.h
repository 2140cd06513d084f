// What coarse.cpp hands to the kernels of the block-coarse part alone, for half inputs.
#pragma once

#include "sm80/params.h"

namespace mra::cuda {

// Everything contiguous.
struct CoarseProblem {
  int B, H, Hk, nq, nk, D;
  int block_q, block_k;
  float scale;
  bool causal;

  const float* q_mean;           // [B, H, nq, D]
  const float *k_mean, *v_mean;  // [B, Hk, nk, D]
  const int *q_count, *k_count;  // [B, nq], [B, nk]
  Lists row_lists;               // what is left out
};

struct CoarseForwardParams : CoarseProblem {
  // CoarseState of common/stages.h
  float* mean;  // [B, H, nq, D]
  float* lse;   // [B, H, nq]
};

// Sums of query blocks as BlockRows of common/stages.h.
struct CoarseBackwardParams : CoarseProblem {
  const float *lse, *grad_out, *delta;  // [B, H, nq], [B, H, nq, D], [B, H, nq]
  Lists column_lists;

  // Gradients divided by the counts: what each row of a block gets.
  float* grad_q;           // [B, H, nq, D]
  float *grad_k, *grad_v;  // [B, Hk, nk, D]
};

// For head dims up to 128, with products of operands of 16 bits. cudaErrorNotSupported: not a case
// for this kernel.
cudaError_t coarse_backward(const CoarseBackwardParams& params, const Device& device,
                            cudaStream_t stream);

}  // namespace mra::cuda
