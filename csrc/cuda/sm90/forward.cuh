// The fine forward on Hopper: what sm80/forward.cuh computes, for half types and head dims up to
// 128. Persistent blocks of threads take tiles of 64 rows in turns: one warp fetches queries and
// keys ahead by bulk tensor copies, a warpgroup attends by wgmma with the softmax in registers.
#pragma once

#include <algorithm>

#include "../sm80/softmax.cuh"
#include "forward.h"
#include "keys.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

// The 128 threads that attend.
__device__ __forceinline__ void group_sync() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

template <typename T, int DP>
__global__ void __launch_bounds__(ForwardTraits<DP>::kThreads, ForwardTraits<DP>::kBlocks)
    forward_kernel(const __grid_constant__ ForwardMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = ForwardShared<DP>;
  constexpr int kKeys = Shared::kKeys, kStages = Shared::kStages, kPanels = Shared::kPanels;
  extern __shared__ char raw[];
  Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + 1023) / 1024 * 1024);

  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&s.q_full[i], 1);
      barrier_init(&s.q_empty[i], 1);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&s.k_full[i], 1);
      barrier_init(&s.v_full[i], 1);
      barrier_init(&s.k_empty[i], 4);
      barrier_init(&s.v_empty[i], 4);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (warp_index() == 4) {
    ForwardProducer<DP>(p, s).run_all();
    return;
  }

  const int warp_row = 16 * warp_index(), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int before = 0, turn = 0;  // tiles of keys before this tile of rows; tiles of rows
#pragma unroll 1
  for (unsigned item = blockIdx.x; item < p.items; item += gridDim.x, ++turn) {
    const int slot = turn % 2;
    barrier_wait(&s.q_full[slot], turn / 2 & 1);
    const ForwardWork at = s.work[slot];
    OnlineSoftmax<T, DP> softmax;
    softmax.start(p.state_mean != nullptr ? s.state_mean[slot] : nullptr, &s.work[slot].state_lse,
                  p.D);
    const bool first_lane = threadIdx.x % 32 == 0;
    float c[kKeys / 8][4];
    uint32_t weights[kKeys / 16][4];
    auto start_scores = [&](int tile) {
      const int stage = (before + tile) % kStages;
      barrier_wait(&s.k_full[stage], (before + tile) / kStages & 1);
      pin(c);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < DP / 16; ++i) {
        Wgmma<T, kKeys>::multiply_nt(c, descriptor(s.q[slot][i / 4]) + 2 * (i % 4),
                                     descriptor(s.k[stage][i / 4]) + 2 * (i % 4), i > 0);
      }
      wgmma_commit();
    };
    auto start_values = [&](int tile) {
      const int stage = (before + tile) % kStages;
      barrier_wait(&s.v_full[stage], (before + tile) / kStages & 1);
      pin(softmax.acc);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        Wgmma<T, DP>::multiply_pn(softmax.acc, weights[j],
                                  descriptor(s.v[stage], kKeys * 128) + 128 * j);
      }
      wgmma_commit();
    };
    // Scores of a tile, complete -> weights; as OnlineSoftmax::weigh.
    auto weigh = [&](int tile, float(&factor)[2]) {
      const int stage = (before + tile) % kStages;
      float scale = p.scale * kLog2e;
      if (!s.plain[stage]) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          const float2 u = *reinterpret_cast<const float2*>(&s.bias[stage][8 * n + 2 * t]);
#pragma unroll
          for (int i = 0; i < 4; ++i) c[n][i] = fmaf(c[n][i], scale, i % 2 ? u.y : u.x);
          if (p.causal) {
            const int key = s.first[stage][n / 2] + n % 2 * 8 + 2 * t,
                      i = at.first_row + warp_row + g;
            if (key > i) c[n][0] = -INFINITY;
            if (key + 1 > i) c[n][1] = -INFINITY;
            if (key > i + 8) c[n][2] = -INFINITY;
            if (key + 1 > i + 8) c[n][3] = -INFINITY;
          }
        }
        scale = 1.f;
      }
      __syncwarp();
      if (first_lane) barrier_arrive(&s.k_empty[stage]);
      const bool grown = softmax.weigh(c, scale, factor);
      if (tile + 1 == at.pooled_tiles) softmax.keep_pooled();
      return grown;
    };
    auto pack = [&] {
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights[j][i] =
              Mma<T>::pack(c[2 * j + i / 2][i % 2 * 2], c[2 * j + i / 2][i % 2 * 2 + 1]);
        }
      }
    };
    // The place of the tile before is given back once its output has left.
    auto give_back = [&] {
      if (turn == 0 || threadIdx.x != 0) return;
      store_wait();
      barrier_arrive(&s.q_empty[slot ^ 1]);
    };
    if (at.tiles == 0) give_back();
    if (at.tiles > 0) {
      float factor[2];
      start_scores(0);
      give_back();
      wgmma_wait<0>();
      pin(c);
      if (weigh(0, factor)) softmax.rescale(factor);
      pack();
      // The softmax of a tile runs beside the values of the one before.
#pragma unroll 1
      for (int tile = 1; tile < at.tiles; ++tile) {
        start_scores(tile);
        start_values(tile - 1);
        wgmma_wait<1>();
        pin(c);
        const bool grown = weigh(tile, factor);
        wgmma_wait<0>();
        pin(softmax.acc);
        __syncwarp();
        if (first_lane) barrier_arrive(&s.v_empty[(before + tile - 1) % kStages]);
        if (grown) softmax.rescale(factor);
        pack();
      }
      start_values(at.tiles - 1);
      wgmma_wait<0>();
      pin(softmax.acc);
      __syncwarp();
      if (first_lane) barrier_arrive(&s.v_empty[(before + at.tiles - 1) % kStages]);
      before += at.tiles;
    }
    softmax.finish(p, at.b, at.h, at.first_row + warp_row, at.rows - warp_row);

    // Out through the place of the queries, once every warp is done with them.
    group_sync();
#pragma unroll
    for (int n = 0; n < DP / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = warp_row + g + 8 * half;
        uint16_t* to = &s.q[slot][n / 8][r][(n % 8 ^ g) * 8 + 2 * t];
        *reinterpret_cast<uint32_t*>(to) =
            Mma<T>::pack(softmax.acc[n][2 * half], softmax.acc[n][2 * half + 1]);
      }
    }
    fence_for_copies();
    group_sync();
    if (threadIdx.x == 0) {
      for (int i = 0; i < kPanels; ++i) {
        store_panel(p.out_map, s.q[slot][i], 64 * i, at.first_row, at.h, at.b);
      }
      store_commit();
    }
  }
  if (threadIdx.x == 0) store_wait();
#endif
}

// cudaErrorNotSupported: not a case for this kernel.
template <typename T, int DP>
cudaError_t launch_forward(const ForwardParams& params, const Device& device, cudaStream_t stream) {
  using Traits = ForwardTraits<DP>;
  if (params.list_rows % Traits::kRows != 0) return cudaErrorNotSupported;
  ForwardMaps p{params};
  constexpr Dtype dtype = std::is_same_v<T, __half> ? Dtype::f16 : Dtype::bf16;
  const int run = p.block_k < 64 ? p.block_k : 64;
  bool maps = tensor_map(&p.q_map, dtype, p.q, p.q_strides, p.B, p.H, p.rows, p.D, 64) &&
              tensor_map(&p.out_map, dtype, p.out, p.out_strides, p.B, p.H, p.rows, p.D, 64) &&
              tensor_map(&p.k_map, dtype, p.k, p.k_strides, p.B, p.Hk, p.M, p.D, run) &&
              tensor_map(&p.v_map, dtype, p.v, p.v_strides, p.B, p.Hk, p.M, p.D, run);
  if (maps && p.pooled_k != nullptr) {
    const int64_t head = static_cast<int64_t>(p.nk) * p.D;
    const Strides strides{p.Hk * head, head, p.D};
    maps = tensor_map(&p.pooled_k_map, dtype, p.pooled_k, strides, p.B, p.Hk, p.nk, p.D, 64) &&
           tensor_map(&p.pooled_v_map, dtype, p.pooled_v, strides, p.B, p.Hk, p.nk, p.D, 64);
  }
  if (!maps) return cudaErrorNotSupported;
  const int64_t items =
      (p.rows + Traits::kRows - 1) / Traits::kRows * static_cast<int64_t>(p.B) * p.H;
  if (items == 0) return cudaSuccess;
  if (items > INT_MAX / 2) return cudaErrorInvalidConfiguration;
  p.items = static_cast<int>(items);
  const size_t bytes =
      sizeof(ForwardShared<DP>) + 1024 + (p.pooled_k != nullptr ? (p.nk + 31) / 32 * 4 : 0);
  if (bytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
  const auto kernel = forward_kernel<T, DP>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const int resident = Traits::kBlocks * device.sms;
  const int blocks = Traits::kPersistent ? std::min(p.items, resident) : p.items;
  kernel<<<blocks, Traits::kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace mra::cuda::sm90
