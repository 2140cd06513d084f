// coarse = row with levels: the softmax that exact attention has left in `out` and `lse` goes on
// over the coarse cells of every resolution.
#pragma once

#include "cell_stream.cuh"
#include "forward.cuh"

namespace mra::cuda {

template <typename T, int DP, int kWarps>
__global__ void __maxnreg__((kForwardRegisters<T, DP>))
    cells_forward_kernel(const __grid_constant__ CellsForward p) {
  constexpr int kKeys = kForwardKeys<T, DP, kWarps>, kLdT = kLd<T, DP>;
  extern __shared__ __align__(16) char smem[];

  constexpr int tile_rows = 16 * kWarps;
  const unsigned row_tiles = (p.rows + tile_rows - 1) / tile_rows;
  const unsigned bh = blockIdx.x / row_tiles, from_start = blockIdx.x - bh * row_tiles;
  const int first_row = (p.causal ? row_tiles - 1 - from_start : from_start) * tile_rows;
  const int b = bh / static_cast<unsigned>(p.H), h = bh - b * p.H;
  const int rows = min(tile_rows, p.rows - first_row);
  const int row = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int own = first_row + row, present = rows - row;
  const int64_t head = static_cast<int64_t>(b) * p.H + h;

  T* q = reinterpret_cast<T*>(smem);
  const T* q_head = static_cast<const T*>(p.q) + b * p.q_strides.b + h * p.q_strides.h;
  copy_sixteen<T, DP>(q + row * kLdT, q_head, p.q_strides.l, own, present, p.D, p.q);
  commit_copies();
  CellStream<T, DP, kKeys, kWarps> cells(p, p.levels, smem + sizeof(T) * tile_rows * kLdT, b, h,
                                         first_row);

  OnlineSoftmax<T, DP, false> softmax;
  softmax.start(nullptr, nullptr, p.D);
  T* out =
      static_cast<T*>(p.out) + b * p.out_strides.b + h * p.out_strides.h + own * p.out_strides.l;
  bool live[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = g + 8 * half;
    const float lse = r < present ? p.lse[head * p.rows + own + r] : -INFINITY;
    live[half] = lse != -INFINITY;
    softmax.max[half] = live[half] ? lse * kLog2e : -INFINITY;
    softmax.sum[half] = live[half] && t == 0 ? 1.f : 0.f;
  }
  add_rows<T>(softmax.acc, out, p.out_strides.l, present, 0, p.D, live);

  wait_for_copies();
  __syncwarp();
  constexpr bool kKeepRows = sizeof(T) == 2 && DP <= 128;  // the queries stay in registers
  Fragments<T, kKeepRows ? DP : Mma<T>::kStep> q_rows;
  if constexpr (kKeepRows) q_rows.load(q, kLdT, row);

  // Of rows g and g + 8, [count] p.rows apart; written and read by one lane of the four.
  float* const shares =
      p.shares == nullptr ? nullptr : p.shares + head * p.levels.count * p.rows + own + g;
#pragma unroll 1
  for (int r = p.levels.count - 1; r >= 0; --r) {
    float before_max[2], before_sum[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      before_max[half] = softmax.max[half];
      before_sum[half] = softmax.sum[half];
      softmax.sum[half] = 0.f;
    }
    cells.each(r, [&](const T* k, const T* v, const float* bias) {
      float s[kKeys / 8][4] = {};
      if constexpr (kKeepRows)
        multiply_nt<T, DP>(s, q_rows, k, kLdT, p.tf32_scores);
      else
        multiply_nt<T, DP>(s, q, row, k, kLdT, p.tf32_scores);
      cells.to_logits(s, bias, p.scale * kLog2e);
      softmax.update(s, 1.f);
      multiply_pn<T>(softmax.acc, s, v, kLdT, 0, p.tf32);
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool grown = softmax.max[half] != before_max[half];
      const float factor = grown ? exp2_approx(before_max[half] - softmax.max[half]) : 1.f;
      const float mass = quad_sum(softmax.sum[half]);
      softmax.sum[half] = fmaf(before_sum[half], factor, softmax.sum[half]);
      if (shares == nullptr || t != 0 || g + 8 * half >= present) continue;
      // All of them follow the maximum.
      for (int other = p.levels.count - 1; grown && other > r; --other) {
        shares[static_cast<int64_t>(other) * p.rows + 8 * half] *= factor;
      }
      shares[static_cast<int64_t>(r) * p.rows + 8 * half] = mass;
    }
  }

  float total[2], unused[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) total[half] = quad_sum(softmax.sum[half]);
  softmax.finish(p, b, h, own, present, unused);
  store_rows<T>(softmax.acc, out, p.out_strides.l, present, 0, p.D == DP ? DP : p.D);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (shares == nullptr || t != 0 || g + 8 * half >= present) continue;
    const bool weight = p.lse[head * p.rows + own + g + 8 * half] != -INFINITY;
    for (int r = 0; r < p.levels.count; ++r) {
      float& share = shares[static_cast<int64_t>(r) * p.rows + 8 * half];
      share = weight ? share / total[half] : 0.f;
    }
  }
}

template <typename T, int DP>
cudaError_t launch_cells_forward(const CellsForward& p, const Device& device, cudaStream_t stream) {
  auto needed = [&](int warps) {
    return with_cell_warps(warps, [&](auto w) {
      return sizeof(T) * w * 16 * kLd<T, DP> +
             CellStream<T, DP, kForwardKeys<T, DP, w>, w>::shared_bytes();
    });
  };
  const int warps = cell_warps(p, device, needed);
  return with_cell_warps(warps, [&](auto w) {
    return launch_grid(cells_forward_kernel<T, DP, w>, row_blocks(p, w), 32 * w, needed(w), stream,
                       p);
  });
}

}  // namespace mra::cuda
