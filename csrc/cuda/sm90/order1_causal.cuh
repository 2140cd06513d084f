// What both kernels of order 1 under causal share: the pair of matrices that grows along the walk.
// Warpgroup w of DP / 64 holds rows 64 w to 64 w + 63 of both.
#pragma once

#include <climits>

#include "key_tiles.cuh"
#include "moments.h"
#include "order1_causal.h"

namespace mra::cuda::sm90 {

template <int DP>
struct CausalTraits {
  static constexpr int kPanels = DP / 64, kConsumers = 4 * kPanels;  // warps
  static constexpr int kBlocks = DP == 64 ? 2 : 1, kThreads = 128 * (kPanels + 1);
  // Registers of the warps that attend and of those that fetch.
  static constexpr int kTaken = DP == 64 ? 208 : 232, kGiven = 40;
};

// The warps that don't fetch.
template <int DP>
__device__ __forceinline__ void consumer_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(2 * DP) : "memory");
}

// A pair of matrices: the sums in registers, and as operands in shared memory.
template <int DP>
struct WalkedPair {
  static constexpr int kPanels = DP / 64;
  float first[8 * kPanels][4], second[8 * kPanels][4];

  // Of this thread, the row of a matrix and the first column.
  static __device__ __forceinline__ int row() {
    return 64 * (threadIdx.x / 128) + 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
  }

  // f(value, value, which, row, column) of two neighbours in each of the matrices.
  template <class F>
  __device__ __forceinline__ void for_pairs(F f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < 8 * kPanels; ++n) {
        const int column = 8 * n + threadIdx.x % 4 * 2;
        f(first[n][2 * half], first[n][2 * half + 1], 0, row() + 8 * half, column);
        f(second[n][2 * half], second[n][2 * half + 1], 1, row() + 8 * half, column);
      }
    }
  }

  // From chunk `chunk` of [chunks, 2, dim, dim], or zeros.
  __device__ __forceinline__ void load(const float* from, int64_t chunk, int dim) {
    for_pairs([&](float& x, float& y, int which, int row, int column) {
      const bool there = from != nullptr && row < dim && column < dim;
      const float* const at = from + ((chunk * 2 + which) * dim + row) * dim + column;
      const float2 u = there ? load_pair(at) : float2{};
      x = u.x, y = u.y;
    });
  }
  __device__ __forceinline__ void store(float* to, int64_t chunk, int dim) {
    for_pairs([&](float x, float y, int which, int row, int column) {
      float* const at = to + ((chunk * 2 + which) * dim + row) * dim + column;
      if (row < dim && column < dim) *reinterpret_cast<float2*>(at) = make_float2(x, y);
    });
  }
  // As panels of bfloat16, the second one times `factor`.
  __device__ __forceinline__ void place(uint16_t (&to)[2][kPanels][DP][64], float factor = 1.f) {
    for_pairs([&](float x, float y, int which, int row, int column) {
      const int chunk = column % 64 / 8 ^ row % 8;
      const float times = which == 0 ? 1.f : factor;
      *reinterpret_cast<uint32_t*>(&to[which][column / 64][row][chunk * 8 + column % 8]) =
          Mma<__nv_bfloat16>::pack(times * x, times * y);
    });
  }
  __device__ __forceinline__ void pin_both() {
    pin(first);
    pin(second);
  }
};

// Products of 64 rows in panels with a matrix of DP x DP in panels: the 64 columns of panel
// `panel`. kTransposed: with its transpose.
template <bool kTransposed, int kPanels>
__device__ __forceinline__ void multiply_columns(float (&c)[8][4],
                                                 const uint16_t (&a)[kPanels][64][64],
                                                 const uint16_t (&b)[kPanels][64 * kPanels][64],
                                                 int panel, bool add) {
#pragma unroll
  for (int i = 0; i < 4 * kPanels; ++i) {
    const uint64_t right = kTransposed ? descriptor(b[i / 4][64 * panel]) + 2 * (i % 4)
                                       : descriptor(b[panel]) + 128 * i;
    Wgmma<__nv_bfloat16, 64>::template multiply<false, !kTransposed>(
        c, descriptor(a[i / 4]) + 2 * (i % 4), right, add || i > 0);
  }
}

// Which tiles a block of threads walks.
struct CausalWalk {
  int b, hk, group, chunk, first, tiles;  // group: query heads of the key head; first: tile
  int64_t key_head;

  __device__ __forceinline__ CausalWalk(const CausalChunks& p, int chunk_tiles) {
    const int head = blockIdx.x / p.chunks;
    chunk = blockIdx.x - head * p.chunks;
    b = head / p.Hk;
    hk = head - b * p.Hk;
    group = p.H / p.Hk;
    key_head = head;
    first = chunk * chunk_tiles;
    tiles = uniform(min(chunk_tiles, (p.N + 63) / 64 - first));
  }
};

}  // namespace mra::cuda::sm90
