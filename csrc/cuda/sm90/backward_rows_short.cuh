// Gradient of the rows (dQ) on Hopper for query blocks of 32: as backward_rows.cuh, but two warps
// multiply by mma.sync what a third one fetches for them.
#pragma once

#include <algorithm>

#include "backward.h"
#include "keys.cuh"
#include "warp_products.cuh"

namespace mra::cuda::sm90 {

struct BackwardRowsShortMaps : BackwardParams, KeyMaps {
  int items;  // query blocks in all
  CUtensorMap q_map, grad_out_map, grad_q_map;
};

// Measured choices (docs/kernels.md).
template <int DP>
struct BackwardRowsShortTraits {
  static constexpr int kStages = 2, kBlocks = DP == 64 ? 4 : 2, kThreads = 96;
};

// What the consumers are told of a query block.
struct BackwardRowsShortWork {
  int b, h, first_row, rows, pooled_tiles, tiles;
};

template <int DP>
struct BackwardRowsShortShared {
  uint16_t q[2][DP / 64][32][64], grad_out[2][DP / 64][32][64];
  KeyRing<DP, BackwardRowsShortTraits<DP>::kStages, 2> ring;
  // Of the rows lse (log2 units) and delta; for pooled keys.
  alignas(16) float sums[2][2][32], pooled_sums[2][2][32];
  alignas(16) float q_block[2][DP];
  BackwardRowsShortWork work[2];
  uint64_t full[2], empty[2];
  uint32_t bitmap[1];
};

template <int DP>
__device__ void fetch_ahead(const BackwardRowsShortMaps& p, BackwardRowsShortShared<DP>& s) {
  KeyProducer<DP, decltype(s.ring)> producer(p, p, s.ring, s.bitmap);
  const auto fetch_rows = [&](const RowTile<32>& at, int turn) {
    const int slot = turn % 2;
    uint64_t* full = &s.full[slot];
    if (turn >= 2) barrier_wait(&s.empty[slot], turn / 2 - 1 & 1);
    if (producer.lane == 0) {
      s.work[slot] = {at.b, at.h, at.first_row, at.rows, at.pooled_tiles, at.tiles};
      constexpr int kSums = sizeof(s.sums[0]);
      const bool pooled = p.pooled_k != nullptr, block = p.q_block != nullptr;
      barrier_expect(full, 2 * 32 * DP * 2 + (pooled ? 2 : 1) * kSums + (block ? p.D * 4 : 0));
      for (int i = 0; i < DP / 64; ++i) {
        copy_panel(s.q[slot][i], p.q_map, full, 64 * i, at.first_row, at.h, at.b);
        copy_panel(s.grad_out[slot][i], p.grad_out_map, full, 64 * i, at.first_row, at.h, at.b);
      }
      const int64_t sums = (at.head * sum_chunks(p.rows) + at.first_row / 32) * 64;
      copy_bytes(s.sums[slot], p.sums + sums, kSums, full);
      if (pooled) copy_bytes(s.pooled_sums[slot], p.pooled_sums + sums, kSums, full);
      if (block) copy_bytes(s.q_block[slot], p.q_block + at.list_at * p.D, p.D * 4, full);
    }
    __syncwarp();
  };
  producer.template run_all<2>(p.items, fetch_rows, [] {});
}

template <typename T, int DP>
__global__ void __launch_bounds__(BackwardRowsShortTraits<DP>::kThreads,
                                  BackwardRowsShortTraits<DP>::kBlocks)
    backward_rows_short_kernel(const __grid_constant__ BackwardRowsShortMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kStages = BackwardRowsShortTraits<DP>::kStages;
  extern __shared__ char raw[];
  auto& s = aligned<BackwardRowsShortShared<DP>>(raw);
  auto& ring = s.ring;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], 2);
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
    barrier_wait(&s.full[slot], turn / 2 & 1);
    const BackwardRowsShortWork at = s.work[slot];
    float lse[2], delta[2], pooled_delta[2];
    bool live[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + g + 8 * half;
      lse[half] = s.sums[slot][0][r];
      delta[half] = s.sums[slot][1][r];
      pooled_delta[half] = at.pooled_tiles > 0 ? s.pooled_sums[slot][1][r] : 0.f;
      live[half] = r < at.rows;
      if (live[half] && p.row_mask != nullptr) {
        live[half] = p.row_mask[static_cast<int64_t>(at.b) * p.rows + at.first_row + r];
      }
    }
    // The place of the block before is given back once its gradient has left.
    if (turn > 0 && first_lane) {
      store_wait();
      barrier_arrive(&s.empty[slot ^ 1]);
    }
    float acc[DP / 8][4] = {};
#pragma unroll 1
    for (int tile = 0; tile < at.tiles; ++tile, ++at_tile) {
      const int stage = at_tile % kStages, phase = at_tile / kStages & 1;
      const bool pooled = tile < at.pooled_tiles;
      float c[8][4] = {}, ds[8][4] = {};
      barrier_wait(&ring.k_full[stage], phase);
      multiply_nt<T>(c, s.q[slot], row, ring.k[stage], lane);
      float scale = p.scale * kLog2e;
      if (!ring.plain[stage]) {
        ring.to_logits(c, stage, scale, p.causal, at.first_row + row + g);
        scale = 1.f;
      }
      barrier_wait(&ring.v_full[stage], phase);
      multiply_nt<T>(ds, s.grad_out[slot], row, ring.v[stage], lane);
      __syncwarp();
      if (first_lane) barrier_arrive(&ring.v_empty[stage]);
      const float d[2] = {pooled ? pooled_delta[0] : delta[0], pooled ? pooled_delta[1] : delta[1]};
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ds[n][i] = (ds[n][i] - d[i / 2]) * exp2_approx(fmaf(c[n][i], scale, -lse[i / 2]));
        }
      }
      multiply_pn<T>(acc, ds, ring.k[stage], lane);
      __syncwarp();
      if (first_lane) barrier_arrive(&ring.k_empty[stage]);
    }

    const float scale[2] = {p.scale, p.scale};
    finish_rows(acc, scale, live, p.q_block == nullptr ? nullptr : s.q_block[slot], 0, p.D);
    // Out through the place of the queries, of which each warp has read its own.
    __syncwarp();
    place_rows<T>(s.q[slot], row, acc);
    fence_for_copies();
    __syncwarp();
    if (first_lane) {
      for (int i = 0; i < DP / 64; ++i) {
        give_panel(p.add, p.grad_q_map, s.q[slot][i][row], 64 * i, at.first_row + row, at.h, at.b);
      }
      store_commit();
    }
  }
  if (first_lane) store_wait();
#endif
}

template <typename T, int DP>
cudaError_t launch_backward_rows_short(const BackwardParams& params, const Device& device,
                                       cudaStream_t stream) {
  using Traits = BackwardRowsShortTraits<DP>;
  if (params.list_rows != 32 || params.row_count != nullptr || params.sums == nullptr) {
    return cudaErrorNotSupported;
  }
  BackwardRowsShortMaps p{params};
  constexpr Dtype dtype = kDtype<T>;
  const bool maps =
      tensor_map(&p.q_map, dtype, p.q, p.q_strides, p.B, p.H, p.rows, p.D, 32) &&
      tensor_map(&p.grad_out_map, dtype, p.grad_out, p.grad_out_strides, p.B, p.H, p.rows, p.D,
                 32) &&
      tensor_map(&p.grad_q_map, dtype, p.grad_q, p.grad_q_strides, p.B, p.H, p.rows, p.D, 16) &&
      p.set(p, dtype);
  const size_t bytes = sizeof(BackwardRowsShortShared<DP>) + 1024 + bitmap_bytes(p);
  if (!maps || bytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
  const int64_t items = (p.rows + 31) / 32 * static_cast<int64_t>(p.B) * p.H;
  if (items > INT_MAX / 2) return cudaErrorInvalidConfiguration;
  p.items = static_cast<int>(items);
  const int blocks = std::min(p.items, Traits::kBlocks * device.sms);
  return launch(backward_rows_short_kernel<T, DP>, p, blocks, Traits::kThreads / 32, bytes, stream);
}

}  // namespace mra::cuda::sm90
