// Row sums that the backward pass starts from: what delta.cpp hands to delta_bwd.cu.
#pragma once

#include "types.h"

namespace mra::cuda {

struct DeltaParams {
  const void* grad_out;  // [B, H, N, D], rows 16-byte aligned
  const void* out;       // [B, H, N, D], likewise
  Strides grad_stride, out_stride;
  const float* grad_lse;  // [B, H, N] with strides lse_stride, or null
  Strides lse_stride;
  float* delta;  // [B, H, N]
  int B, H;      // B * H * ceil(N / 32) < 2^31
  int64_t N;
  int D;
  Dtype dtype;
  bool beside;  // it may run beside the kernel launched before
};

struct BlockRowsParams {
  const void* grad_out;  // [B, H, N, D], rows 16-byte aligned
  Strides grad_stride;
  const float* lse;    // [B, H, N] contiguous
  const float* delta;  // [B, H, N] contiguous
  float* block_lse;    // [B, H, nq]
  float* block_grad;   // [B, H, nq, D]
  float* block_delta;  // [B, H, nq]
  int B, H, nq;        // B * H * nq < 2^31
  int64_t N;
  int D, block;
  Dtype dtype;
};

// The order in which the kernels of the columns take their items, each some keys of a block. A
// block of threads takes all rows of its keys, and some key blocks are in many lists of their key
// head, as a sink is: these come first, by classes (more than 8, 4, 2 times the mean). Where lists
// are long enough that rows may be read from memory once more, those in few (up to 7/8, 5/8) come
// last, so that all blocks of threads end at about the same time. Within a class items keep their
// order, head by head.
struct ColumnOrder {
  static constexpr int kClasses = 6, kLongLists = 8;  // kLongLists: entries, in the mean

  const int* count;  // [heads, lists]: entries of each key block's list
  int* order;        // [heads / group, items of a head], or null: not asked for
  int lists, group, items, all, items_block;  // items: of a head; in all; of a block
  int above[kClasses];  // a class has what has more entries than this and is in no class before
};

// What the attention kernels of the backward read of each row: lse in log2 units, with +inf for a
// row without weight (-inf or +inf), so that exp2(logit - lse2) is its weight in every case; and
// the same with delta as BackwardParams::sums. For pooled keys both may differ.
struct RowSumsParams {
  const float *lse, *delta, *pooled_delta;  // [heads, rows]
  const float* row_bias;                    // [heads, rows] or null: pooled lse is less this
  float *lse2, *pooled_lse2;                // [heads, rows]; the second where there is row_bias
  float *sums, *pooled_sums;                // [heads, chunks, 2, 32], or null
  int64_t heads, rows, chunks;
  bool beside;  // it may run beside the kernel launched before
  ColumnOrder columns;
};
cudaError_t row_sums(const RowSumsParams& params, cudaStream_t stream);

cudaError_t delta_backward(const DeltaParams& params, cudaStream_t stream);
// block >= 32: both for each query block, with one reading of dO from memory.
cudaError_t delta_and_block_rows_backward(const DeltaParams& delta, const BlockRowsParams& rows,
                                          cudaStream_t stream);
cudaError_t block_rows_backward(const BlockRowsParams& params, cudaStream_t stream);

}  // namespace mra::cuda
