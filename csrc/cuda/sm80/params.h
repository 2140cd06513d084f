// What the attention kernels of sm80/ get: plain pointers and strides. No torch header here, so
// that nvcc takes seconds a file.
#pragma once

#include "../types.h"

namespace mra::cuda {

// Lists of blocks of each head (BlockList of common/stages.h).
struct Lists {
  const int* start;  // [B, H, lists]
  const int* count;  // [B, H, lists]
  const int* index;  // [B, H, capacity]
  int64_t capacity;
  int lists;
};

// Shared by every kernel. "Rows" are queries and "keys" are keys, or, for the block-coarse part,
// the means of query blocks and of key blocks: then list_rows is 1, exact is false and T is float.
struct Problem {
  int B, H, Hk;
  int rows;  // N, or nq
  int M, D;
  int nk;  // key blocks
  int block_q, block_k;
  int log2_block_k;
  int list_rows;  // rows that share one row list: block_q, or 1
  float scale;
  bool causal;
  bool exact;  // attend the listed key blocks, key by key
  // float32 only: one TF32 product instead of three, for scores and for everything else.
  bool tf32_scores, tf32;

  const void* q;  // [B, H, rows, D] T
  const void* k;  // [B, Hk, M, D] T
  const void* v;  // [B, Hk, M, D] T
  Strides q_strides, k_strides, v_strides;
  const uint8_t* key_mask;  // [B, M] or null
  const uint8_t* row_mask;  // [B, rows] or null

  const void* pooled_k;  // [B, Hk, nk, D] T, contiguous, or null: no pooled keys
  const void* pooled_v;  // [B, Hk, nk, D] T, contiguous
  const int* key_count;  // [B, nk]
  // [B, Hk, nk] or null: for how many keys a pooled one stands where that is not its block's count;
  // 0 for an empty block
  const float* pooled_mass;

  Lists row_lists;  // for each row list its key blocks

  unsigned* queue;  // sm90: a counter at zero, by which work is handed out
  // sm90: where heads have densities of their own, all batch entries of the head with the highest
  // one first, so that work ends with short items, and every block of threads has some of each.
  bool by_head;
  uint8_t head_order[kMostDensities];  // [H]
};

struct ForwardParams : Problem {
  const float* state_mean;  // [B, H, lists, D] or null: softmax starts empty
  const float* state_lse;   // [B, H, lists]
  void* out;                // [B, H, rows, D] T
  Strides out_strides;
  // [B, H, rows] or null: what is added to all pooled logits of a row, natural units; null where
  // the kernel makes it, from `centre`
  const float* row_bias;
  float* lse;    // [B, H, rows]
  float* share;  // [B, H, rows] or null: pooled (or state's) part of the row's mass
  // [B, Hk, 2, DP, DP] T or null: C and Sigma; the order-1 term is then added to `out`
  const void* moments;
  const float* moment_scales;  // [B, Hk, 2], float16 alone: what each is to be multiplied by
  // With moments of weighted means, else null: the centre, which is taken off every query; and its
  // products with C and Sigma, which are taken off those of the queries.
  const float* centre;       // [B, Hk, D]
  const float* centre_term;  // [B, Hk, 2, matrix_dim]
  // [B, H, rows, D] T or null: the order-1 term over the row's share, made beforehand
  const void* term;
  Strides term_strides;
};

struct BackwardParams : Problem {
  Lists column_lists;    // for each key block its row lists
  const void* grad_out;  // [B, H, rows, D] T
  Strides grad_out_strides;
  // [B, H, rows] lse in log2 units, +inf for a row without weight; for pooled keys less row_bias
  const float *lse2, *pooled_lse2;
  const float* delta;         // [B, H, rows]
  const float* pooled_delta;  // [B, H, rows]
  // The same for bulk copies, or null: [B, H, sum_chunks(rows), 2, 32], lse2 and delta of 32 rows,
  // +inf and 0 beyond the end
  const float *sums, *pooled_sums;

  bool beside;  // columns: may run beside the kernel launched before, which is backward_rows
  bool add;     // grad_q, grad_k and grad_v hold a part already: the rest is added to it

  // rows: grad_q [B, H, rows, D] T, plus what all rows of a block get, or of a head, where defined:
  // [B, q_block_heads, q_block_lists, D] for heads or key heads, and for each list or for all
  void* grad_q;
  const int* row_count;  // [B, rows] or null: the gradient is divided by it
  Strides grad_q_strides;
  const float* q_block;
  int q_block_heads, q_block_lists;
  // Sums of the gradients of pooled logits, or null. rows: [B, H, rows]. pooled columns, of 64
  // pooled keys each: [ceil(nk / 64), B, H, rows], not on every device.
  float* coarse_sum;

  // Hopper's exact columns: the order in which items are taken (ColumnOrder), or null: as they come
  const int* order;

  // exact columns: grad_k, grad_v [B, Hk, M, D] T, plus [B, Hk, nk, D] where defined
  void *grad_k, *grad_v;
  Strides grad_k_strides, grad_v_strides;
  const float *k_block, *v_block;

  // pooled columns: partial sums [splits, B, Hk, nk, D]
  float *pooled_grad_k, *pooled_grad_v;
  float* pooled_mass_grads;  // [splits, B, Hk, nk] or null: sums of the gradients of their logits
  int splits;

  // head: of q_block_heads.
  __host__ __device__ const float* q_block_of(int b, int head, int list) const {
    const int64_t from = static_cast<int64_t>(b) * q_block_heads + head;
    return q_block + (from * q_block_lists + (q_block_lists > 1 ? list : 0)) * D;
  }
};

// Runs of 32 rows of a head in BackwardParams::sums: those of whole tiles of 64, and of a tile that
// is beyond the end.
__host__ __device__ inline int64_t sum_chunks(int64_t rows) { return (rows + 63) / 64 * 2 + 2; }

// One function per dtype and padded head_dim, defined in sm80/instances/. `warps` of 16 rows (keys
// for the columns) a block of threads; 0 lets the kernel choose from what fits shared memory.
template <typename T, int DP>
cudaError_t launch_forward(const ForwardParams&, const Device& device, cudaStream_t);
template <typename T, int DP>
cudaError_t launch_backward_rows(const BackwardParams&, const Device& device, cudaStream_t);
template <typename T, int DP>
cudaError_t launch_backward_columns(const BackwardParams&, const Device& device, cudaStream_t);
template <typename T, int DP>
cudaError_t launch_backward_pooled(const BackwardParams&, const Device& device, cudaStream_t);

}  // namespace mra::cuda
