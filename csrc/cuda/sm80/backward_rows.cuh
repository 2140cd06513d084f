// Gradient of the rows (dQ): the same stream of keys as the forward, scores recomputed.
//   P = exp(S - lse), dS = P (dO V^T - delta), dQ = scale dS K
// One owner a row and a fixed order of keys: deterministic without atomics.
#pragma once

#include "keys.cuh"

namespace mra::cuda {

// Keys a tile: scores and their gradients live in registers beside the accumulator.
template <typename T, int DP, int kWarps>
inline constexpr int kBackwardKeys = sizeof(T) == 2 ? (DP <= 64    ? (kWarps <= 2 ? 32 : 64)
                                                       : DP <= 128 ? 64
                                                                   : 32)
                                                    : (DP <= 64 ? 32 : 16);

template <typename T, int DP, int kWarps>
inline constexpr int kRowsRegisters = sizeof(T) == 2 && DP <= 64 ? (kWarps <= 2 ? 128 : 168) : 255;

// Of the rows of a tile: lse (log2 units) and delta for pooled keys and for the others, and the
// sums of the gradients of pooled logits so far.
template <int kRows>
struct RowState {
  float lse[2][kRows], delta[2][kRows], coarse[kRows];
};

template <typename T, int DP, int kWarps>
__global__ void __maxnreg__((kRowsRegisters<T, DP, kWarps>))
    backward_rows_kernel(const BackwardParams p) {
  constexpr int kKeys = kBackwardKeys<T, DP, kWarps>, kLdT = kLd<T, DP>;
  extern __shared__ __align__(16) char smem[];

  constexpr int tile_rows = 16 * kWarps;
  const unsigned row_tiles = (p.rows + tile_rows - 1) / tile_rows;
  const unsigned bh = blockIdx.x / row_tiles, from_start = blockIdx.x - bh * row_tiles;
  const int first_row = (p.causal ? row_tiles - 1 - from_start : from_start) * tile_rows;
  const int b = bh / static_cast<unsigned>(p.H), h = bh - b * p.H;
  const int rows = min(tile_rows, p.rows - first_row);
  const int64_t head = static_cast<int64_t>(b) * p.H + h;
  const int row = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4;

  T* q = reinterpret_cast<T*>(smem);
  T* grad_out = q + tile_rows * kLdT;
  auto load = [&](T* to, const void* from, const Strides& strides) {
    copy_sixteen<T, DP>(to + row * kLdT,
                        static_cast<const T*>(from) + b * strides.b + h * strides.h, strides.l,
                        first_row + row, rows - row, p.D, p.q);
  };
  load(q, p.q, p.q_strides);
  load(grad_out, p.grad_out, p.grad_out_strides);
  RowState<tile_rows>& sums = *reinterpret_cast<RowState<tile_rows>*>(grad_out + tile_rows * kLdT);
  for (int r = threadIdx.x; r < tile_rows; r += 32 * kWarps) {
    const int64_t i = head * p.rows + first_row + r;
    sums.lse[0][r] = r < rows ? p.pooled_lse2[i] : INFINITY;
    sums.delta[0][r] = r < rows ? p.pooled_delta[i] : 0.f;
    sums.lse[1][r] = r < rows ? p.lse2[i] : INFINITY;
    sums.delta[1][r] = r < rows ? p.delta[i] : 0.f;
  }
  KeyStream<T, DP, kKeys, kWarps> keys(p, reinterpret_cast<char*>(&sums + 1), b, h, first_row,
                                       rows);
  float lse[2] = {}, delta[2] = {};  // of pooled keys, then of the others

  constexpr bool kKeepRows = sizeof(T) == 2 && DP <= 64;  // both stay in registers
  Fragments<T, kKeepRows ? DP : Mma<T>::kStep> q_rows, grad_rows;

  float acc[DP / 8][4] = {};
  // Turn -1 only fetches the first tile.
#pragma unroll 1
  for (int tile = -1; tile < keys.tiles; ++tile) {
    if (tile >= 0) {
      wait_for_copies();
      __syncthreads();
    }
    keys.ahead(tile + 1);
    if (tile < 0) continue;
    if (kKeepRows && tile == 0) {
      q_rows.load(q, kLdT, row);
      grad_rows.load(grad_out, kLdT, row);
    }

    const T* k = keys.k_tiles + tile % 2 * keys.kTile;
    const T* v = keys.v_tiles + tile % 2 * keys.kTile;
    const bool pooled = tile < keys.pooled_tiles;
    if (tile == 0 || tile == keys.pooled_tiles) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        lse[half] = sums.lse[!pooled][row + g + 8 * half];
        delta[half] = sums.delta[!pooled][row + g + 8 * half];
      }
    }
    float s[kKeys / 8][4] = {}, ds[kKeys / 8][4];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[n][i] = -delta[i / 2];
    }
    if constexpr (kKeepRows) {
      multiply_nt<T, DP>(s, q_rows, k, kLdT, p.tf32_scores);
      multiply_nt<T, DP>(ds, grad_rows, v, kLdT, p.tf32);
    } else {
      multiply_nt<T, DP>(s, q, row, k, kLdT, p.tf32_scores);
      multiply_nt<T, DP>(ds, grad_out, row, v, kLdT, p.tf32);
    }
    float scale = p.scale * kLog2e;
    if (!keys.plain) {
      keys.to_logits(s, tile, row, scale);
      scale = 1.f;
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[n][i] *= exp2_approx(fmaf(s[n][i], scale, -lse[i / 2]));
    }
    if (pooled && p.coarse_sum != nullptr) {
      sum_columns(ds, sums.coarse + row, tile, keys.pooled_tiles,
                  p.coarse_sum + head * p.rows + first_row + row, rows - row);
    }
    multiply_pn<T>(acc, ds, k, kLdT, 0, p.tf32);
  }
  wait_for_copies();

  // A row's share of a mean's gradient comes on top, or, for means, is all that is asked for.
  bool live[2];
  float scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + g + 8 * half;
    const int64_t i = static_cast<int64_t>(b) * p.rows + first_row + r;
    live[half] = r < rows && (p.row_mask == nullptr || p.row_mask[i]);
    scale[half] = p.scale;
    if (p.row_count != nullptr && r < rows) scale[half] /= max(1, p.row_count[i]);
  }
  const float* shared = nullptr;
  if (p.q_block != nullptr) {
    shared = p.q_block_of(b, h / (p.H / p.q_block_heads), first_row / p.list_rows);
  }
  finish_rows(acc, scale, live, shared, 0, p.D);
  const int own = first_row + row, present = rows - row;
  T* to = static_cast<T*>(p.grad_q) + b * p.grad_q_strides.b + h * p.grad_q_strides.h +
          own * p.grad_q_strides.l;
  if (p.add) add_rows<T>(acc, to, p.grad_q_strides.l, present, 0, p.D, live);
  store_rows<T>(acc, to, p.grad_q_strides.l, present, 0, p.D == DP ? DP : p.D);
}

template <typename T, int DP>
cudaError_t launch_backward_rows(const BackwardParams& p, const Device& device,
                                 cudaStream_t stream) {
  auto needed = [&](int warps) {
    return with_warps(warps, [&](auto w) {
      return sizeof(T) * 2 * w * 16 * kLd<T, DP> + sizeof(RowState<16 * w>) +
             KeyStream<T, DP, kBackwardKeys<T, DP, w>, w>::shared_bytes(p);
    });
  };
  const int warps = row_warps(p, device, needed);
  return with_warps(warps, [&](auto w) {
    return launch_grid(backward_rows_kernel<T, DP, w>, row_blocks(p, w), 32 * w, needed(w), stream,
                       p);
  });
}

}  // namespace mra::cuda
