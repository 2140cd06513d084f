// What the kernels of coarse_bwd.cu and sm90/coarse_*.cuh share: which pairs of blocks there are,
// and the weights of rows.
#pragma once

#include "coarse_params.h"
#include "sm80/tile.cuh"

namespace mra::cuda {

// Under causal x sees y where (y + 1) block_k <= x block_q: y < end_of(x), x >= start_of(y).
__device__ __forceinline__ int end_of(const CoarseProblem& p, int x) {
  return p.causal ? static_cast<int>(int64_t{x} * p.block_q / p.block_k) : p.nk;
}
__device__ __forceinline__ int start_of(const CoarseProblem& p, int y) {
  if (!p.causal) return 0;
  return static_cast<int>(((int64_t{y} + 1) * p.block_k + p.block_q - 1) / p.block_q);
}

// Marks in `bits` what a list selects of `others` blocks: every kStep-th entry from `first` on.
template <int kStep, int kBatch>
__device__ __forceinline__ void mark_list(uint32_t* bits, const List& list, int first, int others) {
#pragma unroll kBatch
  for (int e = first; e < list.count; e += kStep) {
    const unsigned o = list.entries[e];
    if (o < static_cast<unsigned>(others)) atomicOr(bits + o / 32, 1u << o % 32);
  }
}

// In log2 units; +inf for a row without a weight, as one whose lse is -inf.
__device__ __forceinline__ float log2_of_lse(float lse) {
  return fabsf(lse) == INFINITY ? INFINITY : lse * kLog2e;
}

}  // namespace mra::cuda
