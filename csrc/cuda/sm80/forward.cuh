// Attention of tiles of rows over a stream of keys: the fine stage (pooled keys under coarse = row,
// then the selected blocks, key by key) and, with list_rows = 1, the block-coarse stage. One warp
// holds 16 rows; online softmax in log2 units, accumulators in registers.
#pragma once

#include "keys.cuh"
#include "softmax.cuh"

namespace mra::cuda {

// Keys a tile: what keeps two stages of keys and values within 99 KB (sm_86, sm_89).
template <typename T, int DP, int kWarps>
inline constexpr int kForwardKeys = sizeof(T) == 2 ? (DP <= 64    ? (kWarps <= 2 ? 32 : 64)
                                                      : DP <= 128 ? 64
                                                                  : 32)
                                                   : (DP <= 64    ? (kWarps <= 2 ? 32 : 64)
                                                      : DP <= 128 ? 32
                                                                  : 16);

// More blocks of threads a multiprocessor are worth a few spilled words outside of the loop.
template <typename T, int DP>
inline constexpr int kForwardRegisters = sizeof(T) == 2 && DP <= 64 ? 128 : 255;

template <typename T, int DP, int kWarps>
__global__ void __maxnreg__((kForwardRegisters<T, DP>)) forward_kernel(const ForwardParams p) {
  constexpr int kKeys = kForwardKeys<T, DP, kWarps>, kLdT = kLd<T, DP>;
  extern __shared__ __align__(16) char smem[];

  constexpr int tile_rows = 16 * kWarps;
  const unsigned row_tiles = (p.rows + tile_rows - 1) / tile_rows;
  // Under causal the last tiles have most keys: start them first.
  const unsigned bh = blockIdx.x / row_tiles, from_start = blockIdx.x - bh * row_tiles;
  const int first_row = (p.causal ? row_tiles - 1 - from_start : from_start) * tile_rows;
  const int b = bh / static_cast<unsigned>(p.H), h = bh - b * p.H;
  const int rows = min(tile_rows, p.rows - first_row);
  const int64_t head = static_cast<int64_t>(b) * p.H + h;
  const int row = threadIdx.x / 32 * 16;

  T* q = reinterpret_cast<T*>(smem);
  const T* q_head = static_cast<const T*>(p.q) + b * p.q_strides.b + h * p.q_strides.h;
  copy_sixteen<T, DP>(q + row * kLdT, q_head, p.q_strides.l, first_row + row, rows - row, p.D, p.q);
  KeyStream<T, DP, kKeys, kWarps> keys(p, smem + sizeof(T) * tile_rows * kLdT, b, h, first_row,
                                       rows);

  OnlineSoftmax<T, DP> softmax;
  const int64_t list = head * p.row_lists.lists + first_row / p.list_rows;
  softmax.start(p.state_mean == nullptr ? nullptr : p.state_mean + list * p.D, p.state_lse + list,
                p.D);

  const float* row_bias =
      p.row_bias == nullptr ? nullptr : p.row_bias + head * p.rows + first_row + row;
  constexpr bool kKeepRows = sizeof(T) == 2 && DP <= 128;  // the queries stay in registers
  Fragments<T, kKeepRows ? DP : Mma<T>::kStep> q_rows;
  // Turn -1 only fetches the first tile.
#pragma unroll 1
  for (int tile = -1; tile < keys.tiles; ++tile) {
    if (tile >= 0) {
      wait_for_copies();
      __syncthreads();
    }
    keys.ahead(tile + 1);
    if (tile < 0) continue;
    if (kKeepRows && tile == 0) q_rows.load(q, kLdT, row);

    float s[kKeys / 8][4] = {};
    const int buffer = tile % 2;
    const T* k = keys.k_tiles + buffer * keys.kTile;
    if constexpr (kKeepRows)
      multiply_nt<T, DP>(s, q_rows, k, kLdT, p.tf32_scores);
    else
      multiply_nt<T, DP>(s, q, row, k, kLdT, p.tf32_scores);
    float scale = p.scale * kLog2e;
    if (!keys.plain) {
      keys.to_logits(s, tile, row, scale);
      scale = 1.f;
    }
    softmax.update(s, scale);
    multiply_pn<T>(softmax.acc, s, keys.v_tiles + buffer * keys.kTile, kLdT, 0, p.tf32);
    if (tile + 1 == keys.pooled_tiles) softmax.end_pooled(row_bias, rows - row);
  }
  wait_for_copies();

  float share[2];
  softmax.finish(p, b, h, first_row + row, rows - row, share);
  T* out = static_cast<T*>(p.out) + b * p.out_strides.b + h * p.out_strides.h +
           (first_row + row) * p.out_strides.l;
  store_rows<T>(softmax.acc, out, p.out_strides.l, rows - row, 0, p.D == DP ? DP : p.D);
}

template <typename T, int DP>
cudaError_t launch_forward(const ForwardParams& p, const Device& device, cudaStream_t stream) {
  auto needed = [&](int warps) {
    return with_warps(warps, [&](auto w) {
      return sizeof(T) * w * 16 * kLd<T, DP> +
             KeyStream<T, DP, kForwardKeys<T, DP, w>, w>::shared_bytes(p);
    });
  };
  const int warps = row_warps(p, device, needed);
  return with_warps(warps, [&](auto w) {
    return launch_grid(forward_kernel<T, DP, w>, row_blocks(p, w), 32 * w, needed(w), stream, p);
  });
}

}  // namespace mra::cuda
