// What problem.cpp hands to coarse_shares.cu.
#pragma once

#include "types.h"

namespace mra::cuda {

struct ShareSumsParams {
  const float* sums;  // [2, splits, B, Hk, nk, D]: keys, values
  const int* count;   // [B, nk] or null
  float* shares;      // [2, B, Hk, nk, D]: summed over splits, divided by max(1, count)
  int splits, B, Hk, nk, D;
  const float* mass_parts = nullptr;  // [splits, B, Hk, nk] or null
  float* mass_grad = nullptr;         // [B, Hk, nk]: their sums
};

cudaError_t share_sums(const ShareSumsParams& params, cudaStream_t stream);

}  // namespace mra::cuda
