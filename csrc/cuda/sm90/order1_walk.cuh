// What both kernels of order1_walk.h share: the pair of matrices, which may grow along the walk.
// Warpgroup w of DP / 64 holds rows 64 w to 64 w + 63 of both.
#pragma once

#include <climits>

#include "key_tiles.cuh"
#include "moments.h"
#include "order1_walk.h"

namespace mra::cuda::sm90 {

template <int DP>
struct WalkTraits {
  static constexpr int kPanels = DP / 64, kConsumers = 4 * kPanels;  // warps
  static constexpr int kBlocks = DP == 64 ? 2 : 1, kThreads = 128 * (kPanels + 1);
  // Registers of the warps that attend and of those that fetch.
  static constexpr int kTaken = DP == 64 ? 208 : 232, kGiven = 40;
};

// Keys that count in the first `blocks` key blocks of batch entry b. By all threads; `room` is zero
// before.
__device__ __forceinline__ int count_keys(const int* key_count, int nk, int b, int blocks,
                                          int& room) {
  int n = 0;
  for (int y = threadIdx.x; y < blocks; y += blockDim.x) {
    n += key_count[static_cast<int64_t>(b) * nk + y];
  }
  n = __reduce_add_sync(kFullWarp, n);
  if (threadIdx.x % 32 == 0) atomicAdd(&room, n);
  __syncthreads();
  return room;
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
  // As panels of T, times a factor each.
  template <typename T>
  __device__ __forceinline__ void place(uint16_t (&to)[2][kPanels][DP][64], float of_first,
                                        float of_second) {
    for_pairs([&](float x, float y, int which, int row, int column) {
      const int chunk = column % 64 / 8 ^ row % 8;
      const float factor = which == 0 ? of_first : of_second;
      *reinterpret_cast<uint32_t*>(&to[which][column / 64][row][chunk * 8 + column % 8]) =
          Mma<T>::pack(factor * x, factor * y);
    });
  }

  // For each matrix the power of two that takes its largest entry near 2^14, which float16 holds;
  // `room` holds two floats a warp. By all consumers.
  __device__ __forceinline__ void fit(float (&room)[2][4 * kPanels], float (&factors)[2]) {
    float most[2] = {};
    for_pairs([&](float x, float y, int which, int, int) {
      most[which] = fmaxf(most[which], fmaxf(fabsf(x), fabsf(y)));
    });
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      // Of numbers that are not negative, the order is that of their bits.
      const uint32_t bits = __reduce_max_sync(kFullWarp, __float_as_uint(most[which]));
      if (threadIdx.x % 32 == 0) room[which][threadIdx.x / 32] = __uint_as_float(bits);
    }
    consumer_sync<DP>();
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float all = 0.f;
#pragma unroll
      for (int warp = 0; warp < 4 * kPanels; ++warp) all = fmaxf(all, room[which][warp]);
      // 2^e <= all < 2^(e + 1); 14 - e within the exponents of float.
      const int e = max(static_cast<int>(__float_as_uint(all) >> 23) - 127, -112);
      factors[which] = all > 0.f && e < 128 ? __uint_as_float(14 - e + 127 << 23) : 1.f;
    }
  }
  __device__ __forceinline__ void pin_both() {
    pin(first);
    pin(second);
  }
};

// Products of 64 rows in panels with a matrix of DP x DP in panels: the 64 columns of panel
// `panel`. kTransposed: with its transpose.
template <typename T, bool kTransposed, int kPanels>
__device__ __forceinline__ void multiply_columns(float (&c)[8][4],
                                                 const uint16_t (&a)[kPanels][64][64],
                                                 const uint16_t (&b)[kPanels][64 * kPanels][64],
                                                 int panel, bool add) {
#pragma unroll
  for (int i = 0; i < 4 * kPanels; ++i) {
    const uint64_t right = kTransposed ? descriptor(b[i / 4][64 * panel]) + 2 * (i % 4)
                                       : descriptor(b[panel]) + 128 * i;
    Wgmma<T, 64>::template multiply<false, !kTransposed>(c, descriptor(a[i / 4]) + 2 * (i % 4),
                                                         right, add || i > 0);
  }
}

// Queries from `first` on, in panels, less the centre of their block, zeros where they don't count:
// 32 of the rows, which lie in one block, by one warp.
template <typename T, int kPanels>
__device__ __forceinline__ void centre_queries(uint16_t (&q)[kPanels][64][64], const WalkChunks& p,
                                               int b, int64_t key_head, int first, int half) {
  const int lane = threadIdx.x % 32, chunk = lane % 8;
  first += 32 * half;
  const float* const centre =
      p.centre + (key_head * (p.nq + 1) + min(first >> p.log2_block_q, p.nq)) * p.D + 8 * chunk;
#pragma unroll 1
  for (int panel = 0; panel < kPanels; ++panel) {
    float4 u{}, w{};
    if (64 * panel + 8 * chunk < p.D) {
      u = __ldg(reinterpret_cast<const float4*>(centre + 64 * panel));
      w = __ldg(reinterpret_cast<const float4*>(centre + 64 * panel + 4));
    }
#pragma unroll 2
    for (int i = 0; i < 8; ++i) {
      const int row = 4 * i + lane / 8, at = first + row;
      auto* const to = reinterpret_cast<uint4*>(&q[panel][32 * half + row][(chunk ^ row % 8) * 8]);
      float x[8];
      unpack16<T>(*to, x);
      uint4 bits =
          make_uint4(Mma<T>::pack(x[0] - u.x, x[1] - u.y), Mma<T>::pack(x[2] - u.z, x[3] - u.w),
                     Mma<T>::pack(x[4] - w.x, x[5] - w.y), Mma<T>::pack(x[6] - w.z, x[7] - w.w));
      if (at >= p.N ||
          (p.query_mask != nullptr && !p.query_mask[static_cast<int64_t>(b) * p.N + at])) {
        bits = uint4{};
      }
      *to = bits;
    }
  }
}

// Which tiles a block of threads walks.
struct Walk {
  int b, hk, group, chunk, first, tiles;  // group: query heads of the key head; first: tile
  int64_t key_head;

  __device__ __forceinline__ Walk(const WalkChunks& p, int chunk_tiles) {
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
