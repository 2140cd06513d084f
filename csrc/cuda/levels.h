// Calls with levels on CUDA: what levels.cpp hands to pool_levels.cu, plan_levels.cu and
// coarse_levels.cu. No torch header. Common words: common/levels.h.
#pragma once

#include "plan.h"
#include "sm80/cells.h"

namespace mra::cuda {

// Sums over the blocks of a resolution -> the same over those of the next, `children` each.
struct PoolLevel {
  const float* from;      // [B, heads, from_stride, D]: means of the first n_from blocks
  const int* from_count;  // [B, from_count_stride]
  float* to;              // [B, heads, to_stride, D]
  int* to_count;          // [B, to_stride], or null: not asked for
  int64_t from_stride, from_count_stride, to_stride;  // blocks of a head
  int B, heads, D, n_from, n, children;
};
cudaError_t pool_level(const PoolLevel& params, cudaStream_t stream);

// What the blocks of all resolutions give to each of block_q or block_k: to[y] is the sum of the
// parts of those that hold y.
struct SpreadLevels {
  int count;                           // resolutions
  const float* part[kMaxResolutions];  // [heads, stride, D]
  int64_t stride[kMaxResolutions];     // blocks of a head
  int shift[kMaxResolutions];          // log2 of the blocks that one holds
  float* to;                           // [heads, n, D]
  int64_t heads;
  int n, D;
};
cudaError_t spread_levels(const SpreadLevels& params, cudaStream_t stream);

// BlockRows of common/stages.h: of `children` blocks -> of the one that holds them.
struct MergeBlockRows {
  const float *from_lse, *from_grad, *from_delta;  // [heads, n_from], [.., D], [heads, n_from]
  float *lse, *grad, *delta;                       // [heads, n], [.., D], [heads, n]
  int64_t heads;
  int n_from, n, children, D;
};
cudaError_t merge_block_rows(const MergeBlockRows& params, cudaStream_t stream);

// Parts of the gradients of the means of resolution r, by query block of the next coarser one
// (CellsBackward) -> what every row of a key block gets, added to what is there.
struct CellsSum {
  Levels levels;
  Lists parents;      // columns of the next coarser resolution, of the cells that have places
  const float* sums;  // [2, B, H, blocks, splits, places, D]: keys, values
  float* shares;      // [2, B, Hk, nk, D]: divided by the count of the block
  int r, B, H, Hk, D, splits, places;
};
cudaError_t cells_sum(const CellsSum& params, cudaStream_t stream);

// The coarse part of a row's mass -> those of each resolution: shares[r] = share * parts[r].
struct SplitShares {
  const float* share;  // [heads, N]
  const float* parts;  // [heads, nq, count]
  float* shares;       // [heads, count, N]
  int64_t heads, N;
  int nq, block_q, count;
};
cudaError_t split_shares(const SplitShares& params, cudaStream_t stream);

// Selection within one resolution; the lists of the next coarser one are there. `plan` holds what
// plan_params gives for the blocks of this resolution, with row_capacity and, above block_size,
// blocks_per_row those of the level; its pointers are to what all resolutions have together.
struct PlanLevel {
  PlanParams plan;
  Levels levels;
  int r;
  int64_t first;        // keys whose cells are forced
  int parent_capacity;  // room for the list of a row one resolution up
  int64_t capacity;     // of a head's row lists
  int64_t offset;       // of the first list of this resolution
};
// A row of scores is as long as its candidates: in shared memory, or, where one doesn't fit, in a
// workspace of bytes(params, device) for a few blocks of threads.
int64_t plan_level_workspace(const PlanLevel& params, const Device& device);
cudaError_t plan_level(const PlanLevel& params, void* workspace, const Device& device,
                       cudaStream_t stream);

// coarse = block with levels, float32 throughout. Means of the blocks of all resolutions.
struct CoarseLevels {
  Levels levels;
  int B, H, Hk, D;
  float scale;
  const float* q_mean;           // [B, H, query_blocks, D]
  const float *k_mean, *v_mean;  // [B, Hk, key_blocks, D]
};
struct CoarseLevelsForward : CoarseLevels {
  float *row_mean, *row_lse;  // [B, H, query_blocks, D], [B, H, query_blocks]: of the rows of cells
  // CoarseState of common/stages.h
  float *mean, *lse, *parts;
};
struct CoarseLevelsBackward : CoarseLevels {
  const float *lse, *grad_out, *delta;  // BlockRows, of the blocks of all resolutions
  const int* q_count;                   // [B, query_blocks]
  Lists columns[kMaxResolutions];       // of each resolution
  // Gradients divided by the counts, laid out as the means.
  float *grad_q, *grad_k, *grad_v;
};
cudaError_t coarse_levels(const CoarseLevelsForward& params, cudaStream_t stream);
cudaError_t coarse_levels_backward(const CoarseLevelsBackward& params, cudaStream_t stream);

}  // namespace mra::cuda
