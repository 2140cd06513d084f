// Selection on CUDA: what plan.cpp hands to plan_row.cu, plan_global.cu and plan_transpose.cu.
#pragma once

#include "types.h"

namespace mra::cuda {

struct PlanParams {
  const float* q_mean;     // [B, H, nq, D]
  const float* k_mean;     // [B, Hk, nk, D]
  const int32_t* q_count;  // [B, nq]
  const int32_t* k_count;  // [B, nk]
  int32_t* start;          // [B, H, nq]
  int32_t* count;          // [B, H, nq]
  int32_t* index;          // [B, H, nq * row_capacity]
  int B, H, Hk, nq, nk, D;
  int64_t N;
  int block_q, block_k;
  float scale;
  bool causal;
  int64_t blocks_per_row;  // 0: by density
  double density;
  int64_t diagonal_reach;  // rows on each side of a query block whose key blocks are forced; or -1
  int first_blocks;
  int row_capacity;
};

// How plan_row runs: rows of scores of `rows` query blocks in shared memory, or, where one does not
// fit, in a slot of `workspace` for each of the `ctas` blocks of threads.
struct PlanRowConfig {
  int rows;   // 8, 16 or 32
  int pitch;  // floats in a row of scores, a multiple of 32
  bool in_workspace;
  int ctas;
  int64_t workspace_bytes() const { return in_workspace ? int64_t{ctas} * rows * pitch * 4 : 0; }
};

PlanRowConfig plan_row_config(const PlanParams& params, const Device& device);
cudaError_t plan_row(const PlanParams& params, const PlanRowConfig& config, void* workspace,
                     cudaStream_t stream);

// `map` is a workspace of [B, H, nq, nk] 4-byte words, nq * nk <= 2^30; `budget` the pairs that a
// head may take.
cudaError_t plan_global(const PlanParams& params, int64_t budget, uint32_t* map,
                        cudaStream_t stream);

struct TransposeParams {
  const int32_t* row_start;  // [B * H, nq]
  const int32_t* row_count;  // [B * H, nq]
  const int32_t* row_index;  // [B * H, capacity]
  int32_t* start;            // [B * H, nk]
  int32_t* count;            // [B * H, nk]
  int32_t* index;            // [B * H, capacity]
  int heads;                 // B * H
  int nq, nk;
  int64_t capacity;  // < 2^31
};

// Returns cudaErrorInvalidValue when one column's bits do not fit in shared memory.
cudaError_t plan_transpose(const TransposeParams& params, const Device& device,
                           cudaStream_t stream);

}  // namespace mra::cuda
