// Tiles of rows for order1_rows.cuh: what lies in shared memory, the warp that fetches it, and
// those beside it that make dO.o of each row.
#pragma once

#include <type_traits>

#include "../sm80/tile.cuh"
#include "order1_rows.h"
#include "tma.cuh"

namespace mra::cuda::sm90 {

struct Order1RowsMaps : Order1Rows {
  CUtensorMap q_map, grad_out_map, out_map, moments_map, grad_q_map;
  int tiles;  // of a chunk
};

// Measured choices (docs/kernels.md).
template <int DP, bool kCentred>
struct Order1RowsTraits {
  static constexpr int kStages = DP == 64 && kCentred ? 4 : 3, kBlocks = DP == 64 ? 2 : 1;
  static constexpr int kThreads = DP == 64 ? 256 : 384;
  // Registers of the threads of the warpgroup that fetches, where others of it make dO.o more, and
  // of those that multiply: in all no more than the launch has.
  static constexpr int kFew = kCentred ? 24 : 40;
  static constexpr int kMany = kCentred ? (DP == 64 ? 232 : 240) : DP == 64 ? 216 : 232;
};

// dO.o of the rows of each tile, made by kWarps warps, and the places of o. Even means only.
template <int DP>
struct alignas(1024) Order1Dots {
  static constexpr int kWarps = 3, kStages = Order1RowsTraits<DP, false>::kStages;
  uint16_t out[2][DP / 64][64][64];
  float x[kStages][64];
  uint64_t full[kStages], out_empty[2];

  __device__ __forceinline__ void init() {
    for (auto& barrier : full) barrier_init(&barrier, kWarps);
    for (auto& barrier : out_empty) barrier_init(&barrier, kWarps);
  }
};
struct NoDots {};

template <int DP, bool kCentred>
struct Order1RowsShared {
  // Sets of what the sums read: with even means a tile's are made before the next is written.
  static constexpr int kSets = kCentred ? 2 : 1;
  static constexpr int kStages = Order1RowsTraits<DP, kCentred>::kStages, kPanels = DP / 64;
  uint16_t moments[2][kPanels][DP][64];  // C, Sigma
  uint16_t q[kStages][kPanels][64][64], grad_out[kStages][kPanels][64][64];
  uint16_t weighted[kSets][2][kPanels][64][64];  // a dO, b q
  std::conditional_t<kCentred, NoDots, Order1Dots<DP>> dots;
  // u and v of each panel's columns and row; or centre, and centre Sigma
  alignas(16) float vectors[2][DP];
  uint64_t moments_full, full[kStages], empty[kStages];
};

template <int DP, bool kCentred>
__device__ void fetch_rows(const Order1RowsMaps& p, Order1RowsShared<DP, kCentred>& s, int b, int h,
                           int first, int tiles) {
  constexpr int kStages = Order1RowsTraits<DP, kCentred>::kStages, kPanels = DP / 64;
  const bool first_lane = threadIdx.x % 32 == 0, with_out = !kCentred && p.out != nullptr;
  barrier_expect(&s.moments_full, 2 * DP * DP * 2);
  if (first_lane) copy_matrices<DP>(s.moments, p.moments_map, &s.moments_full, h / (p.H / p.Hk), b);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, row = first + 64 * tile;
    if (tile >= kStages) barrier_wait(&s.empty[stage], tile / kStages - 1 & 1);
    if constexpr (!kCentred) {
      if (with_out && tile > 1) barrier_wait(&s.dots.out_empty[tile % 2], tile / 2 - 1 & 1);
    }
    barrier_expect(&s.full[stage], (with_out ? 3 : 2) * 64 * DP * 2);
    if (!first_lane) continue;
    for (int i = 0; i < kPanels; ++i) {
      copy_panel(s.q[stage][i], p.q_map, &s.full[stage], 64 * i, row, h, b);
      copy_panel(s.grad_out[stage][i], p.grad_out_map, &s.full[stage], 64 * i, row, h, b);
      if constexpr (!kCentred) {
        if (with_out)
          copy_panel(s.dots.out[tile % 2][i], p.out_map, &s.full[stage], 64 * i, row, h, b);
      }
    }
  }
}

// By warp `warp` of Order1Dots::kWarps. kNarrow: head dims up to 32.
template <int DP, bool kNarrow>
__device__ void make_dots(Order1RowsShared<DP, false>& s, int warp, int tiles) {
  using T = __nv_bfloat16;
  constexpr int kStages = Order1RowsTraits<DP, false>::kStages;
  constexpr int kChunks = kNarrow ? 1 : 2;  // of eight columns of each panel, for each lane
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages;
    barrier_wait(&s.full[stage], tile / kStages & 1);
#pragma unroll 1
    for (int row = 8 * warp + g; row < 64; row += 8 * Order1Dots<DP>::kWarps) {
      float dot = 0.f;
#pragma unroll
      for (int i = 0; i < DP / 64 * kChunks; ++i) {
        const int panel = i / kChunks, chunk = (kChunks * t + i % kChunks ^ g) * 8;
        float x[8], y[8];
        unpack16<T>(*reinterpret_cast<const uint4*>(&s.grad_out[stage][panel][row][chunk]), x);
        unpack16<T>(*reinterpret_cast<const uint4*>(&s.dots.out[tile % 2][panel][row][chunk]), y);
#pragma unroll
        for (int e = 0; e < 8; ++e) dot += x[e] * y[e];
      }
      dot = quad_sum(dot);
      if (t == 0) s.dots.x[stage][row] = dot;
    }
    barrier_arrive(&s.dots.full[stage]);
    barrier_arrive(&s.dots.out_empty[tile % 2]);
  }
}

}  // namespace mra::cuda::sm90
