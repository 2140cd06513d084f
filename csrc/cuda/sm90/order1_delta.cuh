// Of each row in the backward pass with weighted means, from one reading of q, dO and o:
//
//   delta = dO.o - dlse     x = dO C^T,  w = (q - centre) Sigma
//   u = s x.(q - centre),  t = s^2 w.(q - centre),  gamma = 1 / (1 + t / 4)
//
// C and Sigma stay in shared memory; a block of threads walks a chunk of a head's tiles of 64 rows,
// its warpgroups in turns.
#pragma once

#include <climits>

#include "../sm80/tile.cuh"
#include "moments.h"
#include "order1_delta.h"
#include "tma.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

struct Order1DeltaMaps : Order1Delta {
  CUtensorMap q_map, grad_out_map, out_map, moments_map;
  int tiles;  // of a chunk
};

// Measured choices (docs/kernels.md).
template <int DP>
struct Order1DeltaTraits {
  static constexpr int kStages = DP == 64 ? 2 : 3, kBlocks = order1_delta_resident(DP);
  static constexpr int kGroups = DP == 64 ? 1 : 2, kThreads = DP == 64 ? 160 : 384;
};

template <int DP>
struct Order1DeltaShared {
  static constexpr int kStages = Order1DeltaTraits<DP>::kStages, kPanels = DP / 64;
  uint16_t moments[2][kPanels][DP][64];     // C, Sigma
  uint16_t x[kStages][3][kPanels][64][64];  // q, dO, o
  alignas(8) float centre[DP], centre_sigma[DP];
  uint64_t moments_full, full[kStages], empty[kStages];
};

// kNarrow: head dims up to 32.
template <int DP, bool kNarrow>
__global__ void __launch_bounds__(Order1DeltaTraits<DP>::kThreads, Order1DeltaTraits<DP>::kBlocks)
    order1_delta_kernel(const __grid_constant__ Order1DeltaMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = __nv_bfloat16;
  using Shared = Order1DeltaShared<DP>;
  constexpr int kStages = Shared::kStages, kPanels = DP / 64;
  constexpr int kGroups = Order1DeltaTraits<DP>::kGroups;
  constexpr int kColumns = kNarrow ? 32 : 64, kTiles = kColumns / 8;  // of a panel that count
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  if (threadIdx.x == 0) {
    barrier_init(&s.moments_full, 1);
    barrier_init_ring(s.full, s.empty, 4);
    barrier_init_done();
  }
  const int head = blockIdx.x / p.chunks, chunk = blockIdx.x - head * p.chunks;
  const int b = head / p.H, h = head - b * p.H, first = chunk * p.tiles * 64;
  const int hk = h / (p.H / p.Hk), dim = matrix_dim<DP>(p.D);
  const int64_t key_head = static_cast<int64_t>(b) * p.Hk + hk;
  for (int d = threadIdx.x; d < DP; d += blockDim.x) {
    s.centre[d] = d < p.D ? p.centre[key_head * p.D + d] : 0.f;
    s.centre_sigma[d] = d < dim ? p.centre_term[(key_head * 2 + 1) * dim + d] : 0.f;
  }
  __syncthreads();
  const int tiles = uniform(min(p.tiles, (p.N - first + 63) / 64));
  if (warp_index() >= 4 * kGroups) {
    if constexpr (DP > 64) give_registers<24>();
    if (warp_index() > 4 * kGroups) return;
    const bool first_lane = threadIdx.x % 32 == 0;
    barrier_expect(&s.moments_full, 2 * DP * DP * 2);
    if (first_lane) copy_matrices<DP>(s.moments, p.moments_map, &s.moments_full, hk, b);
    const CUtensorMap* const maps[3] = {&p.q_map, &p.grad_out_map, &p.out_map};
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % kStages;
      if (tile >= kStages) barrier_wait(&s.empty[stage], tile / kStages - 1 & 1);
      barrier_expect(&s.full[stage], 3 * 64 * DP * 2);
      if (!first_lane) continue;
#pragma unroll
      for (int which = 0; which < 3; ++which) {
        for (int i = 0; i < kPanels; ++i) {
          copy_panel(s.x[stage][which][i], *maps[which], &s.full[stage], 64 * i, first + 64 * tile,
                     h, b);
        }
      }
    }
    return;
  }
  if constexpr (DP > 64) take_registers<240>();

  const int group = uniform(threadIdx.x / 128), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row = threadIdx.x / 32 % 4 * 16 + g;
  barrier_wait(&s.moments_full, 0);
#pragma unroll 1
  for (int tile = group; tile < tiles; tile += kGroups) {
    const int stage = tile % kStages, at = first + 64 * tile + row;
    const int64_t i = static_cast<int64_t>(head) * p.N + at;
    float share[2], delta[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool there = at + 8 * half < p.N;
      share[half] = there ? p.share[i + 8 * half] : 0.f;
      if (there && p.grad_lse != nullptr && t == 0) {
        delta[half] = -p.grad_lse[b * p.lse_strides.b + h * p.lse_strides.h +
                                  (at + 8 * half) * p.lse_strides.l];
      }
    }
    const auto& [q, grad_out, out] = s.x[stage];
    barrier_wait(&s.full[stage], tile / kStages & 1);
    float x[kPanels][kTiles][4], w[kPanels][kTiles][4];
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      pin(x[panel]);
      pin(w[panel]);
    }
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int j = 0; j < kColumns / 16 * kPanels; ++j) {
        Wgmma<T, kColumns>::template multiply<false, false>(
            x[panel], descriptor(grad_out[j / 4]) + 2 * (j % 4),
            descriptor(s.moments[0][j / 4][64 * panel]) + 2 * (j % 4), j > 0);
        Wgmma<T, kColumns>::template multiply<false, false>(
            w[panel], descriptor(q[j / 4]) + 2 * (j % 4),
            descriptor(s.moments[1][j / 4][64 * panel]) + 2 * (j % 4), j > 0);
      }
      wgmma_commit();
    }
    const auto pair_of = [&](const uint16_t(&from)[kPanels][64][64], int n, int half) {
      const uint16_t* const pair = &from[n / 8][row + 8 * half][(n % 8 ^ g) * 8 + 2 * t];
      return unpack2(*reinterpret_cast<const uint32_t*>(pair), T{});
    };
#pragma unroll
    for (int n = 0; n < kTiles * kPanels; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 grad = pair_of(grad_out, n, half), o = pair_of(out, n, half);
        delta[half] += grad.x * o.x + grad.y * o.y;
      }
    }
    float u[2] = {}, v[2] = {};
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      if (panel + 1 < kPanels) {
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      pin(x[panel]);
      pin(w[panel]);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int d = 64 * panel + 8 * n + 2 * t;
        const float2 centre = load_pair(&s.centre[d]), less = load_pair(&s.centre_sigma[d]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 own = pair_of(q, 8 * panel + n, half);
          own.x -= centre.x, own.y -= centre.y;
          u[half] += own.x * x[panel][n][2 * half] + own.y * x[panel][n][2 * half + 1];
          v[half] += own.x * (w[panel][n][2 * half] - less.x) +
                     own.y * (w[panel][n][2 * half + 1] - less.y);
        }
      }
    }
    barrier_arrive(&s.empty[stage]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[half] = quad_sum(delta[half]);
      u[half] = quad_sum(u[half]);
      v[half] = quad_sum(v[half]);
    }
    // Of the four threads of rows g and g + 8 the first writes for one, the second for the other.
    if (t >= 2 || at + 8 * t >= p.N) continue;
    const auto own = [&](const float(&x)[2]) { return t == 0 ? x[0] : x[1]; };
    const bool any = own(share) != 0.f;  // else the row may hold anything
    const float variance = any ? p.scale * p.scale * own(v) : 0.f;
    const float gamma = reciprocal_approx(1.f + variance / 4);
    const float gu = any ? gamma * p.scale * own(u) : 0.f;
    p.delta[i + 8 * t] = own(delta);
    p.coarse_delta[i + 8 * t] = own(delta) - gu;
    p.slope[i + 8 * t] = gu;
    p.variance[i + 8 * t] = variance;
    p.row_bias[i + 8 * t] = kLn2 * log2_approx(3.f - 2.f * gamma);
  }
#endif
}

template <int DP>
cudaError_t launch_order1_delta(const Order1Delta& params, const Device& device,
                                cudaStream_t stream) {
  Order1DeltaMaps p{params};
  const auto map = [&](CUtensorMap* to, const void* data, const Strides& strides) {
    return tensor_map(to, Dtype::bf16, data, strides, p.B, p.H, p.N, p.D, 64);
  };
  const bool maps = map(&p.q_map, p.q, p.q_strides) &&
                    map(&p.grad_out_map, p.grad_out, p.grad_out_strides) &&
                    map(&p.out_map, p.out, p.out_strides) &&
                    matrices_map(&p.moments_map, p.moments, p.B, p.Hk, matrix_dim<DP>(p.D));
  constexpr int kBytes = sizeof(Order1DeltaShared<DP>) + 1024;
  const int64_t blocks = static_cast<int64_t>(p.B) * p.H * p.chunks;
  if (!maps || kBytes > device.max_smem || blocks > INT_MAX) return cudaErrorNotSupported;
  p.tiles = chunk_tiles(p.N, p.chunks, 1);
  const auto kernel =
      DP == 64 && p.D <= 32 ? order1_delta_kernel<DP, DP == 64> : order1_delta_kernel<DP, false>;
  return launch_grid(kernel, blocks, Order1DeltaTraits<DP>::kThreads, kBytes, stream, p);
}

}  // namespace mra::cuda::sm90
