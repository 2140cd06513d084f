// Gradient of the rows (dQ) through the coarse cells of every resolution: as backward_rows.cuh,
// over the stream of cell_stream.cuh.
#pragma once

#include "backward_rows.cuh"
#include "cell_stream.cuh"

namespace mra::cuda {

template <typename T, int DP, int kWarps>
__global__ void __maxnreg__((kRowsRegisters<T, DP, kWarps>))
    cells_rows_kernel(const __grid_constant__ CellsBackward p) {
  constexpr int kKeys = kBackwardKeys<T, DP, kWarps>, kLdT = kLd<T, DP>;
  extern __shared__ __align__(16) char smem[];

  constexpr int tile_rows = 16 * kWarps;
  const unsigned row_tiles = (p.rows + tile_rows - 1) / tile_rows;
  const unsigned bh = blockIdx.x / row_tiles, from_start = blockIdx.x - bh * row_tiles;
  const int first_row = (p.causal ? row_tiles - 1 - from_start : from_start) * tile_rows;
  const int b = bh / static_cast<unsigned>(p.H), h = bh - b * p.H;
  const int rows = min(tile_rows, p.rows - first_row);
  const int row = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4;
  const int own = first_row + row, present = rows - row;
  const int64_t head = static_cast<int64_t>(b) * p.H + h;

  T* q = reinterpret_cast<T*>(smem);
  T* grad_out = q + tile_rows * kLdT;
  auto load = [&](T* to, const void* from, const Strides& strides) {
    copy_sixteen<T, DP>(to + row * kLdT,
                        static_cast<const T*>(from) + b * strides.b + h * strides.h, strides.l, own,
                        present, p.D, p.q);
  };
  load(q, p.q, p.q_strides);
  load(grad_out, p.grad_out, p.grad_out_strides);
  commit_copies();
  CellStream<T, DP, kKeys, kWarps> cells(p, p.levels, smem + sizeof(T) * 2 * tile_rows * kLdT, b, h,
                                         first_row);

  float lse[2];
  int64_t at[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = g + 8 * half;
    at[half] = r < present ? head * p.rows + own + r : -1;
    lse[half] = at[half] >= 0 ? p.lse2[at[half]] : INFINITY;
  }
  wait_for_copies();
  __syncwarp();
  constexpr bool kKeepRows = sizeof(T) == 2 && DP <= 64;  // both stay in registers
  Fragments<T, kKeepRows ? DP : Mma<T>::kStep> q_rows, grad_rows;
  if constexpr (kKeepRows) {
    q_rows.load(q, kLdT, row);
    grad_rows.load(grad_out, kLdT, row);
  }

  float acc[DP / 8][4] = {};
#pragma unroll 1
  for (int r = p.levels.count - 1; r >= 0; --r) {
    float delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[half] = at[half] >= 0 ? p.pooled_delta[r * p.delta_stride + at[half]] : 0.f;
    }
    cells.each(r, [&](const T* k, const T* v, const float* bias) {
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
      cells.to_logits(s, bias, p.scale * kLog2e);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ds[n][i] *= exp2_approx(s[n][i] - lse[i / 2]);
      }
      multiply_pn<T>(acc, ds, k, kLdT, 0, p.tf32);
    });
  }

  bool live[2];
  const float scale[2] = {p.scale, p.scale};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    live[half] =
        at[half] >= 0 && (p.row_mask == nullptr ||
                          p.row_mask[static_cast<int64_t>(b) * p.rows + own + g + 8 * half]);
  }
  finish_rows(acc, scale, live, nullptr, 0, p.D);
  T* to = static_cast<T*>(p.grad_q) + b * p.grad_q_strides.b + h * p.grad_q_strides.h +
          own * p.grad_q_strides.l;
  if (p.add) add_rows<T>(acc, to, p.grad_q_strides.l, present, 0, p.D, live);
  store_rows<T>(acc, to, p.grad_q_strides.l, present, 0, p.D == DP ? DP : p.D);
}

template <typename T, int DP>
cudaError_t launch_cells_rows(const CellsBackward& p, const Device& device, cudaStream_t stream) {
  auto needed = [&](int warps) {
    return with_cell_warps(warps, [&](auto w) {
      return sizeof(T) * 2 * w * 16 * kLd<T, DP> +
             CellStream<T, DP, kBackwardKeys<T, DP, w>, w>::shared_bytes();
    });
  };
  const int warps = cell_warps(p, device, needed);
  return with_cell_warps(warps, [&](auto w) {
    return launch_grid(cells_rows_kernel<T, DP, w>, row_blocks(p, w), 32 * w, needed(w), stream, p);
  });
}

}  // namespace mra::cuda
