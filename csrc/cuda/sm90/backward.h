// Hopper's kernels of the backward; see forward.h.
#pragma once

#include "../sm80/params.h"
#include "order1_keys.h"

namespace mra::cuda::sm90 {

// Half types, head dims up to DP = 64 or 128, pooled also 192 and 256. Rows: query blocks of a
// multiple of 64 rows, pooled: of 32. Columns: key blocks of a multiple of 64 keys.
template <typename T, int DP>
cudaError_t launch_backward_rows(const BackwardParams&, const Device&, cudaStream_t);
template <typename T, int DP>
cudaError_t launch_backward_columns(const BackwardParams&, const Device&, cudaStream_t);
template <typename T, int DP>
cudaError_t launch_backward_pooled(const BackwardParams&, const Device&, cudaStream_t);
// Columns and with them order 1 of the keys: bfloat16, key blocks of 64, DP = 64, not causal. Of
// `order1` what belongs to keys is read from BackwardParams; `shares` are its k_block and v_block.
struct ColumnsOrder1 : BackwardParams {
  Order1Keys order1;
};
template <int DP>
cudaError_t launch_backward_columns_order1(const ColumnsOrder1&, const Device&, cudaStream_t);
// With weighted means, what is made of each row but fine's part, in one reading: delta, gradients
// of pooled keys and values, order 1, and all that these give to grad_q. bfloat16, DP = 64, at most
// kPooledOrder1Keys pooled keys, not causal. Of each key head H / Hk times `chunks` parts are
// summed.
constexpr int kPooledOrder1Keys = 64;
struct PooledOrder1 : BackwardParams {
  const void* out;  // [B, H, N, D] bfloat16
  Strides out_strides;
  const float *lse, *share;  // [B, H, N]
  const float* grad_lse;     // [B, H, N] with strides lse_strides, or null
  Strides lse_strides;
  const void* moments;  // [B, Hk, 2, dim, dim] bfloat16: C and Sigma
  // The centre, [B, Hk, D], and its products with C and Sigma, [B, Hk, 2, dim].
  const float *centre, *centre_term;
  int chunks;  // of a query head

  float* made_delta;  // [B, H, N]
  // Parts of what the centre gets of rows, [B, H, chunks, D], and of dC and dSigma,
  // [B, H, chunks, 2, dim, dim]; these null where a key head is one part, then [B, Hk, 2, dim, dim]
  // bfloat16.
  float *row_sums, *matrix_sums;
  void* moment_grads;
};
template <int DP>
cudaError_t launch_backward_pooled_order1(const PooledOrder1&, const Device&, cudaStream_t);
// The same for head dims beyond 128, DP = 192 or 256; rows without their coarse_sum.
template <typename T, int DP>
cudaError_t launch_backward_rows_wide(const BackwardParams&, const Device&, cudaStream_t);
template <typename T, int DP>
cudaError_t launch_backward_columns_wide(const BackwardParams&, const Device&, cudaStream_t);
// Query blocks of 32 rows; key blocks of 32 keys. DP = 64 or 128.
template <typename T, int DP>
cudaError_t launch_backward_rows_short(const BackwardParams&, const Device&, cudaStream_t);
template <typename T, int DP>
cudaError_t launch_backward_columns_short(const BackwardParams&, const Device&, cudaStream_t);

}  // namespace mra::cuda::sm90
