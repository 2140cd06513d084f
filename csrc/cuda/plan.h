// Selection on CUDA: what plan.cpp hands to plan_row.cu, plan_map.cu, plan_global.cu and
// plan_transpose.cu.
#pragma once

#include "types.h"

namespace mra::cuda {

struct PlanParams {
  const float* q_mean;     // [B, H, nq, D]
  const float* k_mean;     // [B, Hk, nk, D]
  const float* key_bias;   // [B, Hk, nk], added to the scores of each key block; or null
  const int32_t* q_count;  // [B, nq]
  const int32_t* k_count;  // [B, nk]
  int32_t* start;          // [B, H, nq]
  int32_t* count;          // [B, H, nq]
  int32_t* index;          // [B, H, nq * row_capacity]; zeros behind the lists
  int32_t* queues;         // [2], set to zero
  bool beside;             // it may run beside the kernel launched before

  // The block-coarse state (CoarseState of common/stages.h), made where v_mean isn't null.
  const float* v_mean;  // [B, Hk, nk, D] or null
  float* mean;          // [B, H, nq, D]
  float* lse;           // [B, H, nq]
  bool tf32;            // one TF32 product of weights and values instead of three

  int B, H, Hk, nq, nk, D;
  int64_t N;
  int block_q, block_k;
  float scale;
  bool causal;
  int64_t blocks_per_row;  // 0: by density
  double density;
  bool by_head;            // each head has its own density, head_density [H]; causal or not, by row
  int64_t diagonal_reach;  // rows on each side of a query block whose key blocks are forced; or -1
  int first_blocks;
  int row_capacity;
  double head_density[kMostDensities];
};

// How plan_row runs: rows of scores of `rows` query blocks in shared memory, or, where one does not
// fit, in a slot of `workspace` for each of the `ctas` blocks of threads.
struct PlanRowConfig {
  bool stream;  // by plan_stream instead: none of what follows
  int rows;     // 8, 16 or 32
  int pitch;    // words in a row of scores
  bool in_workspace;
  bool coarse;  // the block-coarse state can be made along with the plan
  int ctas;
  int64_t workspace_bytes() const { return in_workspace ? int64_t{ctas} * rows * pitch * 4 : 0; }
};

PlanRowConfig plan_row_config(const PlanParams& params, const Device& device);
cudaError_t plan_row(const PlanParams& params, const PlanRowConfig& config, void* workspace,
                     cudaStream_t stream);

// Row selection from rows of more than a warp holds in registers; makes no coarse state.
bool plan_stream_fits(const PlanParams& params, const Device& device);
cudaError_t plan_stream(const PlanParams& params, cudaStream_t stream);

// Global selection, `budget` the pairs that a head may take. A map that one block of threads can
// hold, or on Hopper a cluster of them, is one launch, plan_map, which makes the block-coarse state
// too. Others go through a workspace `map` of [B, H, nq, nk] 4-byte words, nq * nk <= 2^30, and
// make no coarse state.
bool plan_map_fits(const PlanParams& params, const Device& device);
cudaError_t plan_map(const PlanParams& params, const Device& device, int64_t budget,
                     cudaStream_t stream);
cudaError_t plan_global(const PlanParams& params, const Device& device, int64_t budget,
                        uint32_t* map, cudaStream_t stream);

struct TransposeParams {
  const int32_t* row_start;  // [B * H, nq]
  const int32_t* row_count;  // [B * H, nq]
  const int32_t* row_index;  // [B * H, capacity]
  int32_t* start;            // [B * H, nk]
  int32_t* count;            // [B * H, nk]
  int32_t* index;            // [B * H, capacity]
  int32_t* queues;           // [2], set to zero
  int heads;                 // B * H
  int nq, nk;
  int64_t capacity;  // < 2^31
};

// Returns cudaErrorInvalidValue when one column's bits do not fit in shared memory.
cudaError_t plan_transpose(const TransposeParams& params, const Device& device,
                           cudaStream_t stream);

}  // namespace mra::cuda
