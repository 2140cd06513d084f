// The order-1 term on CUDA: what order1.cpp hands to order1_*.cu. No torch header.
//
//   forward    gram (moments)  ->  sum  ->  rows
//   backward   gram (moments)  ->  sum  ->  rows  ->  gram (weighted)  ->  sum  ->  keys
//
// A unit is a run of rows with the same matrices: the whole head, or under causal as many rows as
// the larger block. `dim` is D padded to 32, 64, 128 or 256; matrices are padded with zeros.
// Matrices come in pairs: C and Sigma, or dC and dSigma. Their type is that of the operands of a
// matrix product: bfloat16 for bfloat16, float for the rest.
//
// With weighted means (centred.h) a query is the query less its centre, and some steps are apart:
//
//   forward    gram (moments)  ->  sum  ->  rows (variance)  ->  fine  ->  rows (term)
//   on Hopper  moments  ->  centre's products  ->  fine, which makes variance and term itself
//   backward   gram (moments)  ->  sum  ->  rows (delta)  ->  fine's rows  ->  row weights  ->
//              rows (gradient)  ->  gram (weighted)  ->  sum  ->  keys  ->  fine's columns
#pragma once

#include "types.h"

namespace mra::cuda {

// Sums over rows of left^T right, in one of two forms:
//   moments    left = k - k~, right = v - v~ and k - k~, at valid keys; both times the root of
//              weight[0] and of the block's count where that is set
//   weighted   left = q, right = weight[0] dO and weight[1] q; q less x_mean where that is set
struct Order1Gram {
  Dtype dtype;
  bool weighted, tf32;
  int B, heads, group;  // heads of the sums; `group` heads of the inputs are summed for each
  int L, D, dim;
  int unit, units;    // rows of a unit, units
  int steps, chunks;  // steps of order1_step_rows rows in a chunk, chunks of a unit

  const void *x, *y;  // [B, heads * group, L, D] T: k and v, or q and dO
  Strides x_strides, y_strides;

  const float *x_mean, *y_mean;  // moments: [B, heads, nk, D]; weighted: [B, heads, D] or null
  const uint8_t* mask;           // moments: [B, L] or null
  const int* key_count;          // [B, nk]
  int nk, block_shift;           // log2 of block_k

  // weighted: [B, heads * group, L]; moments: of each key in its block, [B, heads, nk <<
  // block_shift] or null
  const float* weight[2];

  float* sums;     // [B, heads, units, chunks, 2, dim, dim], or null for one unit of one chunk:
  void* matrices;  // then [B, heads, 1, 2, dim, dim], over the number of valid keys
  float factor;    // ... and the second one times this
};

// Partial sums to matrices. One unit: the sum over its chunks over n. Causal, one chunk a unit:
// forward, the sum over the units before each, over n (the valid keys of those); backward, the sum
// over the units behind each, every one over its own n.
struct Order1Sum {
  Dtype dtype;
  bool causal, backward;
  int B, heads, units, chunks, dim;
  const int* key_count;  // [B, nk]
  int nk, unit_blocks;   // key blocks in a unit
  float* sums;           // [B, heads, units, chunks, 2, dim, dim]
  void* matrices;        // [B, heads, units, 2, dim, dim]
  float factor;          // of the second matrix
};

// `count` matrices -> float16, each times a power of two that brings its largest value to 2^14 at
// most, and what undoes that.
cudaError_t order1_round(const float* matrices, void* rounded, float* scales, int64_t count,
                         int dim, cudaStream_t stream);

// Products of rows with the matrices of their unit; CTA `part` of a unit takes part_rows of them.
struct Order1Products {
  Dtype dtype;
  bool tf32;
  int B, H, Hk, L, D, dim;
  int unit, units, parts, part_rows, warps;
  const void* matrices;  // [B, Hk, units, 2, dim, dim]
};

// What a launch of rows does.
enum class RowsStep {
  term,      // adds gamma P u to out
  backward,  // all of the backward pass
  // With weighted means:
  variance,  // t and row_bias
  delta,     // t, row_bias, slope and coarse_delta
  gradient,  // adds to grad_q, from weights that are given
};

struct Order1Rows : Order1Products {
  RowsStep step;
  bool add;  // backward: grad_q holds a part already
  float scale;
  const void* q;  // [B, H, N, D] T
  Strides q_strides;
  const float* share;  // [B, H, N]
  // Forward, where more than one: `count` resolutions at once, each with matrices, so many elements
  // behind those of the one before, and a share: [B, H, count, N].
  int count;
  int64_t next_matrices;

  // Weighted means, else null.
  const float* centre;         // [B, Hk, D]
  const uint8_t* mask;         // [B, N] or null
  float *variance, *row_bias;  // [B, H, N]: t and log(1 + gamma t / 2)
  float* slope;                // [B, H, N]: gamma u.dO
  const float* shift;          // [B, Hk, dim]: what every valid query gets

  void* out;  // forward: [B, H, N, D] T, added to
  Strides out_strides;

  const void* grad_out;  // backward: [B, H, N, D] T
  Strides grad_out_strides;
  const float* delta;          // [B, H, N]
  float* coarse_delta;         // [B, H, N]: delta - gamma u.dO
  float *weight_c, *weight_s;  // [B, H, N]: the weights of the weighted gram, a and b
  void* grad_q;                // [B, H, N, D] T
  Strides grad_q_strides;
};

struct Order1Keys : Order1Products {
  bool add;           // grad_k and grad_v hold a part already
  const void *k, *v;  // [B, Hk, M, D] T
  Strides k_strides, v_strides;
  const float *k_mean, *v_mean;  // [B, Hk, nk, D]
  const uint8_t* mask;           // [B, M] or null
  int nk, block_shift;           // log2 of block_k
  // Weighted means, else null: of each key within its block, [B, Hk, nk << block_shift]; the counts
  // of blocks, [B, nk]; and the gradients of the pooled keys and values, [2, B, Hk, nk, D].
  const float *weights, *shares;
  const int* key_count;
  void *grad_k, *grad_v;  // [B, Hk, M, D] T, with weighted means float32
  Strides grad_k_strides, grad_v_strides;
};

// How a launch fits a device; dim is padded.
int order1_step_rows(Dtype dtype, int dim);
int order1_gram_slots(Dtype dtype, int dim, const Device& device);  // chunks that run at once
// Most warps of 16 rows that a CTA of rows or keys may have.
int order1_rows_warps(Dtype dtype, int dim, RowsStep step, const Device& device);
int order1_keys_warps(Dtype dtype, int dim, const Device& device);
// Resolutions that rows may take at once in the forward pass, with so many warps.
int order1_rows_most(Dtype dtype, int dim, int warps, const Device& device);

cudaError_t order1_gram(const Order1Gram& params, cudaStream_t stream);
cudaError_t order1_sum(const Order1Sum& params, cudaStream_t stream);
// In place: the sums of each chunk, [heads, chunks, 2, dim, dim], become those of the chunks before
// it, or (behind) of those behind it.
cudaError_t order1_sum_others(float* sums, int64_t heads, int chunks, int dim, bool behind,
                              cudaStream_t stream);
cudaError_t order1_rows(const Order1Rows& params, cudaStream_t stream);
cudaError_t order1_keys(const Order1Keys& params, cudaStream_t stream);

}  // namespace mra::cuda
