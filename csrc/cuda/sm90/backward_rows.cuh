// Gradient of the rows (dQ) on Hopper: what sm80/backward_rows.cuh computes, for half types and
// head dims up to 128. A block of threads takes 64 rows: one warp fetches, a warpgroup multiplies.
// The scores of a tile of keys are queued behind the gradient of the tile before, so that the
// tensor cores have work while blocks of threads take turns in the exponentials.
#pragma once

#include "backward.h"
#include "keys.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

struct BackwardRowsMaps : BackwardParams, KeyMaps {
  CUtensorMap q_map, grad_out_map, grad_q_map;
};

template <int DP>
struct BackwardRowsTraits {
  static constexpr int kStages = 2, kBlocks = 2, kThreads = 256;
};

template <int DP, int kLists>
struct BackwardRowsShared {
  using Traits = BackwardRowsTraits<DP>;
  uint16_t q[DP / 64][64][64], grad_out[DP / 64][64][64];
  KeyRing<DP, Traits::kStages, kLists> ring;
  uint64_t rows_full;
  int tiles;  // of keys
  uint32_t lists[1];
};

template <typename T, int DP, int kLists>
__global__ void __launch_bounds__(BackwardRowsTraits<DP>::kThreads, BackwardRowsTraits<DP>::kBlocks)
    backward_rows_kernel(const __grid_constant__ BackwardRowsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = BackwardRowsShared<DP, kLists>;
  constexpr int kKeys = 64, kStages = Shared::Traits::kStages;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  auto& ring = s.ring;

  if (threadIdx.x == 0) {
    barrier_init(&s.rows_full, 1);
    ring.init();
    barrier_init_done();
  }
  __syncthreads();
  if (warp_index() >= 4) {
    give_registers<56>();
    if (warp_index() > 4) return;
    KeyProducer<DP, decltype(s.ring)> producer(p, p, ring, s.lists);
    producer.run_all(
        gridDim.x,
        [&](const RowTile<kLists>& at, int) {
          if (producer.lane == 0) {
            s.tiles = at.tiles;
            barrier_expect(&s.rows_full, 2 * 64 * DP * 2);
            for (int i = 0; i < DP / 64; ++i) {
              copy_panel(s.q[i], p.q_map, &s.rows_full, 64 * i, at.first_row, at.h, at.b);
              copy_panel(s.grad_out[i], p.grad_out_map, &s.rows_full, 64 * i, at.first_row, at.h,
                         at.b);
            }
          }
          __syncwarp();
        },
        [] {});
    return;
  }

  take_registers<200>();
  const RowTile<kLists> at(p, blockIdx.x);
  const int warp_row = 16 * warp_index(), g = threadIdx.x % 32 / 4;
  const bool first_lane = threadIdx.x % 32 == 0;
  const int64_t head = static_cast<int64_t>(at.b) * p.H + at.h;
  float lse[2], delta[2], pooled_delta[2];
  bool live[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = warp_row + g + 8 * half;
    const int64_t i = head * p.rows + at.first_row + r;
    live[half] = r < at.rows;
    lse[half] = live[half] ? p.lse2[i] : INFINITY;
    delta[half] = live[half] ? p.delta[i] : 0.f;
    pooled_delta[half] = live[half] ? p.pooled_delta[i] : 0.f;
    if (live[half] && p.row_mask != nullptr) {
      live[half] = p.row_mask[static_cast<int64_t>(at.b) * p.rows + at.first_row + r];
    }
  }

  float acc[DP / 8][4] = {}, c[kKeys / 8][4], ds[kKeys / 8][4];
  uint32_t a[kKeys / 16][4];
  auto start_scores = [&](int tile) {
    const int stage = tile % kStages, phase = tile / kStages & 1;
    barrier_wait(&ring.k_full[stage], phase);
    barrier_wait(&ring.v_full[stage], phase);
    pin(c);
    pin(ds);
    wgmma_fence();
    multiply_nt<T, kKeys>(c, s.q, ring.k[stage]);
    multiply_nt<T, kKeys>(ds, s.grad_out, ring.v[stage]);
    wgmma_commit();
  };
  auto start_gradient = [&](int tile) {
    pin(acc);
    wgmma_fence();
    multiply_pn<T, kKeys>(acc, a, ring.k[tile % kStages]);
    wgmma_commit();
  };
  // Scores of a tile, complete -> their gradients.
  auto differentiate = [&](int tile) {
    const int stage = tile % kStages;
    const bool pooled = tile < at.pooled_tiles;
    pin(c);
    pin(ds);
    float scale = p.scale * kLog2e;
    const unsigned wanted = ring.wanted_here(stage);
    if (wanted != 0 && !ring.plain[stage]) {
      ring.to_logits(c, stage, scale, p.causal, at.first_row + warp_row + g);
      scale = 1.f;
    }
    __syncwarp();
    if (first_lane) barrier_arrive(&ring.v_empty[stage]);
    const float d[2] = {pooled ? pooled_delta[0] : delta[0], pooled ? pooled_delta[1] : delta[1]};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ds[n][i] = (ds[n][i] - d[i / 2]) * exp2_approx(fmaf(c[n][i], scale, -lse[i / 2]));
      }
    }
    pack<T>(a, ds);
    if constexpr (kLists > 1) {  // a branch around the lines above would serialise the products
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        const uint32_t mask = wanted >> j & 1 ? ~0u : 0u;
#pragma unroll
        for (int i = 0; i < 4; ++i) a[j][i] &= mask;
      }
    }
  };

  barrier_wait(&s.rows_full, 0);
  const int tiles = uniform(s.tiles);
  if (tiles > 0) {
    start_scores(0);
#pragma unroll 1
    for (int tile = 0; tile < tiles - 1; ++tile) {
      wgmma_wait<0>();
      differentiate(tile);
      start_gradient(tile);
      start_scores(tile + 1);
      wgmma_wait<1>();
      __syncwarp();
      if (first_lane) barrier_arrive(&ring.k_empty[tile % kStages]);
    }
    wgmma_wait<0>();
    differentiate(tiles - 1);
    start_gradient(tiles - 1);
    wgmma_wait<0>();
    pin(acc);
  }

  const float scale[2] = {p.scale, p.scale};
  finish_rows(acc, scale, live,
              p.q_block == nullptr ? nullptr : p.q_block + at.own_list_at(p) * p.D, 0, p.D);
  // Out through the place of the queries, once every warp is done with them.
  group_sync();
  place_rows<T>(s.q, acc);
  fence_for_copies();
  group_sync();
  if (threadIdx.x == 0) {
    for (int i = 0; i < DP / 64; ++i) {
      give_panel(p.add, p.grad_q_map, s.q[i], 64 * i, at.first_row, at.h, at.b);
    }
    store_commit();
    store_wait();
  }
#endif
}

template <typename T, int DP, int kLists>
cudaError_t launch_backward_rows_lists(const BackwardRowsMaps& p, const Device& device,
                                       cudaStream_t stream) {
  const size_t bytes = sizeof(BackwardRowsShared<DP, kLists>) + 1024 + list_bytes(p, kLists);
  if (bytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
  const int64_t blocks = (p.rows + 63) / 64 * static_cast<int64_t>(p.B) * p.H;
  const auto kernel = backward_rows_kernel<T, DP, kLists>;
  return launch(kernel, p, blocks, BackwardRowsTraits<DP>::kThreads / 32, bytes, stream);
}

template <typename T, int DP>
cudaError_t launch_backward_rows(const BackwardParams& params, const Device& device,
                                 cudaStream_t stream) {
  const int lists = lists_of_tile(params);
  if (lists == 0 || params.row_count != nullptr) return cudaErrorNotSupported;
  BackwardRowsMaps p{params};
  constexpr Dtype dtype = kDtype<T>;
  const bool maps =
      tensor_map(&p.q_map, dtype, p.q, p.q_strides, p.B, p.H, p.rows, p.D, 64) &&
      tensor_map(&p.grad_out_map, dtype, p.grad_out, p.grad_out_strides, p.B, p.H, p.rows, p.D,
                 64) &&
      tensor_map(&p.grad_q_map, dtype, p.grad_q, p.grad_q_strides, p.B, p.H, p.rows, p.D, 64) &&
      p.set(p, dtype);
  if (!maps) return cudaErrorNotSupported;
  return lists == 1 ? launch_backward_rows_lists<T, DP, 1>(p, device, stream)
                    : launch_backward_rows_lists<T, DP, 2>(p, device, stream);
}

}  // namespace mra::cuda::sm90
