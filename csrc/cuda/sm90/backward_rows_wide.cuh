// Gradient of the rows (dQ) on Hopper for head dims up to 256: as backward_rows.cuh, but two
// warpgroups take the tiles of keys in turns, each from a place of its own. The one that has the
// last tile adds the other's sums to its own.
#pragma once

#include "backward_tiles.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

struct BackwardRowsWideTraits {
  static constexpr int kBlocks = 1, kThreads = 384;
};

template <int DP>
using BackwardRowsWideShared = BackwardRowsTiles<DP, 4, 2, 1, 2>;

// All that a thread has summed up, to a place of keys and one of values, and back: added.
template <int kPanels, int kTiles>
__device__ __forceinline__ void hand_sums(uint16_t (&k)[kPanels][64][64],
                                          uint16_t (&v)[kPanels][64][64],
                                          const float (&acc)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float4* to = reinterpret_cast<float4*>(n < kTiles / 2 ? &k : &v);
    to[n % (kTiles / 2) * 128 + threadIdx.x % 128] =
        make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]);
  }
}
template <int kPanels, int kTiles>
__device__ __forceinline__ void take_sums(float (&acc)[kTiles][4],
                                          const uint16_t (&k)[kPanels][64][64],
                                          const uint16_t (&v)[kPanels][64][64]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float4* from = reinterpret_cast<const float4*>(n < kTiles / 2 ? &k : &v);
    const float4 u = from[n % (kTiles / 2) * 128 + threadIdx.x % 128];
    acc[n][0] += u.x, acc[n][1] += u.y, acc[n][2] += u.z, acc[n][3] += u.w;
  }
}

template <typename T, int DP>
__global__ void __launch_bounds__(BackwardRowsWideTraits::kThreads, BackwardRowsWideTraits::kBlocks)
    backward_rows_wide_kernel(const __grid_constant__ BackwardRowsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = BackwardRowsWideShared<DP>;
  constexpr int kKeys = 64;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  auto& ring = s.ring;

  if (threadIdx.x == 0) s.init();
  __syncthreads();
  if (warp_index() >= 8) {
    give_registers<56>();
    if (warp_index() == 8) {
      s.fetch_ahead(p);
      let_next_start();
    }
    return;
  }

  take_registers<224>();
  // Its tiles of keys are those that come to place `group` of the ring.
  const int group = warp_index() / 4;
  const int warp_row = 16 * (warp_index() % 4), g = threadIdx.x % 32 / 4;
  int before = 0, turn = 0;  // tiles of keys before this tile of rows; tiles of rows
  int hands = 0;             // tiles of rows of which both had some
  bool owes = false;         // the place of the last values
  // Once the gradient of a tile before has left, the place that it took.
  const auto give_back = [&] {
    if (owes) arrive_behind_stores(&ring.v_empty[group]);
    owes = false;
  };
#pragma unroll 1
  for (;; ++turn) {
    barrier_wait(&s.rows_full[0], turn & 1);
    const BackwardRowsWork at = s.work[0];
    if (uniform(at.rows) == 0) break;
    const int tiles = uniform(at.tiles), first = (before ^ group) & 1;
    const bool takes = tiles == 0 ? group == 0 : (tiles - 1 & 1) == first, both = tiles > 1;
    float acc[DP / 8][4] = {};
    if (first >= tiles) {
      give_back();
      if (!takes) barrier_arrive(&s.rows_empty[0]);
    }
#pragma unroll 1
    for (int tile = first; tile < tiles; tile += 2) {
      const int phase = (before + tile) / 2 & 1;
      const bool last = tile + 2 >= tiles;
      float c[kKeys / 8][4], ds[kKeys / 8][4];
      uint32_t a[kKeys / 16][4];
      barrier_wait(&ring.k_full[group], phase);
      pin(c);
      wgmma_fence();
      multiply_nt<T>(c, s.q[0], ring.k[group]);
      wgmma_commit();
      if (tile == first) give_back();
      barrier_wait(&ring.v_full[group], phase);
      pin(ds);
      wgmma_fence();
      multiply_nt<T>(ds, s.grad_out[0], ring.v[group]);
      wgmma_commit();

      const auto& sums = tile < at.pooled_tiles ? s.pooled_sums[0] : s.sums[0];
      float lse[2], delta[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = warp_row + g + 8 * half;
        lse[half] = sums[r / 32][0][r % 32];
        delta[half] = sums[r / 32][1][r % 32];
      }
      wgmma_wait<1>();
      pin(c);
      float scale = p.scale * kLog2e;
      if (!ring.plain[group]) {
        ring.to_logits(c, group, scale, p.causal, at.first_row + warp_row + g);
        scale = 1.f;
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] = exp2_approx(fmaf(c[n][i], scale, -lse[i / 2]));
      }
      wgmma_wait<0>();
      pin(ds);
      // With its last scores the group gives back the place for rows; that of its last values is
      // kept, the way out for what it has summed up.
      barrier_arrive(last ? &s.rows_empty[0] : &ring.v_empty[group]);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ds[n][i] = (ds[n][i] - delta[i / 2]) * c[n][i];
      }
      pack<T>(a, ds);
      pin(acc);
      wgmma_fence();
      multiply_pn<T>(acc, a, ring.k[group]);
      wgmma_commit();
      wgmma_wait<0>();
      pin(acc);
      if (!last || takes) barrier_arrive(&ring.k_empty[group]);
    }
    before += tiles;
    const int hand = hands;
    hands += both;

    if (!takes) {
      if (both) {
        group_sync(group);
        hand_sums(ring.k[group], ring.v[group], acc);
        fence_for_copies();
        barrier_arrive(&s.handed);
      }
      continue;
    }
    if (both) {
      barrier_wait(&s.handed, hand & 1);
      take_sums(acc, ring.k[group ^ 1], ring.v[group ^ 1]);
      barrier_arrive(&ring.k_empty[group ^ 1]);
      barrier_arrive(&ring.v_empty[group ^ 1]);
    }

    const float scale[2] = {p.scale, p.scale};
    bool live[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp_row + g + 8 * half;
      live[half] = r < at.rows;
      if (live[half] && p.row_mask != nullptr) {
        live[half] = p.row_mask[static_cast<int64_t>(at.b) * p.rows + at.first_row + r];
      }
    }
    finish_rows(acc, scale, live, p.q_block == nullptr ? nullptr : s.q_block[turn % 2], 0, p.D);
    // Out through the place of the last values (of the queries), once every warp is done with them.
    owes = tiles > 0;
    auto& way_out = owes ? ring.v[group] : s.q[0];
    group_sync(group);
    place_rows<T>(way_out, acc);
    fence_for_copies();
    group_sync(group);
    if (threadIdx.x % 128 == 0) {
      for (int i = 0; i < DP / 64; ++i) {
        give_panel(p.add, p.grad_q_map, way_out[i], 64 * i, at.first_row, at.h, at.b);
      }
      store_commit();
    }
    if (!owes) arrive_behind_stores(&s.rows_empty[0]);
  }
  if (threadIdx.x % 128 == 0) store_wait();
#endif
}

template <typename T, int DP>
cudaError_t launch_backward_rows_wide(const BackwardParams& params, const Device& device,
                                      cudaStream_t stream) {
  if (params.list_rows % 64 != 0 || params.row_count != nullptr || params.sums == nullptr ||
      params.coarse_sum != nullptr) {
    return cudaErrorNotSupported;
  }
  BackwardRowsMaps p{params};
  const cudaError_t error = p.set_tiles(kDtype<T>, 64, 64);
  if (error != cudaSuccess) return error;
  return launch_tiles<BackwardRowsWideShared<DP>, BackwardRowsWideTraits>(
      backward_rows_wide_kernel<T, DP>, p, device, stream);
}

}  // namespace mra::cuda::sm90
