// What the kernels of calls with levels get, beside params.h. Common words: common/levels.h.
#pragma once

#include "params.h"

namespace mra::cuda {

constexpr int kMaxResolutions = 26;  // block_size, and powers of two from 64 to 2^30

struct ResolutionBlocks {
  int log2_q, log2_k;    // of the rows in a block
  int nq, nk;            // its blocks
  int first_q, first_k;  // where they stand among those of all resolutions
};

// The finest resolution first.
struct Levels {
  int count;                     // resolutions
  int query_blocks, key_blocks;  // of all of them
  bool causal;
  ResolutionBlocks at[kMaxResolutions];
  Lists rows;            // lists of all resolutions: first_q + x is that of query block x
  const int* key_count;  // [B, key_blocks]
};

// coarse = row: pooled_k and pooled_v are [B, Hk, key_blocks, D].

// Goes on from `out` and `lse`, which hold what exact attention leaves there.
struct CellsForward : ForwardParams {
  Levels levels;
  float* shares;  // [B, H, count, rows] or null: each resolution's part of a row's mass
};

// Rows: grad_q. Columns: partial sums of the gradients of one resolution's means. Candidates: those
// of each query block of the next coarser resolution apart, pooled_grad_k and pooled_grad_v
// [B, H, blocks, splits, places, D], of the first of its candidates.
struct CellsBackward : BackwardParams {
  Levels levels;
  int64_t delta_stride;  // of pooled_delta from one resolution to the next; 0: the same for all
  int r;
  Lists chosen, parents;  // columns of resolution r, which is not the coarsest, and of the next
  int places;
};

template <typename T, int DP>
cudaError_t launch_cells_forward(const CellsForward&, const Device& device, cudaStream_t);
template <typename T, int DP>
cudaError_t launch_cells_rows(const CellsBackward&, const Device& device, cudaStream_t);
template <typename T, int DP>
cudaError_t launch_cells_candidates(const CellsBackward&, const Device& device, cudaStream_t);
template <typename T, int DP>
cudaError_t launch_cells_columns(const CellsBackward&, const Device& device, cudaStream_t);

}  // namespace mra::cuda
