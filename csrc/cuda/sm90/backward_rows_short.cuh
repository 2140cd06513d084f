// Gradient of the rows (dQ) on Hopper for query blocks of 32: as backward_rows.cuh, but two warps
// multiply by mma.sync what a third one fetches for them.
#pragma once

#include "backward_tiles.cuh"
#include "warp_products.cuh"

namespace mra::cuda::sm90 {

// Measured choices (docs/kernels.md).
template <int DP>
struct BackwardRowsShortTraits {
  static constexpr int kStages = 2, kBlocks = DP == 64 ? 4 : 2, kThreads = 96;
};

template <int DP>
using BackwardRowsShortShared = BackwardRowsTiles<DP, 2, BackwardRowsShortTraits<DP>::kStages, 2>;

// kColumns: of the DP of a row, those that may be other than zeros.
template <typename T, int DP, int kColumns>
__global__ void __launch_bounds__(BackwardRowsShortTraits<DP>::kThreads,
                                  BackwardRowsShortTraits<DP>::kBlocks)
    backward_rows_short_kernel(const __grid_constant__ BackwardRowsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kStages = BackwardRowsShortTraits<DP>::kStages;
  extern __shared__ char raw[];
  auto& s = aligned<BackwardRowsShortShared<DP>>(raw);
  auto& ring = s.ring;
  if (threadIdx.x == 0) s.init();
  __syncthreads();
  if (warp_index() == 2) {
    s.fetch_ahead(p);
    let_next_start();
    return;
  }

  const PanelLane lane;
  const int row = 16 * warp_index(), g = threadIdx.x % 32 / 4;
  const bool first_lane = threadIdx.x % 32 == 0;
  int at_tile = 0, turn = 0;  // tiles of keys so far; query blocks
#pragma unroll 1
  for (;; ++turn) {
    const int slot = turn % 2;
    barrier_wait(&s.rows_full[slot], turn / 2 & 1);
    const BackwardRowsWork at = s.work[slot];
    if (at.rows == 0) break;
    float lse[2] = {}, delta[2] = {};  // of pooled keys, then of the others
    bool live[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + g + 8 * half;
      live[half] = r < at.rows;
      if (live[half] && p.row_mask != nullptr) {
        live[half] = p.row_mask[static_cast<int64_t>(at.b) * p.rows + at.first_row + r];
      }
    }
    // The place of the block before is given back once its gradient has left.
    if (turn > 0) {
      if (first_lane) store_wait();
      barrier_arrive(&s.rows_empty[slot ^ 1]);
    }
    float acc[kColumns / 8][4] = {};
    // c, ds: zeros.
    const auto differentiate = [&](int tile, auto& c, auto& ds) {
      const int stage = at_tile % kStages, phase = at_tile / kStages & 1;
      const bool pooled = tile < at.pooled_tiles;
      if (tile == 0 || tile == at.pooled_tiles) {
        const auto& sums = pooled ? s.pooled_sums[slot][0] : s.sums[slot][0];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          lse[half] = sums[0][row + g + 8 * half];
          delta[half] = sums[1][row + g + 8 * half];
        }
      }
      barrier_wait(&ring.k_full[stage], phase);
      multiply_nt<T, kColumns / 16>(c, s.q[slot], row, ring.k[stage], lane);
      float scale = p.scale * kLog2e;
      if (!ring.plain[stage]) {
        ring.to_logits(c, stage, scale, p.causal, at.first_row + row + g);
        scale = 1.f;
      }
      barrier_wait(&ring.v_full[stage], phase);
      multiply_nt<T, kColumns / 16>(ds, s.grad_out[slot], row, ring.v[stage], lane);
      barrier_arrive(&ring.v_empty[stage]);
      times_weights(ds, c, scale, lse, delta);
      if (pooled && p.coarse_sum != nullptr) s.add_coarse_sums(p, at, row, tile, ds);
      multiply_pn<T>(acc, ds, ring.k[stage], lane);
      barrier_arrive(&ring.k_empty[stage]);
      ++at_tile;
    };
    if (at.few_pooled) {
      float c[4][4] = {}, ds[4][4] = {};
      differentiate(0, c, ds);
    }
#pragma unroll 1
    for (int tile = at.few_pooled; tile < at.tiles; ++tile) {
      float c[8][4] = {}, ds[8][4] = {};
      differentiate(tile, c, ds);
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
  if (params.list_rows != 32 || params.row_count != nullptr || params.sums == nullptr) {
    return cudaErrorNotSupported;
  }
  BackwardRowsMaps p{params};
  const cudaError_t error = p.set_tiles(kDtype<T>, 32, 16);
  if (error != cudaSuccess) return error;
  const auto kernel = p.D <= 32   ? backward_rows_short_kernel < T, DP,
             DP == 64 ? 32 : DP > : backward_rows_short_kernel<T, DP, DP>;
  return launch_tiles<BackwardRowsShortShared<DP>, BackwardRowsShortTraits<DP>>(kernel, p, device,
                                                                                stream);
}

}  // namespace mra::cuda::sm90
