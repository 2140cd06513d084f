// The fine forward on Hopper for query blocks of 32: as forward.cuh, but two warps attend by
// mma.sync what a third one fetches for them, since a warpgroup's product would span two blocks
// with different keys.
#pragma once

#include "../sm80/softmax.cuh"
#include "forward_tiles.cuh"
#include "warp_products.cuh"

namespace mra::cuda::sm90 {

// Measured choices (docs/kernels.md).
template <int DP>
struct ForwardShortTraits {
  static constexpr int kStages = 2, kBlocks = DP == 64 ? 5 : 2, kThreads = 96;
};

template <int DP>
using ForwardShortShared = ForwardTiles<DP, 2, ForwardShortTraits<DP>::kStages, 2>;

// Whether at most 32 pooled keys are half a tile: float16 would spill at 64 columns.
template <typename T, int kColumns>
inline constexpr bool kShortHalves = !std::is_same_v<T, __half> || kColumns != 64;

// kColumns: of the DP of a row, those that may be other than zeros.
template <typename T, int DP, int kColumns>
__global__ void __launch_bounds__(ForwardShortTraits<DP>::kThreads, ForwardShortTraits<DP>::kBlocks)
    forward_short_kernel(const __grid_constant__ ForwardMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kStages = ForwardShortTraits<DP>::kStages;
  extern __shared__ char raw[];
  auto& s = aligned<ForwardShortShared<DP>>(raw);
  auto& ring = s.ring;
  s.init();
  if (warp_index() == 2) {
    s.fetch_ahead(p);
    return;
  }

  const PanelLane lane;
  const int row = 16 * warp_index(), g = threadIdx.x % 32 / 4;
  const bool first_lane = threadIdx.x % 32 == 0;
  int at_tile = 0, turn = 0;  // places of the ring so far; query blocks
#pragma unroll 1
  for (;; ++turn) {
    const int slot = turn % 2;
    barrier_wait(&s.q_full[slot], turn / 2 & 1);
    const ForwardWork& at = s.work[slot];  // read again, as registers are full
    if (at.rows == 0) break;
    typename Mma<T>::A q[kColumns / 16];
    load_rows<T>(q, s.q[0][slot], row, lane);
    if constexpr (kOrder1<DP>) {
      if (p.centre != nullptr) {
        find_gamma<T, kColumns / 8, kColumns>(
            s.gamma[threadIdx.x], s.q[0][slot], s.centre(slot), row, ring, at_tile, p, at,
            [&](auto& x, int stage, int) {
              multiply_matrix<T>(x, q, ring.k[stage], ring.v[stage], lane);
            });
        ++at_tile;
      }
    }
    OnlineSoftmax<T, kColumns> softmax;
    softmax.start(p.state_mean != nullptr ? s.vectors[slot][0] : nullptr, &s.work[slot].state_lse,
                  p.D);
    // The place of the block before is given back once its output has left.
    if (turn > 0) {
      if (first_lane) store_wait();
      barrier_arrive(&s.q_empty[slot ^ 1]);
    }
    const int pooled_end = at_tile + at.pooled_tiles, end = at_tile + at.tiles;
    // c: zeros.
    const auto attend = [&](auto& c) {
      const int stage = at_tile % kStages, phase = at_tile / kStages & 1;
      barrier_wait(&ring.k_full[stage], phase);
      multiply_nt<T, kColumns / 16>(
          c, [&](int i) { return q[i]; }, ring.k[stage], lane);
      float scale = p.scale * kLog2e;
      if (!ring.plain[stage]) {
        ring.to_logits(c, stage, scale, p.causal, at.first_row + row + g);
        scale = 1.f;
      }
      barrier_arrive(&ring.k_empty[stage]);
      softmax.update(c, scale);
      if (at_tile + 1 == pooled_end) end_pooled<T, DP>(softmax, s.gamma[threadIdx.x], p, at, row);
      barrier_wait(&ring.v_full[stage], phase);
      multiply_pn<T>(softmax.acc, c, ring.v[stage], lane);
      barrier_arrive(&ring.v_empty[stage]);
      ++at_tile;
    };
    if (kShortHalves<T, kColumns> && at.few_pooled) {
      float c[4][4] = {};
      attend(c);
    }
#pragma unroll 1
    while (at_tile < end) {
      float c[8][4] = {};
      attend(c);
    }
    float share[2];
    // Read again, as registers are full in between.
    softmax.finish(p, at.b, at.h, at.first_row + row, s.work[slot].rows - row, share);
    if constexpr (kOrder1<DP>) {
      if (p.term != nullptr) add_term<T>(softmax.acc, share, p, at, row);
      if (p.moments != nullptr) {
        add_order1<T>(softmax.acc, share, s.q[0][slot], s.centre(slot), row, ring, at_tile, p, at,
                      s.gamma[threadIdx.x], [&](auto& x, const auto& first, const auto& second) {
                        multiply_matrix<T>(x, q, first, second, lane);
                      });
      }
    }
    // Out through the place of the queries, of which each warp has read its own.
    __syncwarp();
    place_rows<T>(s.q[0][slot], row, softmax.acc);
    fence_for_copies();
    __syncwarp();
    if (first_lane) {
      for (int i = 0; i < DP / 64; ++i) {
        store_panel(p.out_map, s.q[0][slot][i][row], 64 * i, at.first_row + row, at.h, at.b);
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
  if (params.list_rows != 32) return cudaErrorNotSupported;
  ForwardMaps p{params};
  const cudaError_t error = p.set_tiles<DP>(kDtype<T>, 32, 16);
  if (error != cudaSuccess) return error;
  const auto kernel = p.D <= 32   ? forward_short_kernel < T, DP,
             DP == 64 ? 32 : DP > : forward_short_kernel<T, DP, DP>;
  return launch_tiles<ForwardShortShared<DP>, ForwardShortTraits<DP>>(kernel, p, device, stream);
}

}  // namespace mra::cuda::sm90
