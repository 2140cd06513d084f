// The softmax of query blocks over the key blocks that they haven't selected, on Hopper: the state
// of the block-coarse part where the plan's kernel doesn't make it. A block of threads owns 64
// query blocks for each warpgroup that multiplies and meets 64 key blocks at a time, which another
// splits (coarse_tiles.cuh).
#pragma once

#include "coarse.h"
#include "coarse_tiles.cuh"

namespace mra::cuda::sm90 {

template <int DP, int kGroups>
struct CoarseForwardShared {
  static constexpr int kStages = 2;
  SplitTile<DP> own[kGroups][1], others[kStages][2];  // q~; k~ and v~
  float shift[kStages][64];                           // log2 of the counts of keys
  uint64_t full[kStages], empty[kStages];
  uint32_t selected[1];  // [64 kGroups][words of key blocks], one bit each
};

template <int kGroups>
using QueryTile = CoarseTile<false, CoarseForwardParams, 64 * kGroups>;

// The owned query blocks, then tiles of key blocks, by those that split.
template <int DP, int kGroups>
__device__ __forceinline__ void place_means(const QueryTile<kGroups>& at,
                                            CoarseForwardShared<DP, kGroups>& s) {
  using Traits = CoarseTraits<DP, kGroups>;
  const auto& p = at.p;
  const int thread = threadIdx.x - Traits::kMultipliers;
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) {
    const float* own = p.q_mean + (static_cast<int64_t>(at.own_at) + 64 * group) * p.D;
    place_split<Traits::kSplitters>(s.own[group], {own}, at.present - 64 * group, p.D, thread,
                                    [] {});
  }
  at.for_turns([&](int turn, int, int y0) {
    const int stage = turn % s.kStages, present = at.others - y0;
    const int64_t first = static_cast<int64_t>(at.first_head) * at.others + y0;
    float shift = -INFINITY;
    if (thread < min(64, present)) {
      shift = log2_approx(static_cast<float>(p.k_count[at.b * p.nk + y0 + thread]));
    }
    place_split<Traits::kSplitters>(s.others[stage],
                                    {p.k_mean + first * p.D, p.v_mean + first * p.D}, present, p.D,
                                    thread, [&] {
                                      if (turn < s.kStages) return;
                                      barrier_wait(&s.empty[stage], turn / s.kStages - 1 & 1);
                                    });
    if (thread < 64) s.shift[stage][thread] = shift;
    fence_for_copies();
    barrier_arrive(&s.full[stage]);
  });
}

// The state of 64 query blocks, by a warpgroup.
template <int DP, int kGroups>
__device__ __forceinline__ void attend_keys(const QueryTile<kGroups>& at,
                                            CoarseForwardShared<DP, kGroups>& s) {
  const auto& p = at.p;
  const int t = threadIdx.x % 4, row = 16 * warp_index() + threadIdx.x % 32 / 4;
  const SplitTile<DP>& own = s.own[kGroups == 1 ? 0 : uniform(threadIdx.x / 128)][0];
  int limit[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) limit[half] = end_of(p, at.own0 + row + 8 * half);
  at.mark_selected(s.selected);

  // Log2 units. The sums are of this thread's columns.
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, acc[DP / 8][4] = {};
  at.for_turns([&](int turn, int, int y0) {
    const int stage = uniform(turn % s.kStages);
    float c[8][4];
    barrier_wait(&s.full[stage], turn / s.kStages & 1);
    pin(c);
    wgmma_fence();
    multiply_split<DP>(c, own, s.others[stage][0]);
    wgmma_commit();
    uint32_t seen[2][2];
    at.find_seen(seen, s.selected, row, {min(limit[0], at.others), min(limit[1], at.others)}, 0,
                 y0);
    wgmma_wait<0>();
    pin(c);
    float highest[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 shift = load_pair(&s.shift[stage][8 * n + 2 * t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float logit = fmaf(c[n][i], p.scale * kLog2e, i % 2 ? shift.y : shift.x);
        const bool there = seen[i / 2][n / 4] >> n % 4 * 8 + i % 2 & 1;
        c[n][i] = there ? logit : -INFINITY;
        highest[i / 2] = fmaxf(highest[i / 2], c[n][i]);
      }
    }
    float offset[2], factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = quad_max(highest[half]);
      offset[half] = highest[half] == -INFINITY ? 0.f : highest[half];
      factor[half] = exp2_approx(top[half] - offset[half]);
      top[half] = highest[half];
      sum[half] *= factor[half];
    }
#pragma unroll
    for (int n = 0; n < DP / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] *= factor[i / 2];
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        c[n][i] = exp2_approx(c[n][i] - offset[i / 2]);
        sum[i / 2] += c[n][i];
      }
    }
    uint32_t high[4][4], low[4][4];
    multiply_split<DP>(acc, high, low, c, s.others[stage][1]);
    wgmma_wait<0>();
    pin(acc);
    barrier_arrive(&s.empty[stage]);
  });

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half;
    sum[half] = quad_sum(sum[half]);
    if (r >= at.present) continue;
    const bool none = sum[half] == 0.f;
    const float share = none ? 0.f : 1.f / sum[half];
    if (t == 0) p.lse[at.own_at + r] = none ? -INFINITY : top[half] / kLog2e + logf(sum[half]);
    float* to = p.mean + static_cast<int64_t>(at.own_at + r) * p.D + 2 * t;
#pragma unroll
    for (int n = 0; n < DP / 8; ++n) {
      if (8 * n >= p.D) break;
      *reinterpret_cast<float2*>(to + 8 * n) =
          make_float2(acc[n][2 * half] * share, acc[n][2 * half + 1] * share);
    }
  }
}

template <int DP, int kGroups>
__global__ void __launch_bounds__(512, 1)
    coarse_forward_kernel(const __grid_constant__ CoarseForwardParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Traits = CoarseTraits<DP, kGroups>;
  let_next_start();
  extern __shared__ char raw[];
  auto& s = aligned<CoarseForwardShared<DP, kGroups>>(raw);
  const QueryTile<kGroups> at(p, blockIdx.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.kStages; ++i) {
      barrier_init(&s.full[i], Traits::kSplitters / 32);
      barrier_init(&s.empty[i], Traits::kMultipliers / 32);
    }
  }
  __syncthreads();
  if (warp_index() >= 4 * kGroups) {
    give_registers<Traits::kSplits>();
    place_means<DP, kGroups>(at, s);
  } else {
    take_registers<Traits::kMultiplies>();
    attend_keys<DP, kGroups>(at, s);
  }
#endif
}

template <int DP>
cudaError_t launch_coarse_forward(const CoarseForwardParams& p, const Device& device,
                                  cudaStream_t stream) {
  const auto launch = [&](auto groups) {
    constexpr int kGroups = groups, kRows = 64 * kGroups;
    const int64_t bytes =
        sizeof(CoarseForwardShared<DP, kGroups>) + 1024 + kRows * 8 * ((p.nk + 63) / 64);
    if (p.D % 8 != 0 || bytes > device.max_smem) return cudaErrorNotSupported;
    const int64_t tiles = int64_t{p.B} * p.H * ((p.nq + kRows - 1) / kRows);
    return launch_grid(coarse_forward_kernel<DP, kGroups>, tiles,
                       CoarseTraits<DP, kGroups>::kThreads, bytes, stream, p);
  };
  const cudaError_t error = launch(std::integral_constant<int, 2>{});
  return error == cudaErrorNotSupported ? launch(std::integral_constant<int, 1>{}) : error;
}

}  // namespace mra::cuda::sm90
