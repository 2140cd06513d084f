// Gradient of the rows (dQ): the same stream of keys as the forward, scores recomputed.
//   P = exp(S - lse), dS = P (dO V^T - delta), dQ = scale dS K
// One owner a row and a fixed order of keys: deterministic without atomics.
#pragma once

#include "keys.cuh"

namespace mra::cuda {

// Keys a tile: scores and their gradients live in registers beside the accumulator.
template <typename T, int DP>
inline constexpr int kBackwardKeys = sizeof(T) == 2 ? (DP <= 128 ? 64 : 32) : (DP <= 64 ? 32 : 16);

template <typename T, int DP>
__global__ void __launch_bounds__(256) backward_rows_kernel(const BackwardParams p) {
  constexpr int kKeys = kBackwardKeys<T, DP>, kLdT = kLd<T, DP>;
  constexpr float kLog2e = 1.4426950408889634f;
  extern __shared__ __align__(16) char smem[];

  const int tile_rows = blockDim.x / 2;
  const int row_tiles = (p.rows + tile_rows - 1) / tile_rows;
  const int row_tile = p.causal ? row_tiles - 1 - blockIdx.x % row_tiles : blockIdx.x % row_tiles;
  const int first_row = row_tile * tile_rows;
  const int b = blockIdx.x / row_tiles / p.H, h = blockIdx.x / row_tiles % p.H;
  const int rows = min(tile_rows, p.rows - first_row);
  const int64_t head = static_cast<int64_t>(b) * p.H + h;
  const int row = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4;

  T* q = reinterpret_cast<T*>(smem);
  T* grad_out = q + tile_rows * kLdT;
  KeyStream<T, DP, kKeys> keys(p, smem + sizeof(T) * 2 * tile_rows * kLdT, b, h, first_row, rows);
  auto load = [&](T* to, const void* from, const Strides& strides) {
    const T* base = static_cast<const T*>(from) + b * strides.b + h * strides.h;
    load_rows<T, DP, 0>(to, p.D, p.q, [&](int r) {
      return r < rows ? base + (first_row + r) * strides.l : nullptr;
    }, tile_rows);
  };
  load(q, p.q, p.q_strides);
  load(grad_out, p.grad_out, p.grad_out_strides);
  if (keys.tiles > 0) keys.fetch(0);
  else commit_copies();

  float lse[2], delta[2], pooled_delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + g + 8 * half;
    const int64_t i = head * p.rows + first_row + r;
    lse[half] = r < rows ? p.lse[i] * kLog2e : -INFINITY;
    // A row without weight: every exp(S - lse) is then zero.
    if (lse[half] == -INFINITY) lse[half] = INFINITY;
    delta[half] = r < rows ? p.delta[i] : 0.f;
    pooled_delta[half] = r < rows ? p.pooled_delta[i] : 0.f;
  }

  float acc[DP / 8][4] = {};
  for (int tile = 0; tile < keys.tiles; ++tile) {
    wait_for_copies();
    __syncthreads();
    if (tile + 1 < keys.tiles) keys.fetch(tile + 1);
    keys.find_granules(tile + 2);

    const T* k = keys.k_tiles + tile % 2 * keys.kTile;
    const T* v = keys.v_tiles + tile % 2 * keys.kTile;
    const bool pooled = tile < keys.pooled_tiles;
    float s[kKeys / 8][4] = {}, ds[kKeys / 8][4] = {};
    multiply_nt<T, DP>(s, q, row, k, kLdT, p.tf32);
    keys.to_logits(s, tile, row, p.scale * kLog2e);
    multiply_nt<T, DP>(ds, grad_out, row, v, kLdT, p.tf32);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float shift = pooled ? pooled_delta[i / 2] : delta[i / 2];
        ds[n][i] = exp2_approx(s[n][i] - lse[i / 2]) * (ds[n][i] - shift);
      }
    }
    multiply_pn<T>(acc, ds, k, kLdT, 0, p.tf32);
  }
  wait_for_copies();

#pragma unroll
  for (int n = 0; n < DP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] *= p.scale;
  }
  const int64_t list = head * p.row_lists.lists + first_row / p.list_rows;
  const T* extra = static_cast<const T*>(p.q_extra) + b * p.q_extra_strides.b + h * p.q_extra_strides.h;
  T* to = static_cast<T*>(p.grad_q) + b * p.grad_q_strides.b + h * p.grad_q_strides.h;
  store_rows<T>(
      acc, 0, p.D,
      [&](int r) {
        return row + r < rows ? to + (first_row + row + r) * p.grad_q_strides.l : nullptr;
      },
      [&](int r, int d) {
        const int i = first_row + row + r;
        float2 sum = make_float2(0.f, 0.f);
        if (p.row_mask != nullptr && !p.row_mask[static_cast<int64_t>(b) * p.rows + i]) return sum;
        if (p.q_block != nullptr) sum = *reinterpret_cast<const float2*>(p.q_block + list * p.D + d);
        if (p.q_extra != nullptr) {
          const T* e = extra + i * p.q_extra_strides.l + d;
          sum.x += to_float(e[0]);
          sum.y += to_float(e[1]);
        }
        return sum;
      });
}

template <typename T, int DP>
cudaError_t launch_backward_rows(const BackwardParams& p, int smem_limit, cudaStream_t stream) {
  auto needed = [&](int warps) {
    return sizeof(T) * 2 * warps * 16 * kLd<T, DP> +
           KeyStream<T, DP, kBackwardKeys<T, DP>>::shared_bytes(p, 32 * warps);
  };
  const int warps = row_warps(p, smem_limit, needed);
  return launch(backward_rows_kernel<T, DP>, p, row_blocks(p, warps), warps, needed(warps), stream);
}

}  // namespace mra::cuda
