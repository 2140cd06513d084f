// The pooled keys that a tile of rows attends under coarse = row with levels, one resolution after
// the other, as one stream of tiles of kKeys, double-buffered. Rows of a tile lie in one block of
// block_q, so they have the same coarse cells. Means are gathered one by one; a candidate that is
// no coarse cell leaves its place empty.
#pragma once

#include "levels.cuh"

namespace mra::cuda {

template <typename T, int DP, int kKeys, int kWarps>
struct CellStream {
  static constexpr int kLdK = kLd<T, DP>;
  static constexpr int kTile = kKeys * kLdK;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWindow = 256;  // places that are looked up at a time
  static_assert(kWindow % kKeys == 0);

  const Problem& p;
  const Levels& l;
  T* k_tiles;     // [2][kKeys][kLdK]
  T* v_tiles;     // [2][kKeys][kLdK]
  float* biases;  // [kWindow]: log2 of the keys it stands for, -inf: an empty place
  int* ids;       // [kWindow]: its place among those of all resolutions, -1: empty
  int b, x;
  int64_t head;
  const T *pooled_k, *pooled_v;

  static size_t shared_bytes() { return sizeof(T) * 4 * kTile + 8 * kWindow; }

  __device__ CellStream(const Problem& p, const Levels& l, char* smem, int b, int h, int first_row)
      : p(p), l(l), b(b), x(first_row / p.block_q), head(static_cast<int64_t>(b) * p.H + h) {
    k_tiles = reinterpret_cast<T*>(smem);
    v_tiles = k_tiles + 2 * kTile;
    biases = reinterpret_cast<float*>(v_tiles + 2 * kTile);
    ids = reinterpret_cast<int*>(biases + kWindow);
    const int64_t from = (static_cast<int64_t>(b) * p.Hk + h / (p.H / p.Hk)) * l.key_blocks * p.D;
    pooled_k = static_cast<const T*>(p.pooled_k) + from;
    pooled_v = static_cast<const T*>(p.pooled_v) + from;
  }

  // f(keys, values, biases) for every tile of resolution r.
  template <class F>
  __device__ __forceinline__ void each(int r, const F& f) {
    const ResolutionBlocks& at = l.at[r];
    const CoarseCells cells(l, b, head, r, x >> (at.log2_q - l.at[0].log2_q));
#pragma unroll 1
    for (int from = 0; from < cells.all.positions; from += kWindow) {
      const int tiles = (min(kWindow, cells.all.positions - from) + kKeys - 1) / kKeys;
      __syncthreads();  // the tiles before are no longer read
      for (int i = threadIdx.x; i < tiles * kKeys; i += kThreads) {
        const int y = cells.at(from + i);
        ids[i] = y < 0 ? -1 : at.first_k + y;
        biases[i] = y < 0 ? -INFINITY : log2f(static_cast<float>(cells.all.count[y]));
      }
      __syncthreads();
      fetch(0);
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        wait_for_copies();
        __syncthreads();
        if (tile + 1 < tiles) fetch(tile + 1);
        const int buffer = tile % 2 * kTile;
        f(k_tiles + buffer, v_tiles + buffer, biases + tile * kKeys);
      }
    }
  }

  __device__ __forceinline__ void fetch(int tile) {
    constexpr int kChunk = 16 / sizeof(T), kChunks = DP / kChunk;
    const int buffer = tile % 2 * kTile;
#pragma unroll 4
    for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
      const int r = i / kChunks, d = i % kChunks * kChunk, id = ids[tile * kKeys + r];
      const bool valid = id >= 0 && d < p.D;
      const int64_t from = valid ? static_cast<int64_t>(id) * p.D + d : 0;
      copy_16_bytes(k_tiles + buffer + r * kLdK + d, pooled_k + from, valid);
      copy_16_bytes(v_tiles + buffer + r * kLdK + d, pooled_v + from, valid);
    }
    commit_copies();
  }

  // Scores of a tile -> logits in log2 units.
  template <int kTiles>
  static __device__ __forceinline__ void to_logits(float (&s)[kTiles][4], const float* bias,
                                                   float scale_log2) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 c = *reinterpret_cast<const float2*>(bias + 8 * n + 2 * t);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = fmaf(s[n][i], scale_log2, i % 2 ? c.y : c.x);
    }
  }
};

// Warps of 16 rows a block of threads; needed(warps) is the shared memory that it takes.
template <class Needed>
int cell_warps(const Problem& p, const Device& device, Needed needed) {
  int warps = p.block_q < 64 ? p.block_q / 16 : 4;
  while (warps > 1 && needed(warps) > static_cast<size_t>(device.max_smem)) warps /= 2;
  return warps;
}

}  // namespace mra::cuda
