// Gradients of block means on Hopper: what coarse_bwd.cu computes. A block of threads owns 64
// blocks of one side and meets 64 of the other at a time: a warpgroup splits their means in two
// halves of bf16 and places them, another multiplies by wgmma, hi hi + hi lo + lo hi.
#pragma once

#include "coarse.h"
#include "coarse_tiles.cuh"

namespace mra::cuda::sm90 {

template <int DP>
struct CoarseBackwardShared {
  static constexpr int kStages = 2;
  SplitTile<DP> own[2], others[kStages][2];      // q~ and g, or k~ and v~
  float shift[kStages][64], delta[kStages][64];  // of the others; log2 units
  uint64_t full[kStages], empty[kStages];
  uint32_t selected[1];  // [64][words of the other side], one bit each
};

// The owned blocks, then the other side's tiles, by those that split.
template <int DP, bool kKeys>
__device__ __forceinline__ void place_tiles(const CoarseTile<kKeys, CoarseBackwardParams>& at,
                                            CoarseBackwardShared<DP>& s) {
  const auto& p = at.p;
  constexpr int kSplitters = CoarseTraits<DP>::kSplitters;
  const int thread = threadIdx.x - 128;
  const int64_t own = static_cast<int64_t>(at.own_at) * p.D;
  place_split<kSplitters>(
      s.own, {(kKeys ? p.k_mean : p.q_mean) + own, (kKeys ? p.v_mean : p.grad_out) + own},
      at.present, p.D, thread, [] {});
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
    place_split<kSplitters>(s.others[stage],
                            {(kKeys ? p.q_mean : p.k_mean) + first * p.D,
                             (kKeys ? p.grad_out : p.v_mean) + first * p.D},
                            present, p.D, thread, [&] {
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
__device__ __forceinline__ void attend_others(const CoarseTile<kKeys, CoarseBackwardParams>& at,
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
    uint32_t seen[2][2];
    at.find_seen(seen, s.selected, row, limit, pass, o0);
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
  using Traits = CoarseTraits<DP>;
  const CoarseTile<kKeys, CoarseBackwardParams> at(p, tile);
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
  return launch_grid(coarse_backward_kernel<DP>, keys + queries, CoarseTraits<DP>::kThreads, bytes,
                     stream, p, static_cast<unsigned>(keys));
}

}  // namespace mra::cuda::sm90
