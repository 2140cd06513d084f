// Gradients of block means on Hopper: what coarse_bwd.cu computes. A block of threads owns 64
// blocks of one side and meets 64 of the other at a time: a warpgroup splits their means in two
// halves of bf16 and places them, another multiplies by wgmma, hi hi + hi lo + lo hi.
#pragma once

#include "../coarse_bwd.cuh"
#include "coarse_backward.h"
#include "half_pairs.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

// Threads that split, and the registers that these and the warpgroup that multiplies have. All
// start with 128 registers: what is left of a multiprocessor is for a second block of threads (D
// 64) or for the kernel that runs beside.
template <int DP>
struct CoarseBackwardTraits {
  static constexpr int kSplitters = DP == 64 ? 128 : 256, kThreads = 128 + kSplitters;
  static constexpr int kMultiplies = DP == 64 ? 184 : 240, kSplits = 72;
};

// The means of 64 blocks, rounded to bf16, and what that has taken.
template <int DP>
struct SplitTile {
  uint16_t high[DP / 64][64][64], low[DP / 64][64][64];
};

template <int DP>
struct CoarseBackwardShared {
  static constexpr int kStages = 2;
  SplitTile<DP> own[2], others[kStages][2];      // q~ and g, or k~ and v~
  float shift[kStages][64], delta[kStages][64];  // of the others; log2 units
  uint64_t full[kStages], empty[kStages];
  uint32_t selected[1];  // [64][words of the other side], one bit each
};

// Rows [64, D] of `first` and of `second`, of which `present` are there, by those that split.
// ready() comes before anything is written, perhaps twice.
template <int DP, class Ready>
__device__ __forceinline__ void place_split(SplitTile<DP> (&to)[2], const float* first,
                                            const float* second, int present, int D,
                                            const Ready& ready) {
  using T = __nv_bfloat16;
  constexpr int kSplitters = CoarseBackwardTraits<DP>::kSplitters;
  constexpr int kChunks = DP / 8, kEach = 64 * kChunks / kSplitters;  // eight columns each
  constexpr int kAtOnce = kEach / 2;
  const int thread = threadIdx.x - 128, chunk = thread % kChunks, d = 8 * chunk;
#pragma unroll 1
  for (int r0 = thread / kChunks; r0 < 64; r0 += kAtOnce * kSplitters / kChunks) {
    float4 x[2][kAtOnce][2];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int r = r0 + i * kSplitters / kChunks;
        const float4* from = reinterpret_cast<const float4*>((which ? second : first) + r * D + d);
        const bool there = r < present && d < D;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          x[which][i][half] = there ? __ldg(from + half) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
      }
    }
    ready();
#pragma unroll
    for (int which = 0; which < 2; ++which) {
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

// A tile of 64 blocks. kKeys: key blocks, and the other side are query blocks of all heads of a
// group.
template <bool kKeys>
struct CoarseTile {
  const CoarseBackwardParams& p;
  // own_at: of all owned blocks.
  int owned, others, own_at, b, h, group, own0, present, first_head, words;
  int first_other, end;  // of the other side's

  __device__ CoarseTile(const CoarseBackwardParams& p, unsigned tile) : p(p) {
    owned = kKeys ? p.nk : p.nq;
    others = kKeys ? p.nq : p.nk;
    group = p.H / p.Hk;
    const unsigned heads = kKeys ? p.Hk : p.H, tiles = (owned + 63) / 64;
    const unsigned head = tile / tiles;
    own0 = (tile - head * tiles) * 64;
    b = head / heads;
    h = head - b * heads;
    present = min(64, owned - own0);
    own_at = head * owned + own0;
    first_head = kKeys ? b * p.H + h * group : b * p.Hk + h / group;
    words = (others + 63) / 64 * 2;
    first_other = kKeys ? start_of(p, own0) / 64 * 64 : 0;
    end = kKeys ? others : min(others, end_of(p, own0 + present - 1));
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

  // Marks what the lists of the owned blocks select, by the warpgroup that multiplies.
  __device__ void mark_selected(uint32_t* selected) const {
    for (int i = threadIdx.x; i < 64 * passes() * words; i += 128) selected[i] = 0;
    group_sync();
    const int r = threadIdx.x / 2;
#pragma unroll 1
    for (int pass = 0; r < present && pass < passes(); ++pass) {
      const int64_t head = static_cast<int64_t>(b) * p.H + (kKeys ? h * group + pass : h);
      const List list = list_of(kKeys ? p.column_lists : p.row_lists, head, own0 + r);
      mark_list<2, 8>(selected + (r * passes() + pass) * words, list, threadIdx.x % 2, others);
    }
    group_sync();
  }

  // Which of 32 blocks from `o` on, pass by pass, owned block r sees without having selected them.
  __device__ uint32_t seen(const uint32_t* selected, int r, int limit, int pass, int o) const {
    const int n = limit - o;
    const uint32_t below = n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1;
    return ~selected[(r * passes() + pass) * words + o / 32] & (kKeys ? ~below : below);
  }
};

// The owned blocks, then the other side's tiles, by those that split.
template <int DP, bool kKeys>
__device__ __forceinline__ void place_tiles(const CoarseTile<kKeys>& at,
                                            CoarseBackwardShared<DP>& s) {
  const auto& p = at.p;
  const int thread = threadIdx.x - 128;
  const int64_t own = static_cast<int64_t>(at.own_at) * p.D;
  place_split<DP>(s.own, (kKeys ? p.k_mean : p.q_mean) + own, (kKeys ? p.v_mean : p.grad_out) + own,
                  at.present, p.D, [] {});
  at.for_turns([&](int turn, int pass, int o0) {
    const int stage = turn % s.kStages, present = at.others - o0;
    const int64_t first = static_cast<int64_t>(at.first_head + pass) * at.others + o0;
    float shift = -INFINITY, delta = 0.f;
    if (thread < min(64, present)) {
      if constexpr (kKeys) {
        shift = -log2_of_lse(p.lse[first + thread]);
        delta = p.delta[first + thread];
      } else {
        shift = log2_approx(static_cast<float>(p.k_count[at.b * p.nk + o0 + thread]));
      }
    }
    place_split<DP>(s.others[stage], (kKeys ? p.q_mean : p.k_mean) + first * p.D,
                    (kKeys ? p.grad_out : p.v_mean) + first * p.D, present, p.D, [&] {
                      if (turn < s.kStages) return;
                      barrier_wait(&s.empty[stage], turn / s.kStages - 1 & 1);
                    });
    if (thread < 64) {
      s.shift[stage][thread] = shift;
      s.delta[stage][thread] = delta;
    }
    fence_for_copies();
    barrier_arrive(&s.full[stage]);
  });
}

// What the owned blocks get, by a warpgroup.
template <int DP, bool kKeys>
__device__ __forceinline__ void attend_others(const CoarseTile<kKeys>& at,
                                              CoarseBackwardShared<DP>& s) {
  const auto& p = at.p;
  const int row = 16 * warp_index() + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float own_shift[2], own_delta[2];
  int limit[2];
  // Asked for again in the end: registers are full between.
  const auto count_of = [&](int r) {
    return r < at.present ? (kKeys ? p.k_count : p.q_count)[at.b * at.owned + at.own0 + r] : 0;
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half, i = at.own0 + r;
    const bool there = r < at.present;
    own_shift[half] = kKeys ? log2_approx(static_cast<float>(count_of(r)))
                            : -log2_of_lse(there ? p.lse[at.own_at + r] : INFINITY);
    own_delta[half] = there && !kKeys ? p.delta[at.own_at + r] : 0.f;
    limit[half] = kKeys ? start_of(p, i) : min(at.others, end_of(p, i));
  }
  at.mark_selected(s.selected);

  float acc[DP / 8][4] = {}, acc_v[kKeys ? DP / 8 : 1][4] = {};
  at.for_turns([&](int turn, int pass, int o0) {
    const int stage = uniform(turn % s.kStages);
    float c[8][4], ds[8][4];
    barrier_wait(&s.full[stage], turn / s.kStages & 1);
    pin(c);
    pin(ds);
    wgmma_fence();
    multiply_split<DP>(c, s.own[0], s.others[stage][0]);
    wgmma_commit();
    multiply_split<DP>(ds, s.own[1], s.others[stage][1]);
    wgmma_commit();
    uint32_t seen[2][2];  // this thread's columns are 2 t and 2 t + 1 of each eight
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        seen[half][word] =
            at.seen(s.selected, row + 8 * half, limit[half], pass, o0 + 32 * word) >> 2 * t;
      }
    }
    wgmma_wait<1>();
    pin(c);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 shift = load_pair(&s.shift[stage][8 * n + 2 * t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = exp2_approx(
            fmaf(c[n][i], p.scale * kLog2e, own_shift[i / 2] + (i % 2 ? shift.y : shift.x)));
        const bool there = seen[i / 2][n / 4] >> n % 4 * 8 + i % 2 & 1;
        c[n][i] = there ? weight : 0.f;
      }
    }
    wgmma_wait<0>();
    pin(ds);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 delta = kKeys ? load_pair(&s.delta[stage][8 * n + 2 * t]) : float2{};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ds[n][i] = c[n][i] * (ds[n][i] - (!kKeys ? own_delta[i / 2] : i % 2 ? delta.y : delta.x));
      }
    }
    uint32_t high[4][4], low[4][4], high_v[4][4], low_v[4][4];
    multiply_split<DP>(acc, high, low, ds, s.others[stage][0]);
    if constexpr (kKeys) {
      if (DP > 64) wgmma_wait<0>();  // one after the other: registers are full
      pin(c);
      multiply_split<DP>(acc_v, high_v, low_v, c, s.others[stage][1]);
    }
    wgmma_wait<0>();
    pin(acc);
    if constexpr (kKeys) pin(acc_v);
    barrier_arrive(&s.empty[stage]);
  });

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half;
    if (r >= at.present) continue;
    const float share = 1.f / static_cast<float>(max(1, count_of(r)));
    const auto store = [&](float* to, float factor, const auto& sums) {
      to += static_cast<int64_t>(at.own_at + r) * p.D + 2 * t;
#pragma unroll
      for (int n = 0; n < DP / 8; ++n) {
        if (8 * n >= p.D) break;
        *reinterpret_cast<float2*>(to + 8 * n) =
            make_float2(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
      }
    };
    store(kKeys ? p.grad_k : p.grad_q, p.scale * share, acc);
    if constexpr (kKeys) store(p.grad_v, share, acc_v);
  }
}

template <int DP, bool kKeys>
__device__ __forceinline__ void run(const CoarseBackwardParams& p, unsigned tile,
                                    CoarseBackwardShared<DP>& s) {
  using Traits = CoarseBackwardTraits<DP>;
  const CoarseTile<kKeys> at(p, tile);
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.kStages; ++i) {
      barrier_init(&s.full[i], Traits::kSplitters / 32);
      barrier_init(&s.empty[i], 4);
    }
  }
  __syncthreads();
  if (warp_index() >= 4) {
    give_registers<Traits::kSplits>();
    place_tiles<DP>(at, s);
  } else {
    take_registers<Traits::kMultiplies>();
    attend_others<DP>(at, s);
  }
}

template <int DP>
__global__ void __launch_bounds__(512, 1)
    coarse_backward_kernel(const __grid_constant__ CoarseBackwardParams p, unsigned key_tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  let_next_start();
  extern __shared__ char raw[];
  auto& s = aligned<CoarseBackwardShared<DP>>(raw);
  if (blockIdx.x < key_tiles) {
    run<DP, true>(p, blockIdx.x, s);
  } else {
    run<DP, false>(p, blockIdx.x - key_tiles, s);
  }
#endif
}

template <int DP>
cudaError_t launch_coarse_backward(const CoarseBackwardParams& p, const Device& device,
                                   cudaStream_t stream) {
  const int64_t key_words = int64_t{p.H / p.Hk} * ((p.nq + 63) / 64), words = (p.nk + 63) / 64;
  const int64_t bytes =
      sizeof(CoarseBackwardShared<DP>) + 1024 + 64 * 8 * (key_words > words ? key_words : words);
  if (p.D % 8 != 0 || bytes > device.max_smem) return cudaErrorNotSupported;
  const int64_t keys = int64_t{p.B} * p.Hk * ((p.nk + 63) / 64);
  const int64_t queries = int64_t{p.B} * p.H * ((p.nq + 63) / 64);
  return launch_grid(coarse_backward_kernel<DP>, keys + queries, CoarseBackwardTraits<DP>::kThreads,
                     bytes, stream, p, static_cast<unsigned>(keys));
}

}  // namespace mra::cuda::sm90
