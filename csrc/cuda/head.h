// Short heads on CUDA: what head.cpp hands to sm90/forward_head.cuh.
#pragma once

#include "plan.h"
#include "sm80/params.h"

namespace mra::cuda {

// The coarse part: none or block, whose state starts a softmax; row; row with order 1, with even
// means or with those of pool = centred or sampled.
enum class HeadForm { state, row, order1, centred, sampled };
constexpr bool is_weighted(HeadForm form) {
  return form == HeadForm::centred || form == HeadForm::sampled;
}

struct HeadParams {
  ForwardParams fine;                   // without lists or state, which are made on the way
  PlanParams plan;                      // likewise without means and counts
  bool coarse;                          // the block-coarse part takes part
  bool global;                          // selection
  int64_t budget;                       // pairs that a head may take of its map
  uint8_t head_budget[kMostDensities];  // [H], blocks that each row of a head may take: by_head
  int run_shift;  // log2 of the runs of 32 rows in a block of queries, and of keys

  // Written unless null.
  float* q_mean;     // [B, H, nq, D]
  float* k_mean;     // [B, Hk, nk, D]
  float* v_mean;     // [B, Hk, nk, D]
  int32_t* q_count;  // [B, nq]
  int32_t* k_count;  // [B, nk]
  void* moments;     // [B, Hk, 2, P, P]: C and Sigma (moments_type of common/stages.h)
  // Of weighted means, which k_mean and v_mean then are (PooledInputs of common/stages.h).
  float* centre;   // [B, Hk, D]
  float* weights;  // [B, Hk, nk * block_k]
  float* mass;     // [B, Hk, nk]
};

namespace sm90 {

// Half types, up to kHeadRuns runs of 32 queries and of keys a head, no causality; blocks of 32,
// and of 64 for selection by row. DP is 32 or 64. Returns cudaErrorNotSupported, and does nothing,
// for what it doesn't serve.
constexpr int kHeadRuns = 16;
template <typename T, int DP, HeadForm kForm>
cudaError_t launch_forward_head(const HeadParams&, const Device&, cudaStream_t);

}  // namespace sm90

}  // namespace mra::cuda
