// Means of blocks that weigh keys as the queries do: what centred.cpp hands to centred_*.cu. No
// torch header.
//
//   sample (mean query, sampled queries)  ->  lse of their logits  ->  weights of the keys
#pragma once

#include "types.h"

namespace mra::cuda {

// Under causal there is a centre before each of the nq blocks of queries and one behind the last:
// the mean of the queries there. A block of keys has that of the first block of queries that sees
// it.
struct Centres {
  int nq, log2_block_q, log2_block_k;
#ifdef __CUDACC__
  __host__ __device__
#endif
      int
      of_keys(int y) const {
    const long long end = static_cast<long long>(y + 1) << log2_block_k;
    const long long x = (end + (1 << log2_block_q) - 1) >> log2_block_q;
    return x < nq ? static_cast<int>(x) : nq;
  }
};

struct CausalCentresParams {
  const float* mean;  // [B, H, nq, D]: of blocks of queries
  const int* count;   // [B, nq]
  float* centre;      // [B, Hk, nq + 1, D]
  int B, H, Hk, D, nq;
};
cudaError_t causal_centres(const CausalCentresParams& params, cudaStream_t stream);

constexpr int kSampledQueries = 14;
// Rows whose logits make the weights: the mean query rounded to T, what that lost, and the sampled
// queries. Products take eight rows at a time.
constexpr int kMeanRows = 2, kSampleRows = kMeanRows + kSampledQueries;
static_assert(kSampleRows % 8 == 0);

// Queries evenly spread among the valid ones of a group of heads, one head after another, and the
// mean of all of them.
struct SampleParams {
  const void* q;  // [B, H, N, D] T
  Strides q_strides;
  const float* mean;    // [B, H, nq, D]: of blocks
  const int* count;     // [B, nq]
  const uint8_t* mask;  // [B, N] or null
  float* centre;        // [B, Hk, D]
  void* rows;           // [B, Hk, kSampleRows, D] T
  // [B, Hk, kSampleRows]: what is added to the lse of a row, log2 units; +inf: no such row
  float* offsets;
  Dtype dtype;
  int B, H, Hk, N, D, nq, log2_block_q;
};
cudaError_t sample_queries(const SampleParams& params, cudaStream_t stream);

struct WeightsParams {
  const void* k;  // [B, Hk, M, D] T
  Strides k_strides;
  const uint8_t* mask;   // [B, M] or null
  const void* rows;      // [B, Hk, kSampleRows, D] T
  const float* offsets;  // [B, Hk, kSampleRows]
  // [B, Hk, chunks, kSampleRows]: greatest logit, and the sum of exponentials less that; log2
  // units. Null: the weights are those of the mean query alone.
  float2* parts;
  float* weights;   // [B, Hk, nk * block_k]
  float* mass;      // [B, Hk, nk]: exp of the entropy of a block's weights, 0 for an empty block
  float* key_bias;  // [B, Hk, nk] or null: what a plan adds to the scores of a block
  int* count;       // [B, nk] or null
  Dtype dtype;
  bool tf32;
  int B, Hk, M, D, nk, log2_block_k;
  int chunks, chunk_blocks;  // parts of a head, and key blocks in one
  float scale;
  const float* centre;  // [B, Hk, nq + 1, D]: under causal, where rows are not read
  Centres centres;
};
// Blocks of threads that run at once.
int key_weights_slots(Dtype dtype, const Device& device);
cudaError_t sample_lse(const WeightsParams& params, cudaStream_t stream);
cudaError_t key_weights(const WeightsParams& params, cudaStream_t stream);
cudaError_t causal_key_weights(const WeightsParams& params, cudaStream_t stream);

// Order 1 of the backward pass, between fine's gradients of the rows and the moments':
//
//   a = P gamma s     b = s^2 dt     (docs/algorithm.md), dt also by the factor of the mass
//
// and their sums a dO and b (q - centre).
struct RowWeightsParams {
  const void *q, *grad_out;  // [B, H, N, D] T
  Strides q_strides, grad_out_strides;
  const float *share, *variance, *slope, *coarse_sum;  // [B, H, N]
  const float* centre;                                 // [B, Hk, D], or null for zeros
  float *a, *b;                                        // [B, H, N]
  float* sums;                                         // [B, H, parts, 2, D], or null
  Dtype dtype;
  int B, H, Hk, N, D, parts, part_rows;
  float scale;
};
constexpr int kRowWeightsRows = 128;  // of a part, at most
cudaError_t row_weights(const RowWeightsParams& params, cudaStream_t stream);

// Products of vectors of each key head with its matrices C and Sigma: without `sums` the centre
// times either, for `dim` up to 128; with them, where the sums of a part are x and y,
//
//   shift = -(x C^T + 2 y Sigma) / n     what every valid query of a group of n gets
struct CentreProductsParams {
  const void* matrices;  // [B, Hk, 2, dim, dim] of dtype
  const float* centre;   // [B, Hk, D]
  const float* sums;     // [B, H, parts, 2, D] or null
  const int* count;      // [B, nq]: valid queries
  float* result;         // [B, Hk, 2, dim], shift [B, Hk, dim]; zeros beyond D
  Dtype dtype;
  int B, H, Hk, D, dim, parts, nq;
  bool beside;  // without sums: it may run beside the kernel launched before
};
cudaError_t centre_products(const CentreProductsParams& params, cudaStream_t stream);

// Under causal: -(x C^T + 2 y Sigma), what order 1 gives to the centre before each block of
// queries, x and y the sums over the heads of a group.
struct CausalProductsParams {
  const void* matrices;  // [B, Hk, units, 2, dim, dim] of dtype
  const float* sums;     // [B, H, nq, 2, D]
  float* result;         // [B, Hk, nq, D]
  Dtype dtype;
  int B, H, Hk, D, dim, nq, units, log2_unit_blocks;  // of queries in a unit
};
cudaError_t causal_products(const CausalProductsParams& params, cudaStream_t stream);

// Gradients of keys and values through weighted means and their weights, and what the centre gets
// of each block.
struct KeyWeightsBackwardParams {
  const void *k, *v;  // [B, Hk, M, D] T
  Strides k_strides, v_strides;
  // [B, Hk, M, D]: what `shares` and the moments' gradients give by the weights, or null without
  // moments, where it is made here. For float32 these may be grad_k and grad_v.
  const float *part_k, *part_v;
  Strides part_k_strides, part_v_strides;
  void *grad_k, *grad_v;  // [B, Hk, M, D] T, written
  Strides grad_k_strides, grad_v_strides;
  const float* weights;          // [B, Hk, nk * block_k]
  const float *k_mean, *v_mean;  // [B, Hk, nk, D], weighted
  const float* shares;           // [2, B, Hk, nk, D]: gradients of these
  const float* mass_grad;        // [B, Hk, nk]: of the log masses
  const float* centre;           // [B, Hk, D] or, under causal, [B, Hk, nq + 1, D]
  float* sums;                   // [B, Hk, nk, D]
  bool causal;
  Centres centres;
  Dtype dtype;
  int B, Hk, M, D, nk, log2_block_k;
  float scale;
};
cudaError_t key_weights_backward(const KeyWeightsBackwardParams& params, cudaStream_t stream);

// The centre's gradient, summed over parts, as every valid query of its group gets it.
struct CentreGradParams {
  const float* sums;      // [B, Hk, parts, D]
  const float* row_sums;  // [B, Hk, row_parts, D] or null
  const int* count;       // [B, nq]: valid queries
  float* centre_grad;     // [B, Hk, D]
  int B, H, Hk, D, nq, parts, row_parts;
};
cudaError_t centre_grad(const CentreGradParams& params, cudaStream_t stream);

// The same under causal, for the queries of each block: of all centres behind it.
struct CausalCentreGradParams {
  // Of the centres before each block of queries: [B, Hk, row_heads, row_parts, D] or null; a block
  // has 2^log2_parts parts.
  const float* of_rows;
  int row_heads, row_parts, log2_row_parts;
  // What each block of keys gives to its centre: [B, Hk, key_parts, D], a block has
  // 2^log2_key_parts.
  const float* of_keys;
  int key_parts, log2_key_parts;
  const int* count;    // [B, nq]: valid queries
  float* centre_grad;  // [B, Hk, nq, D]
  int B, H, Hk, D, nk;
  Centres centres;
};
cudaError_t causal_centre_grad(const CausalCentreGradParams& params, cudaStream_t stream);

// to_i = from_i + sign shift of its block, for valid queries; others are zeros, or if `to` is
// `from`, stay.
struct ShiftQueriesParams {
  const void* from;  // [B, H, N, D] T
  void* to;          // [B, H, N, D] T
  Strides from_strides, to_strides;
  const float* shift;   // [B, Hk, shifts, D]: of the first blocks of queries
  const uint8_t* mask;  // [B, N] or null
  Dtype dtype;
  int B, H, Hk, N, D, shifts, log2_block_q;
  float sign;
};
cudaError_t shift_queries(const ShiftQueriesParams& params, cudaStream_t stream);

}  // namespace mra::cuda
