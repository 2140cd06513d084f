// Short heads on CUDA: what head.cpp hands to sm90/forward_head.cuh.
#pragma once

#include "plan.h"
#include "sm80/params.h"

namespace mra::cuda {

struct HeadParams {
  ForwardParams fine;  // without lists or state, which are made on the way
  PlanParams plan;     // likewise without means and counts
  bool coarse;         // the block-coarse part takes part; the means are then written
  bool global;         // selection
  int64_t budget;      // pairs that a head may take of its map, or each of its rows

  float* q_mean;     // [B, H, nq, D]
  float* k_mean;     // [B, Hk, nk, D]
  float* v_mean;     // [B, Hk, nk, D]
  int32_t* q_count;  // [B, nq]
  int32_t* k_count;  // [B, nk]
};

namespace sm90 {

// Half types, blocks of 32, up to kHeadBlocks of them a head on either side, head dims from 24 to
// 64, no causality. Returns cudaErrorNotSupported, and does nothing, for what it doesn't serve.
constexpr int kHeadBlocks = 16;
template <typename T>
cudaError_t launch_forward_head(const HeadParams&, const Device&, cudaStream_t);

}  // namespace sm90

}  // namespace mra::cuda
