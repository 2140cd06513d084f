// The fine forward on Hopper for query blocks of 32: as forward.cuh, but two warps attend by
// mma.sync what a third one fetches for them, since a warpgroup's product would span two blocks
// with different keys.
#pragma once

#include <algorithm>

#include "../sm80/softmax.cuh"
#include "forward.h"
#include "keys.cuh"
#include "warp_products.cuh"

namespace mra::cuda::sm90 {

struct ForwardShortMaps : ForwardParams, KeyMaps {
  int items;  // query blocks in all
  CUtensorMap q_map, out_map;
};

// Measured choices (docs/kernels.md).
template <int DP>
struct ForwardShortTraits {
  static constexpr int kStages = 2, kBlocks = DP == 64 ? 5 : 2, kThreads = 96;
};

// What the consumers are told of a query block.
struct ForwardShortWork {
  int b, h, first_row, rows, pooled_tiles, tiles;
  float state_lse;
};

template <int DP>
struct ForwardShortShared {
  uint16_t q[2][DP / 64][32][64];  // also the output on its way to memory
  KeyRing<DP, ForwardShortTraits<DP>::kStages, 2> ring;
  alignas(16) float state_mean[2][DP];
  ForwardShortWork work[2];
  uint64_t q_full[2], q_empty[2];
  uint32_t bitmap[1];
};

template <int DP>
__device__ void fetch_ahead(const ForwardShortMaps& p, ForwardShortShared<DP>& s) {
  KeyProducer<DP, decltype(s.ring)> producer(p, p, s.ring, s.bitmap);
  const auto fetch_rows = [&](const RowTile<32>& at, int turn) {
    const int slot = turn % 2;
    if (turn >= 2) barrier_wait(&s.q_empty[slot], turn / 2 - 1 & 1);
    const bool state = p.state_mean != nullptr;
    if (producer.lane == 0) {
      s.work[slot] = {at.b,
                      at.h,
                      at.first_row,
                      at.rows,
                      at.pooled_tiles,
                      at.tiles,
                      state ? p.state_lse[at.list_at] : 0.f};
      barrier_expect(&s.q_full[slot], 32 * DP * 2 + (state ? p.D * 4 : 0));
      for (int i = 0; i < DP / 64; ++i) {
        copy_panel(s.q[slot][i], p.q_map, &s.q_full[slot], 64 * i, at.first_row, at.h, at.b);
      }
      if (state) {
        copy_bytes(s.state_mean[slot], p.state_mean + at.list_at * p.D, p.D * 4, &s.q_full[slot]);
      }
    }
    __syncwarp();
  };
  producer.template run_all<2>(p.items, fetch_rows, [] {});
}

template <typename T, int DP>
__global__ void __launch_bounds__(ForwardShortTraits<DP>::kThreads, ForwardShortTraits<DP>::kBlocks)
    forward_short_kernel(const __grid_constant__ ForwardShortMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kStages = ForwardShortTraits<DP>::kStages;
  extern __shared__ char raw[];
  auto& s = aligned<ForwardShortShared<DP>>(raw);
  auto& ring = s.ring;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&s.q_full[i], 1);
      barrier_init(&s.q_empty[i], 2);
    }
    ring.init();
    barrier_init_done();
  }
  __syncthreads();
  if (warp_index() == 2) {
    fetch_ahead<DP>(p, s);
    return;
  }

  const PanelLane lane;
  const int row = 16 * warp_index(), g = threadIdx.x % 32 / 4;
  const bool first_lane = threadIdx.x % 32 == 0;
  int at_tile = 0, turn = 0;  // tiles of keys so far; query blocks
#pragma unroll 1
  for (unsigned item = blockIdx.x; item < p.items; item += gridDim.x, ++turn) {
    const int slot = turn % 2;
    barrier_wait(&s.q_full[slot], turn / 2 & 1);
    const ForwardShortWork at = s.work[slot];
    typename Mma<T>::A q[DP / 16];
    load_rows<T>(q, s.q[slot], row, lane);
    OnlineSoftmax<T, DP> softmax;
    softmax.start(p.state_mean != nullptr ? s.state_mean[slot] : nullptr, &s.work[slot].state_lse,
                  p.D);
    // The place of the block before is given back once its output has left.
    if (turn > 0 && first_lane) {
      store_wait();
      barrier_arrive(&s.q_empty[slot ^ 1]);
    }
#pragma unroll 1
    for (int tile = 0; tile < at.tiles; ++tile, ++at_tile) {
      const int stage = at_tile % kStages, phase = at_tile / kStages & 1;
      float c[8][4] = {};
      barrier_wait(&ring.k_full[stage], phase);
      multiply_nt<T>(c, q, ring.k[stage], lane);
      float scale = p.scale * kLog2e;
      if (!ring.plain[stage]) {
        ring.to_logits(c, stage, scale, p.causal, at.first_row + row + g);
        scale = 1.f;
      }
      __syncwarp();
      if (first_lane) barrier_arrive(&ring.k_empty[stage]);
      softmax.update(c, scale);
      if (tile + 1 == at.pooled_tiles) softmax.keep_pooled();
      barrier_wait(&ring.v_full[stage], phase);
      multiply_pn<T>(softmax.acc, c, ring.v[stage], lane);
      __syncwarp();
      if (first_lane) barrier_arrive(&ring.v_empty[stage]);
    }
    float share[2];
    softmax.finish(p, at.b, at.h, at.first_row + row, at.rows - row, share);
    // Out through the place of the queries, which are in registers.
    place_rows<T>(s.q[slot], row, softmax.acc);
    fence_for_copies();
    __syncwarp();
    if (first_lane) {
      for (int i = 0; i < DP / 64; ++i) {
        store_panel(p.out_map, s.q[slot][i][row], 64 * i, at.first_row + row, at.h, at.b);
      }
      store_commit();
    }
  }
  if (first_lane) store_wait();
#endif
}

template <typename T, int DP>
cudaError_t launch_forward_short(const ForwardParams& params, const Device& device,
                                 cudaStream_t stream) {
  using Traits = ForwardShortTraits<DP>;
  if (params.list_rows != 32) return cudaErrorNotSupported;
  ForwardShortMaps p{params};
  constexpr Dtype dtype = kDtype<T>;
  const bool maps =
      tensor_map(&p.q_map, dtype, p.q, p.q_strides, p.B, p.H, p.rows, p.D, 32) &&
      tensor_map(&p.out_map, dtype, p.out, p.out_strides, p.B, p.H, p.rows, p.D, 16) &&
      p.set(p, dtype);
  const size_t bytes = sizeof(ForwardShortShared<DP>) + 1024 + bitmap_bytes(p);
  if (!maps || bytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
  const int64_t items = (p.rows + 31) / 32 * static_cast<int64_t>(p.B) * p.H;
  if (items > INT_MAX / 2) return cudaErrorInvalidConfiguration;
  p.items = static_cast<int>(items);
  const int blocks = std::min(p.items, Traits::kBlocks * device.sms);
  return launch(forward_short_kernel<T, DP>, p, blocks, Traits::kThreads / 32, bytes, stream);
}

}  // namespace mra::cuda::sm90
