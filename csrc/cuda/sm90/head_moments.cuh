// Short heads (forward_head.cuh): the moments of order 1.
#pragma once

#include "../block_sum.cuh"
#include "head_pool.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

// Pairs of a half type, element by element, rounded once.
template <typename T>
struct Pairs;
template <>
struct Pairs<__nv_bfloat16> {
  using Two = __nv_bfloat162;
};
template <>
struct Pairs<__half> {
  using Two = __half2;
};
template <typename T>
__device__ __forceinline__ uint32_t less(uint32_t a, uint32_t b) {
  using Two = typename Pairs<T>::Two;
  const Two d = __hsub2(reinterpret_cast<const Two&>(a), reinterpret_cast<const Two&>(b));
  return reinterpret_cast<const uint32_t&>(d);
}
template <typename T>
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
  using Two = typename Pairs<T>::Two;
  const Two d = __hmul2(reinterpret_cast<const Two&>(a), reinterpret_cast<const Two&>(b));
  return reinterpret_cast<const uint32_t&>(d);
}

// What moments are kept in for backward (moments_type of common/stages.h).
template <typename T>
using Kept = std::conditional_t<std::is_same_v<T, __half>, float, T>;

// float16 lacks the range of moments: by which powers of two they are brought to 2^14 at most, and
// back. `most`: the largest key and value of the head, bits of T; a deviation from a mean is no
// more than twice that.
template <typename T>
struct MomentScale {
  __device__ explicit MomentScale(const uint32_t (&)[2]) {}
  __device__ float of(bool /*sigma*/) const { return 1.f; }
  __device__ float back(bool /*sigma*/) const { return 1.f; }
};
template <>
struct MomentScale<__half> {
  int of_c, of_sigma;  // exponents

  __device__ explicit MomentScale(const uint32_t (&most)[2]) {
    const float k = value(most[0]), v = value(most[1]);
    of_c = exponent(4.f * k * v);
    of_sigma = exponent(4.f * k * k);
  }
  static __device__ float value(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
  static __device__ int exponent(float bound) {
    return bound == 0.f ? 0 : 14 - (static_cast<int>(__float_as_uint(bound) >> 23) - 126);
  }
  static __device__ float power(int e) { return __uint_as_float((127 + e) << 23); }
  __device__ float of(bool sigma) const { return power(sigma ? of_sigma : of_c); }
  __device__ float back(bool sigma) const { return power(-(sigma ? of_sigma : of_c)); }
};

// By which power of two weights times counts of keys are multiplied where they are kept in float16:
// their products with keys or values, at most those of a quarter of a block, fit it then.
template <typename T>
__device__ __forceinline__ float kept_weight(const uint32_t (&most)[2], const HeadBlocks& blocks) {
  if constexpr (std::is_same_v<T, __half>) {
    using Scale = MomentScale<__half>;
    const float largest = fmaxf(Scale::value(most[0]), Scale::value(most[1]));
    return Scale::power(min(9, Scale::exponent(0.5f * (kRun << blocks.shift) * largest)));
  }
  return 1.f;
}

// The largest value of a run, by a warp, to *most.
template <typename T, int DP>
__device__ __forceinline__ void take_most(uint32_t* most, const uint16_t (&rows)[kRun][DP],
                                          uint32_t there, const PanelLane<DP>& panel) {
  const int g = threadIdx.x % 32 / 4;
  uint32_t highest = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < DP / 16; ++i) {
      uint32_t r[4];
      ldmatrix_x4<false>(r, smem_address(rows) + 16 * half * panel.kRowBytes + panel.rows(i));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!(there >> (16 * half + g + e % 2 * 8) & 1)) continue;
        highest = max(highest, max(r[e] & 0x7fffu, r[e] >> 16 & 0x7fffu));
      }
    }
  }
  highest = __reduce_max_sync(kFullWarp, highest);
  if (threadIdx.x % 32 == 0) atomicMax(most, highest);
}

// The 16 bits of column `column` of row `row`, twice.
template <int DP>
__device__ __forceinline__ uint32_t twice(const uint16_t (&from)[16][DP], int row, int column) {
  const uint32_t x = from[row][swizzled<DP>(column / 8, row) * 8 + column % 8];
  return x | x << 16;
}

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
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = mask_pair(there, 8 * i + threadIdx.x % 4 * 2);
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
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t mean = twice(left_mean, y, row + 8 * half + g);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t& u = a[i / 2].r[i % 2 * 2 + half];
        u = times<T>(less<T>(u, mean), weights[4 * i + t]);
      }
    }
  }
  __device__ __forceinline__ void weigh(Run& r, int y, const uint32_t* weights) const {
    weigh_left(r.a, y, weights);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint32_t mean = twice(right_mean, y, column + 8 * n + threadIdx.x % 32 / 4);
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

// The same of weighted deviations from the means of blocks, which a piece's warp makes of its 16
// columns of the left side. They cancel within a block but for rounding: what is left of each
// block, times its mean of the right side, makes up for that side being taken as it is.
template <typename T, int DP, int kRows>
__device__ __forceinline__ void multiply_weighted(float (&c)[DP / 8][4],
                                                  const MomentPiece<T, DP, kRows, DP / 8>& of,
                                                  const uint16_t (&right)[kRows][DP],
                                                  const HeadBlocks& blocks, const uint32_t* weights,
                                                  int runs, const PanelLane<DP>& panel) {
  constexpr int kNext = DP * 2 * 16 >> 4;
  uint64_t b = descriptor<DP>(right);
  const uint32_t one = Mma<T>::pack(1.f, 1.f);
  const int g = threadIdx.x % 32 / 4, last = uniform(runs);
  float rest[2][4];  // of blocks 0 to 15
#pragma unroll
  for (int n = 0; n < DP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = rest[n % 2][i] = 0.f;
  }
  constexpr bool kAhead = DP == 64;  // where there are registers for the next run's
  typename Mma<T>::A next[2];
  if constexpr (kAhead) of.load_left(next, 0);
#pragma unroll 1
  for (int run = 0; run < last; ++run) {
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
    const uint32_t low = g == y ? one : 0u, high = g + 8 == y ? one : 0u;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Mma<T>::product(rest[0], a[k], low, low);
      Mma<T>::product(rest[1], a[k], high, high);
    }
    wgmma_wait<0>();
  }
  pin(c);
#pragma unroll
  for (int i = 0; i < 8; ++i) rest[i / 4][i % 4] = -rest[i / 4][i % 4];
  multiply_pn<T>(c, rest, as_panel(of.right_mean), panel);
}

// Which blocks have all of their keys, as bits, and which others have any.
struct MomentBlocks {
  uint32_t full, partial;

  template <class Shared>
  __device__ __forceinline__ MomentBlocks(const Shared& s, const HeadBlocks& blocks, int runs) {
    const int lane = threadIdx.x % 32;
    const uint32_t there = lane < runs ? s.keys_there[lane] : 0u;
    full = __ballot_sync(kFullWarp, there == kFullWarp);
    partial = __ballot_sync(kFullWarp, there != 0);
    if (blocks.shift != 0) {
      const auto both = [&](uint32_t bits) { return bits >> 2 * lane % 32 & 3; };
      const bool here = lane < kHeadRuns / 2;
      const uint32_t full_runs = full;
      full = __ballot_sync(kFullWarp, here && both(full_runs) == 3);
      partial = __ballot_sync(kFullWarp, here && both(partial) != 0);
    }
    partial &= ~full;
  }
};

// C and Sigma of a head, to shared memory (32 columns: C^T) and, unless null, to `out`, [2, DP,
// DP]. Their rows, sixteen a piece: with 64 columns those of C, products of keys with values, above
// those of Sigma; with 32 those of Sigma above C^T, products of values with keys, so that a
// warpgroup has both.
template <typename T, bool kWeighted, int DP, class Shared, class Inputs>
struct Moments {
  static constexpr int kWarps = Shared::kRows / kRun, kRowPieces = 2 * DP / 16;
  static_assert(kWarps % 4 == 0);
  Shared& s;
  const Inputs& in;
  const HeadBlocks& blocks;
  const PanelLane<DP>& panel;
  int runs, phase;
  float over_n;
  Kept<T>* out;

  // Even means: the product of the keys as they are, less that of the means. Weighted ones are
  // centred on the way. By warpgroups where every key counts.
  __device__ __forceinline__ void make(int warp) const {
    const int lane = threadIdx.x % 32;
    const uint32_t there = lane < runs ? s.keys_there[lane] : kFullWarp;
    // Even means count the same keys for every block.
    const bool halves = !kWeighted && blocks.shift != 0 && runs % 2 != 0;
    if (__all_sync(kFullWarp, there == kFullWarp) && !halves) {
      // What follows from it then takes no registers from head to head.
      if constexpr (kWeighted) asm volatile("" : "+r"(warp));
      if (warp < kRowPieces) make_piece<DP / 8, true>(warp, 0);
      return;
    }
    constexpr int kCut = std::max(kWarps / kRowPieces, DP / 32), kTiles = DP / 8 / kCut;
#pragma unroll 1
    for (int piece = warp; piece < kRowPieces * kCut; piece += kWarps) {
      make_piece<kTiles, false>(piece % kRowPieces, piece / kRowPieces * kTiles * 8);
    }
  }

  template <int kTiles, bool kWhole>
  __device__ __forceinline__ void make_piece(int row_piece, int column) const {
    const int row = row_piece * 16 % DP;
    const bool sigma = (row_piece >= kRowPieces / 2) == (DP == 64);
    const bool values_left = DP == 32 && !sigma, values_right = DP == 64 && !sigma;
    const MomentPiece<T, DP, Shared::kRows, kTiles> of(
        values_left ? in.v() : in.k(), values_left ? s.coarse.v : s.coarse.k,
        values_right ? in.v() : in.k(), values_right ? s.coarse.v : s.coarse.k, row, column, panel);
    float c[kTiles][4];
    if constexpr (kWhole && kWeighted) {
      multiply_weighted<T, DP>(c, of, values_right ? in.v() : in.k(), blocks, s.coarse.weights,
                               runs, panel);
    } else if constexpr (kWhole) {
      multiply_runs<T, DP>(c, in.k(), values_right ? in.v() : in.k(), runs);
    } else {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] = 0.f;
      }
#pragma unroll 1
      for (int run = 0; run < runs; ++run) {
        const uint32_t there = s.keys_there[run];
        if (there == 0) continue;
        auto keys = of.load(run);
        if constexpr (kWeighted) {
          of.weigh(keys, blocks.of_run(run), s.coarse.weights + run * (kRun / 2));
        }
        of.mask(keys, there);
        of.multiply(c, keys);
      }
    }
    const auto& left_lost = values_left ? s.coarse.v_lost : s.coarse.k_lost;
    const auto& right_lost = values_right ? s.coarse.v_lost : s.coarse.k_lost;
    if constexpr (kWhole && !kWeighted) {
      of.template take_means<true>(c, left_lost, right_lost, 0, kRun << blocks.shift, panel);
    } else if constexpr (!kWeighted) {
      const MomentBlocks which(s, blocks, runs);
      of.template take_means<false>(c, left_lost, right_lost, which.full, kRun << blocks.shift,
                                    panel);
#pragma unroll 1
      for (uint32_t left = which.partial; left != 0; left &= left - 1) {
        const int lead = blocks.lead(__ffs(left) - 1);
        int count = __popc(s.keys_there[lead]);
        if (blocks.shift != 0) count += __popc(s.keys_there[lead + 1]);
        of.template take_means<false>(c, left_lost, right_lost, left & -left, count, panel);
      }
    }
    write(c, sigma, row, column, values_left);
  }

  template <int kTiles>
  __device__ __forceinline__ void write(const float (&c)[kTiles][4], bool sigma, int row,
                                        int column, bool transposed) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    uint16_t(&matrix)[DP][DP] = s.coarse.matrices[sigma];
    const float scale = MomentScale<T>(s.coarse.most[phase]).of(sigma);
    Kept<T>* const to = out == nullptr ? nullptr : out + sigma * DP * DP;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        asm volatile("" ::: "memory");  // one pair after the other: addresses take registers
        const int r = row + g + 8 * half, chunk = column / 8 + n, d = 8 * chunk + 2 * t;
        const float x = c[n][2 * half] * over_n, y = c[n][2 * half + 1] * over_n;
        *reinterpret_cast<uint32_t*>(&matrix[r][swizzled<DP>(chunk, r) * 8 + 2 * t]) =
            Mma<T>::pack(x * scale, y * scale);
        if (to == nullptr) continue;
        if (transposed) {
          to[d * DP + r] = from_float<Kept<T>>(x);
          to[(d + 1) * DP + r] = from_float<Kept<T>>(y);
        } else {
          const float pair[2] = {x, y};
          store_values<2>(to + r * DP + d, pair);
        }
      }
    }
  }
};

// By all warps of the head; each has written its part when it arrives at s.coarse.made.
template <typename T, bool kWeighted, int DP, class Shared, class Inputs>
__device__ __forceinline__ void make_matrices(Shared& s, const Inputs& in, const HeadBlocks& blocks,
                                              int runs, int warp, int phase, Kept<T>* out) {
  const auto panel = panel_here<DP>();
  const int lane = threadIdx.x % 32;
  const int counted = __reduce_add_sync(kFullWarp, lane < runs ? __popc(s.keys_there[lane]) : 0);
  float over_n = 1.f / static_cast<float>(max(counted, 1));
  if constexpr (kWeighted) over_n /= kept_weight<T>(s.coarse.most[phase], blocks);
  Moments<T, kWeighted, DP, Shared, Inputs>{s, in, blocks, panel, runs, phase, over_n, out}.make(
      warp);
  barrier_arrive(&s.coarse.made);
}

}  // namespace mra::cuda::sm90
