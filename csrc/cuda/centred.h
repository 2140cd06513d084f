// Means of blocks that weigh keys as the queries do: what centred.cpp hands to centred_*.cu. No
// torch header.
#pragma once

#include "types.h"

namespace mra::cuda {

constexpr int kSampledQueries = 64;

// Queries evenly spread among the valid ones of a group of heads, one head after another.
struct SampleParams {
  const bool* mask;  // [B, N] or null
  int64_t* places;   // [B, kSampledQueries]: among the group * N queries of a key head; -1: none
  int32_t* valid;    // [B]: valid queries of a head
  int B, N, group;
};
cudaError_t sample_queries(const SampleParams& params, cudaStream_t stream);

}  // namespace mra::cuda
