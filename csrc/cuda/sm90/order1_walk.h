// Order 1 on Hopper where a block of threads walks a chunk of a key head's tiles of 64 rows with
// moments in registers. Every unit of rows (as many as the larger block) has moments
// of its own, those of the key blocks before it: the keys of each tile are added on the way, and
// what a chunk starts from are the sums of the other chunks, made by a pass before. See forward.h.
//
//   forward    moments -> sum -> rows
//   backward   moments -> sum -> rows -> keys (sums) -> sum -> keys
//
// With weighted means (../centred.h) a query is the query less the centre of its block, a key's
// deviation has the root of weight and count, and the rows are walked before fine, which adds the
// term that they leave:
//
//   forward    moments -> sum -> rows (prepare) -> fine
//   backward   moments -> sum -> rows (slope) -> fine's pooled columns -> row weights
//              -> rows (gradient) -> keys (sums) -> sum -> keys -> fine's rows -> fine's columns
#pragma once

#include "../types.h"

namespace mra::cuda::sm90 {

struct WalkChunks {
  Dtype dtype;  // T: bf16; in the forward pass also f16
  int B, H, Hk, N, D;
  int nk, log2_block_k;
  int unit_tiles;  // tiles of a unit: 1 or 2
  int chunks;      // of a head: see chunk_tiles

  // [B, Hk, N, D] T, and which keys count, [B, N] or null
  const void *k, *v;
  Strides k_strides, v_strides;
  const uint8_t* mask;
  // [B, H, N, D] T
  const void *q, *grad_out;  // grad_out: backward, else null
  Strides q_strides, grad_out_strides;
  // [B, H, 64 ceil(N / 64), 2]: over the number of keys before the row, a and b of order1_rows.cuh.
  float* weights;
  // Weighted means, else null: of each key in its block, [B, Hk, nk << log2_block_k]; the centre
  // before each block of queries, [B, Hk, nq + 1, D]; which queries count, [B, N] or null.
  const float *key_weights, *centre;
  const uint8_t* query_mask;
  int nq, log2_block_q;
  // [B, Hk, chunks, 2, dim, dim]: sums of the chunks before (rows) or behind (keys) each; null for
  // one chunk.
  const float* start;
};

enum class WalkStep {
  term,      // adds gamma P u to out
  backward,  // all of the rows of the backward pass
  // With weighted means:
  prepare,   // t and row_bias; gamma u to out
  slope,     // t, row_bias, slope and coarse_delta
  gradient,  // from a and b: grad_q, and what the centres get of each 16 rows
};

struct WalkRows : WalkChunks {
  WalkStep step;
  bool causal;           // else of WalkWide alone
  const int* key_count;  // [B, nk]
  const float* share;    // [B, H, N]
  float scale;
  void* out;  // forward: [B, H, N, D] T, added to
  Strides out_strides;

  const float* delta;   // backward, slope: [B, H, N]
  float* coarse_delta;  // [B, H, N]
  void* grad_q;         // [B, H, N, D] bfloat16
  Strides grad_q_strides;
  bool add;  // gradient: grad_q holds a part already

  float *variance, *row_bias;  // prepare, slope: [B, H, N]
  float* slope;                // slope: [B, H, N]
  const float *a, *b;          // gradient: [B, H, N]
  float* row_sums;             // gradient: [B, H, 4 ceil(N / 64), D]
};

struct WalkKeys : WalkChunks {
  float* sums;            // [B, Hk, chunks, 2, dim, dim]: those of each chunk's rows; else null and
  void *grad_k, *grad_v;  // [B, Hk, N, D] bfloat16
  Strides grad_k_strides, grad_v_strides;
  // Weighted means: gradients of the pooled keys and values, [2, B, Hk, nk, D], and of the log
  // masses of blocks, [B, Hk, nk]; of logits; and what the centres get of each 16 keys, [B, Hk,
  // 4 ceil(N / 64), D].
  const float *shares, *mass_grad;
  float scale;
  float* key_sums;
};

// Head dims up to DP = 64 or 128, key blocks of 16, 32 or 64.
template <int DP>
cudaError_t launch_order1_walk_rows(const WalkRows&, const Device&, cudaStream_t);
template <int DP>
cudaError_t launch_order1_walk_keys(const WalkKeys&, const Device&, cudaStream_t);

// Head dims from 136 to 256 in the forward pass. A block of threads has 128 columns of C or of
// Sigma.
enum class WideStep {
  sums,      // of each chunk of keys, of all columns of both
  variance,  // parts of q Sigma q^T / n
  term       // added to out
};
struct WalkWide : WalkRows {
  WideStep step;
  int M;  // keys; N under causal
  int slots;
  // [C and Sigma, columns, B, Hk, slots, rows, 128, 128], columns and rows in two halves: sums of
  // chunks, then of all before each. Without causal the last slot is that of all keys. Null under
  // causal for one chunk.
  float* sums;
  float* variance;  // [columns, B, H, N]
};
template <typename T>
cudaError_t launch_order1_walk_wide(const WalkWide&, const Device&, cudaStream_t);

}  // namespace mra::cuda::sm90
