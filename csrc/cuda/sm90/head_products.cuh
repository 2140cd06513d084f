// Short heads (forward_head.cuh): products of keys with values and with keys over a head's rows, a
// piece of C or Sigma a warp, or all columns of 64 rows of them a warpgroup.
#pragma once

#include "head_half.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

__device__ __forceinline__ uint32_t twice(uint16_t x) { return x | uint32_t{x} << 16; }

// A warp's piece of C or Sigma: 16 rows from `row` and 8 kTiles columns from `column` of a product
// of keys or values, transposed, with values or keys.
template <typename T, int DP, int kRows, int kTiles>
struct MomentPiece {
  static constexpr int kRowBytes = PanelLane<DP>::kRowBytes;
  using Panel = uint16_t[kRows][DP];
  using Means = uint16_t[16][DP];
  const Means& left_mean;
  const Means& right_mean;
  int row, column;
  uint32_t left, right;  // where this lane's part of the first run lies

  __device__ __forceinline__ MomentPiece(const Panel& of_left, const Means& of_left_mean,
                                         const Panel& of_right, const Means& of_right_mean, int row,
                                         int column, const PanelLane<DP>& panel)
      : left_mean(of_left_mean),
        right_mean(of_right_mean),
        row(row),
        column(column),
        left(smem_address(of_left) + (panel.key ^ 2 * row)),
        right(smem_address(of_right) + threadIdx.x % 32 * kRowBytes) {}

  // Registers 2 i and 2 i + 1 of the left operand, i of the right one, have keys 8 i + 2 t on.
  struct Run {
    typename Mma<T>::A a[2];
    uint32_t b[kTiles][4];
  };
  __device__ __forceinline__ void load_left(typename Mma<T>::A (&a)[2], int run) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      ldmatrix_x4<true>(a[k].r, left + (run * kRun + 16 * k) * kRowBytes);
    }
  }
  __device__ __forceinline__ Run load(int run) const {
    Run r;
    load_left(r.a, run);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int chunk = swizzled<DP>(column / 8 + n, threadIdx.x % 32);
      ldmatrix_x4<true>(r.b[n], right + run * kRun * kRowBytes + chunk * 16);
    }
    return r;
  }
  static __device__ __forceinline__ void multiply(float (&c)[kTiles][4], const Run& r) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      Mma<T>::product(c[n], r.a[0], r.b[n][0], r.b[n][1]);
      Mma<T>::product(c[n], r.a[1], r.b[n][2], r.b[n][3]);
    }
  }

  // Zeros where `there` has no key, whatever there is.
  static __device__ __forceinline__ void mask(Run& r, uint32_t there) {
    if (there == kFullWarp) return;
    const int t = lane_here() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = mask_pair(there, 8 * i + 2 * t);
      r.a[i / 2].r[i % 2 * 2] &= pair;
      r.a[i / 2].r[i % 2 * 2 + 1] &= pair;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) r.b[n][i] &= pair;
    }
  }
  // Less the means of block y, as they are rounded; the left ones times `weights`, of pairs of
  // keys.
  __device__ __forceinline__ void weigh_left(typename Mma<T>::A (&a)[2], int y,
                                             const uint32_t* weights) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint4 of = reinterpret_cast<const uint4*>(weights)[t];
    const int chunk = swizzled<DP>(row / 8, y);  // an even one: the next lies beside it
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t mean = twice(left_mean[y][(chunk ^ half) * 8 + g]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t& u = a[i / 2].r[i % 2 * 2 + half];
        u = times<T>(less<T>(u, mean), (&of.x)[i]);
      }
    }
  }
  __device__ __forceinline__ void weigh(Run& r, int y, const uint32_t* weights) const {
    weigh_left(r.a, y, weights);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int chunk = swizzled<DP>(column / 8 + n, y);
      const uint32_t mean = twice(right_mean[y][chunk * 8 + threadIdx.x % 32 / 4]);
#pragma unroll
      for (int i = 0; i < 4; ++i) r.b[n][i] = less<T>(r.b[n][i], mean);
    }
  }

  // c -= count times the sum of mean^T mean over the blocks in `which`, bits, or with kAll over
  // all: of what is rounded and what rounding has taken, but for the product of both latter.
  template <bool kAll>
  __device__ __forceinline__ void take_means(float (&c)[kTiles][4], const Means& left_lost,
                                             const Means& right_lost, uint32_t which, int count,
                                             const PanelLane<DP>& panel) const {
    const int lane = threadIdx.x % 32, t = lane % 4;
    const uint32_t of_right =
        smem_address(lane < 16 ? right_mean : right_lost) + lane % 16 * kRowBytes;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      typename Mma<T>::A a;
      ldmatrix_x4<true>(a.r,
                        smem_address(part == 0 ? left_lost : left_mean) + (panel.key ^ 2 * row));
      if constexpr (!kAll) {
        const uint32_t low = mask_pair(which, 2 * t), high = mask_pair(which, 8 + 2 * t);
        a.r[0] &= low, a.r[1] &= low, a.r[2] &= high, a.r[3] &= high;
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        uint32_t b[4];  // kept, lost
        ldmatrix_x4<true>(b, of_right + swizzled<DP>(column / 8 + n, lane) * 16);
        float of_means[4] = {};
        if (part == 1) Mma<T>::product(of_means, a, b[2], b[3]);
        Mma<T>::product(of_means, a, b[0], b[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          c[n][i] = fmaf(-static_cast<float>(count), of_means[i], c[n][i]);
          // One tile at a time: there are no registers for the operands of all.
          asm volatile("" : "+f"(c[n][i]));
        }
      }
    }
  }
};

// Rows of a warpgroup, of all of a head's columns: products of all keys as they are. `left` is
// keys, with 32 columns values besides, which lie behind them.
template <typename T, int DP, int kRows>
__device__ __forceinline__ void multiply_runs(float (&c)[DP / 8][4],
                                              const uint16_t (&left)[kRows][DP],
                                              const uint16_t (&right)[kRows][DP], int runs) {
  constexpr int kNext = DP * 2 * 16 >> 4;  // of a descriptor, from 16 rows to the next ones
  uint64_t a = descriptor<DP>(left, sizeof(left)), b = descriptor<DP>(right);
  const auto multiply = [&](int i, bool add) {
    Wgmma<T, DP>::template multiply<true, true>(c, a + kNext * i, b + kNext * i, add);
  };
  const int last = uniform(runs);
  wgmma_fence();
  multiply(0, false);
  multiply(1, true);
#pragma unroll 1
  for (int run = 1; run < last; ++run) {
    a += 2 * kNext;
    b += 2 * kNext;
    multiply(0, true);
    multiply(1, true);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(c);
}

// The same, of runs first .. last, of weighted deviations from the means of blocks, which a piece's
// warp makes of its 16 columns of the left side. They cancel within a block but for rounding: what
// is left of each block, times its mean of the right side, makes up for that side being taken as it
// is. kEights: the runs belong to that many times eight blocks at most.
template <int kEights, typename T, int DP, int kRows>
__device__ __forceinline__ void multiply_weighted(float (&c)[DP / 8][4],
                                                  const MomentPiece<T, DP, kRows, DP / 8>& of,
                                                  const uint16_t (&right)[kRows][DP],
                                                  const HeadBlocks& blocks, const uint32_t* weights,
                                                  int first, int last) {
  constexpr int kNext = DP * 2 * 16 >> 4;
  first = uniform(first), last = uniform(last);
  uint64_t b = descriptor<DP>(right) + 2 * kNext * first;
  const uint32_t one = Mma<T>::pack(1.f, 1.f);
  const int g = threadIdx.x % 32 / 4, first_block = blocks.of_run(first);
  float rest[kEights][4] = {};  // of blocks from the first one on
#pragma unroll
  for (int n = 0; n < DP / 8; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
  constexpr bool kAhead = DP == 64;  // where there are registers for the next run's
  typename Mma<T>::A next[2];
  if constexpr (kAhead) of.load_left(next, first);
#pragma unroll 1
  for (int run = first; run < last; ++run) {
    const int y = blocks.of_run(run);
    if constexpr (!kAhead) of.load_left(next, run);
    typename Mma<T>::A a[2] = {next[0], next[1]};
    of.weigh_left(a, y, weights + run * (kRun / 2));
    wgmma_fence();
    Wgmma<T, DP>::multiply_pn(c, a[0].r, b);
    Wgmma<T, DP>::multiply_pn(c, a[1].r, b + kNext);
    wgmma_commit();
    b += 2 * kNext;
    if constexpr (kAhead) of.load_left(next, min(run + 1, last - 1));
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      const uint32_t here = g + 8 * i == y - first_block ? one : 0u;
      Mma<T>::product(rest[i], a[0], here, here);
      Mma<T>::product(rest[i], a[1], here, here);
    }
    wgmma_wait<0>();
  }
  pin(c);
  typename Mma<T>::A a = {};
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    a.r[2 * i] = Mma<T>::pack(-rest[i][0], -rest[i][1]);
    a.r[2 * i + 1] = Mma<T>::pack(-rest[i][2], -rest[i][3]);
  }
  // Eight means are as many rows of a right operand.
  const int lane = threadIdx.x % 32;
  uint32_t means[kEights * DP / 32][4];
#pragma unroll
  for (int j = 0; j < DP / 32; ++j) {
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      const int row = (first_block + 8 * i + lane % 8) % 16;
      const int chunk = swizzled<DP>(4 * j + lane / 8, row);
      ldmatrix_x4<true>(means[kEights * j + i], smem_address(&of.right_mean[row][8 * chunk]));
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      Mma<T>::product(c[4 * j + n], a, means[kEights * j][n],
                      kEights > 1 ? means[kEights * j + kEights - 1][n] : 0u);
    }
  }
}

}  // namespace mra::cuda::sm90
