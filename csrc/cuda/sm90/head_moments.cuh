// Short heads (forward_head.cuh): the moments of order 1.
#pragma once

#include "../block_sum.cuh"
#include "head_products.cuh"

namespace mra::cuda::sm90 {

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
  // Warpgroups that have a part of the runs each, where every key counts.
  static constexpr int kParts = kWeighted && Shared::kPlaces > 0 ? kWarps / kRowPieces : 1;
  static constexpr int kScored = 9, kAdded = 10, kTaken = kAdded + kParts;  // barriers
  static_assert(kWarps % 4 == 0 && (kParts == 1 || kWarps / kParts <= 8));
  Shared& s;
  const Inputs& in;
  const HeadBlocks& blocks;
  const PanelLane<DP>& panel;
  int runs, phase;
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
      if (warp < kRowPieces * kParts) {
        make_piece<DP / 8, true>(warp % kRowPieces, 0, warp / kRowPieces);
      }
      return;
    }
    constexpr int kCut = std::max(kWarps / kRowPieces, DP / 32), kTiles = DP / 8 / kCut;
#pragma unroll 1
    for (int piece = warp; piece < kRowPieces * kCut; piece += kWarps) {
      make_piece<kTiles, false>(piece % kRowPieces, piece / kRowPieces * kTiles * 8);
    }
  }

  template <int kTiles, bool kWhole>
  __device__ __forceinline__ void make_piece(int row_piece, int column, int part = 0) const {
    const int row = row_piece * 16 % DP;
    const bool sigma = (row_piece >= kRowPieces / 2) == (DP == 64);
    const bool values_left = DP == 32 && !sigma, values_right = DP == 64 && !sigma;
    const MomentPiece<T, DP, Shared::kRows, kTiles> of(
        values_left ? in.v() : in.k(), values_left ? s.coarse.v : s.coarse.k,
        values_right ? in.v() : in.k(), values_right ? s.coarse.v : s.coarse.k, row, column, panel);
    float c[kTiles][4];
    if constexpr (kWhole && kWeighted) {
      const int each = (runs + kParts - 1) / kParts, first = min(part * each, runs);
      multiply_weighted<kParts == 1 ? 2 : 1>(c, of, values_right ? in.v() : in.k(), blocks,
                                             s.coarse.weights, first, min(first + each, runs));
      if constexpr (kParts > 1) {
        if (!add_parts(c, part)) return;
      }
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

  // From the last part to the first one, whose warpgroup has the sums then: true for that. All
  // warps have made their scores when the first sums take the places of the means.
  __device__ __forceinline__ bool add_parts(float (&c)[DP / 8][4], int part) const {
    static_assert(Shared::kPlaces == DP / 8 && kTaken < 16);
    const int thread = threadIdx.x % 128;
    wait_for_part(part);
#pragma unroll
    for (int i = 0; i < Shared::kPlaces; ++i) {
      float4& place = s.place(i, thread);
      if (part < kParts - 1) {
        const float4 others = place;
        c[i][0] += others.x, c[i][1] += others.y, c[i][2] += others.z, c[i][3] += others.w;
      }
      if (part > 0) place = make_float4(c[i][0], c[i][1], c[i][2], c[i][3]);
    }
    pass_on(part);
    if (part > 0) return false;
    meet<128>(kTaken);  // the matrices come where the sums were
    return true;
  }
  // For all scores, and the sums of the part behind. racecheck follows neither who arrives and goes
  // on nor barriers of a part of the block, so that in its builds all wait for all.
  static __device__ __forceinline__ void wait_for_part(int part) {
    if constexpr (kRacecheck) {
      for (int i = part; i < kParts; ++i) meet<Shared::kRows>(kScored);
    } else if (part == kParts - 1) {
      meet<Shared::kRows>(kScored);
    } else {
      arrive<Shared::kRows>(kScored);
      meet<256>(kAdded + part);
    }
  }
  static __device__ __forceinline__ void pass_on(int part) {
    if constexpr (kRacecheck) {
      for (int i = 0; i < part; ++i) meet<Shared::kRows>(kScored);
    } else if (part > 0) {
      arrive<256>(kAdded + part - 1);
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void write(const float (&c)[kTiles][4], bool sigma, int row,
                                        int column, bool transposed) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    uint16_t(&matrix)[DP][DP] = s.coarse.matrices[sigma];
    const int lane = threadIdx.x % 32;
    const int counted = __reduce_add_sync(kFullWarp, lane < runs ? __popc(s.keys_there[lane]) : 0);
    float over_n = 1.f / static_cast<float>(max(counted, 1));
    if constexpr (kWeighted) over_n /= kept_weight<T>(s.coarse.most[phase], blocks);
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
  Moments<T, kWeighted, DP, Shared, Inputs>{s, in, blocks, panel, runs, phase, out}.make(warp);
  barrier_arrive(&s.coarse.made);
}

}  // namespace mra::cuda::sm90
