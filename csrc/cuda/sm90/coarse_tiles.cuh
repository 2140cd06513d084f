// What the kernels of the block-coarse part share on Hopper: means in two halves of bf16, their
// products hi hi + hi lo + lo hi, and the tiles of blocks that meet.
#pragma once

#include "../coarse_pairs.cuh"
#include "half_pairs.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

// Threads that split, and that multiply, 64 owned blocks a warpgroup; and the registers that these
// have. All start with 128: what is left of a multiprocessor is for a second block of threads or
// for the kernel that runs beside.
template <int DP, int kGroups = 1>
struct CoarseTraits {
  static constexpr int kSplitters = DP == 64 ? 128 : 256, kMultipliers = 128 * kGroups;
  static constexpr int kThreads = kMultipliers + kSplitters, kSplits = 72;
  static constexpr int kLeft = (128 * kThreads - kSplits * kSplitters) / kMultipliers / 8 * 8;
  static constexpr int kMultiplies = kLeft < 240 ? kLeft : 240;
};

// The means of 64 blocks, rounded to bf16, and what that has taken.
template <int DP>
struct SplitTile {
  uint16_t high[DP / 64][64][64], low[DP / 64][64][64];
};

// Rows [64, D] of each of `from`, of which `present` are there, by kSplitters threads. ready()
// comes before anything is written, perhaps twice.
template <int kSplitters, int DP, int kTensors, class Ready>
__device__ __forceinline__ void place_split(SplitTile<DP> (&to)[kTensors],
                                            const float* const (&from)[kTensors], int present,
                                            int D, int thread, const Ready& ready) {
  using T = __nv_bfloat16;
  constexpr int kChunks = DP / 8, kEach = 64 * kChunks / kSplitters;  // eight columns each
  constexpr int kAtOnce = kEach / 2;
  const int chunk = thread % kChunks, d = 8 * chunk;
#pragma unroll 1
  for (int r0 = thread / kChunks; r0 < 64; r0 += kAtOnce * kSplitters / kChunks) {
    float4 x[kTensors][kAtOnce][2];
#pragma unroll
    for (int which = 0; which < kTensors; ++which) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int r = r0 + i * kSplitters / kChunks;
        const auto* row = reinterpret_cast<const float4*>(from[which] + r * D + d);
        const bool there = r < present && d < D;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          x[which][i][half] = there ? __ldg(row + half) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
      }
    }
    ready();
#pragma unroll
    for (int which = 0; which < kTensors; ++which) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int r = r0 + i * kSplitters / kChunks, place = (chunk % 8 ^ r % 8) * 8;
        const float4 u = x[which][i][0], w = x[which][i][1];
        const SplitPair<T> a(u.x, u.y), b(u.z, u.w), c(w.x, w.y), d(w.z, w.w);
        *reinterpret_cast<uint4*>(&to[which].high[chunk / 8][r][place]) =
            make_uint4(a.high, b.high, c.high, d.high);
        *reinterpret_cast<uint4*>(&to[which].low[chunk / 8][r][place]) =
            make_uint4(a.low, b.low, c.low, d.low);
      }
    }
  }
}

// c = A B^T.
template <int DP>
__device__ __forceinline__ void multiply_split(float (&c)[8][4], const SplitTile<DP>& a,
                                               const SplitTile<DP>& b) {
  using T = __nv_bfloat16;
  multiply_nt<T>(c, a.low, b.high);
  multiply_nt<T>(c, a.high, b.low, true);
  multiply_nt<T>(c, a.high, b.high, true);
}

// acc += P B. Starts it; P stays in `high` and `low` until it is done.
template <int DP>
__device__ __forceinline__ void multiply_split(float (&acc)[DP / 8][4], uint32_t (&high)[4][4],
                                               uint32_t (&low)[4][4], const float (&p)[8][4],
                                               const SplitTile<DP>& b) {
  using T = __nv_bfloat16;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &p[2 * j + i / 2][i % 2 * 2];
      const SplitPair<T> split(pair[0], pair[1]);
      high[j][i] = split.high;
      low[j][i] = split.low;
    }
  }
  pin(acc);
  wgmma_fence();
  multiply_pn<T>(acc, low, b.high);
  multiply_pn<T>(acc, high, b.low);
  multiply_pn<T>(acc, high, b.high);
  wgmma_commit();
}

// A tile of kRows blocks, 64 a warpgroup that multiplies. kKeys: key blocks, and the other side are
// query blocks of all heads of a group.
template <bool kKeys, class Params, int kRows = 64>
struct CoarseTile {
  const Params& p;
  // own_at: of all owned blocks.
  int owned, others, own_at, b, h, group, own0, present, first_head, words;
  int first_other, end;  // of the other side's

  __device__ CoarseTile(const Params& p, unsigned tile) : p(p) {
    owned = kKeys ? p.nk : p.nq;
    others = kKeys ? p.nq : p.nk;
    group = p.H / p.Hk;
    const unsigned heads = kKeys ? p.Hk : p.H, tiles = (owned + kRows - 1) / kRows;
    const unsigned head = tile / tiles;
    own0 = (tile - head * tiles) * kRows;
    b = head / heads;
    h = head - b * heads;
    present = min(kRows, owned - own0);
    own_at = head * owned + own0;
    first_head = kKeys ? b * p.H + h * group : b * p.Hk + h / group;
    words = (others + 63) / 64 * 2;
    first_other = kKeys ? start_of(p, own0) / 64 * 64 : 0;
    end = kKeys ? others : min(others, end_of(p, own0 + present - 1));
  }
  __device__ const Lists& lists() const {
    if constexpr (kKeys) {
      return p.column_lists;
    } else {
      return p.row_lists;
    }
  }
  __device__ int passes() const { return kKeys ? group : 1; }
  // Calls f(turn, pass, first of the other side's blocks).
  template <class F>
  __device__ __forceinline__ void for_turns(const F& f) const {
    int turn = 0;
#pragma unroll 1
    for (int pass = 0; pass < passes(); ++pass) {
#pragma unroll 1
      for (int o0 = first_other; o0 < end; o0 += 64) f(turn++, pass, o0);
    }
  }

  // Marks what the lists of its own blocks select, by a warpgroup that multiplies.
  __device__ void mark_selected(uint32_t* selected) const {
    const int part = kRows == 64 ? 0 : threadIdx.x / 128, thread = threadIdx.x - 128 * part;
    uint32_t* const own = selected + 64 * part * passes() * words;
    for (int i = thread; i < 64 * passes() * words; i += 128) own[i] = 0;
    group_sync(part);
    const int r = threadIdx.x / 2;
#pragma unroll 1
    for (int pass = 0; r < present && pass < passes(); ++pass) {
      const int64_t head = static_cast<int64_t>(b) * p.H + (kKeys ? h * group + pass : h);
      const List list = list_of(lists(), head, own0 + r);
      mark_list<2, 8>(selected + (r * passes() + pass) * words, list, threadIdx.x % 2, others);
    }
    group_sync(part);
  }

  // Which of 32 blocks from `o` on, pass by pass, owned block r sees without having selected them.
  __device__ uint32_t seen(const uint32_t* selected, int r, int limit, int pass, int o) const {
    const int n = limit - o;
    const uint32_t below = n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1;
    return ~selected[(r * passes() + pass) * words + o / 32] & (kKeys ? ~below : below);
  }
  // The same of owned blocks r and r + 8 and of 64 blocks from o on, beginning with the first of
  // this thread's columns: 2 t and 2 t + 1 of each eight.
  __device__ __forceinline__ void find_seen(uint32_t (&found)[2][2], const uint32_t* selected,
                                            int r, const int (&limit)[2], int pass, int o) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        found[half][word] =
            seen(selected, r + 8 * half, limit[half], pass, o + 32 * word) >> 2 * (threadIdx.x % 4);
      }
    }
  }
};

}  // namespace mra::cuda::sm90
