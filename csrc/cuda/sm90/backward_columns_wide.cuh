// Gradients of the keys and values on Hopper for head dims up to 256: as backward_columns.cuh, but
// one warpgroup holds the sums of the values, another those of the keys.
#pragma once

#include "backward_columns.cuh"

namespace mra::cuda::sm90 {

// Run by one warpgroup: the first kValues, the second not.
template <typename T, int DP, bool kValues>
__device__ __forceinline__ void attend_columns(const BackwardColumnsMaps& p,
                                               BackwardColumnsShared<DP>& s) {
  using Shared = BackwardColumnsShared<DP>;
  static_assert(Shared::kEarly && Shared::kPlaces == 1);
  const int key = 16 * (warp_index() % 4) + threadIdx.x % 32 / 4;
  int before = 0, turn = 0;  // tiles of rows before this tile of keys; tiles of keys
  bool owes = false;         // the place of the last rows
#pragma unroll 1
  for (;; ++turn) {
    float acc[DP / 8][4] = {};
    barrier_wait(&s.keys_full[0], turn & 1);
    const KeyTile& at = s.tile[turn % 2];
    const int tiles = uniform(at.tiles);
    if (tiles < 0) break;
    // Once the gradients of the tile before have left, the place that they took.
    if (owes) arrive_behind_stores(&s.empty[(before - 1) % Shared::kStages]);
    const float none[2] = {};
    attend_rows_wide<T, DP, false, kValues>(acc, s, 0, before, tiles, p.scale, p.causal,
                                            at.first_key, none);
    before += tiles;

    bool live[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = at.first_key + key + 8 * half;
      live[half] = j < p.M &&
                   (p.key_mask == nullptr || p.key_mask[static_cast<int64_t>(at.b) * p.M + j] != 0);
    }
    const float factor = kValues ? 1.f : p.scale, factors[2] = {factor, factor};
    finish_rows(acc, factors, live, p.k_block != nullptr ? s.blocks[turn % 2][kValues] : nullptr, 0,
                p.D);
    // Out through the place of the last rows (of the keys and values), once all are done with them.
    owes = tiles > 0;
    const int stage = (before - 1) % Shared::kStages;
    auto& keys = kValues ? s.v[0] : s.k[0];
    auto& way_out = owes ? kValues ? s.grad_out[stage] : s.q[stage] : keys;
    groups_sync();
    place_rows<T>(way_out, acc);
    fence_for_copies();
    group_sync(kValues ? 0 : 1);
    if (threadIdx.x % 128 == 0) {
      for (int i = 0; i < DP / 64; ++i) {
        give_panel(p.add, kValues ? p.grad_v_map : p.grad_k_map, way_out[i], 64 * i, at.first_key,
                   at.hk, at.b);
      }
      store_commit();
    }
    if (!owes) arrive_behind_stores(&s.keys_empty[0]);
  }
  if (threadIdx.x % 128 == 0) store_wait();
}

struct BackwardColumnsWideTraits {
  static constexpr int kThreads = 384, kBlocks = 1;
};

template <typename T, int DP>
__global__ void __launch_bounds__(BackwardColumnsWideTraits::kThreads,
                                  BackwardColumnsWideTraits::kBlocks)
    backward_columns_wide_kernel(const __grid_constant__ BackwardColumnsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char raw[];
  auto& s = aligned<BackwardColumnsShared<DP>>(raw);
  if (threadIdx.x == 0) {
    s.init();
    barrier_init_done();
  }
  __syncthreads();
  if (warp_index() >= 8) {
    give_registers<56>();
    if (warp_index() == 8) fetch_ahead<1>(p, s, 0);
    return;
  }
  take_registers<224>();
  if (warp_index() < 4) {
    attend_columns<T, DP, true>(p, s);
  } else {
    attend_columns<T, DP, false>(p, s);
  }
  if (blockIdx.x == 0) wait_for_previous();
#endif
}

template <typename T, int DP>
cudaError_t launch_backward_columns_wide(const BackwardParams& params, const Device& device,
                                         cudaStream_t stream) {
  BackwardColumnsMaps p{params};
  const cudaError_t error = p.set(kDtype<T>);
  if (error != cudaSuccess) return error;
  return launch_teams<BackwardColumnsShared<DP>, BackwardColumnsWideTraits>(
      backward_columns_wide_kernel<T, DP>, p, device, stream, Together{p.beside});
}

}  // namespace mra::cuda::sm90
