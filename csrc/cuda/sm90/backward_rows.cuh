// Gradient of the rows (dQ) on Hopper: what sm80/backward_rows.cuh computes, for half types and
// head dims up to 128. Persistent blocks of threads take tiles of 64 rows in turns: one warp
// fetches ahead, a warpgroup multiplies. The scores of a tile of keys are queued behind the
// gradient of the tile before, so that the tensor cores have work while blocks of threads take
// turns in the exponentials.
#pragma once

#include "backward_tiles.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

// Measured choices (docs/kernels.md): places for rows and for keys, blocks of threads a
// multiprocessor, warpgroups of each that attend tiles of rows of their own, and the registers of
// their threads and of those that fetch.
template <int DP>
struct BackwardRowsTraits {
  static constexpr int kPlaces = DP == 64 ? 2 : 1, kStages = 2;
  static constexpr int kBlocks = DP == 64 ? 1 : 2, kTeams = DP == 64 ? 3 : 1;
  static constexpr int kThreads = 128 * (kTeams + 1);
  static constexpr int kTaken = DP == 64 ? 144 : 192, kGiven = DP == 64 ? 80 : 64;
};

template <int DP>
using BackwardRowsShared =
    BackwardRowsTiles<DP, 4, BackwardRowsTraits<DP>::kStages, BackwardRowsTraits<DP>::kPlaces>;

template <typename T, int DP>
__global__ void __launch_bounds__(BackwardRowsTraits<DP>::kThreads, BackwardRowsTraits<DP>::kBlocks)
    backward_rows_kernel(const __grid_constant__ BackwardRowsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = BackwardRowsShared<DP>;
  constexpr int kKeys = 64, kStages = BackwardRowsTraits<DP>::kStages,
                kPlaces = BackwardRowsTraits<DP>::kPlaces, kTeams = BackwardRowsTraits<DP>::kTeams;
  extern __shared__ char raw[];
  const Team<kTeams> team;
  Shared& s = aligned<Shared>(raw + team.index * team_pitch<Shared>(bitmap_bytes(p)));
  auto& ring = s.ring;

  // The only place for rows is given back with the last scores; their gradient then leaves through
  // the place of the last values.
  constexpr bool kEarly = kPlaces == 1;
  if (team.first_thread()) s.init();
  __syncthreads();
  if (!team.attends()) {
    give_registers<BackwardRowsTraits<DP>::kGiven>();
    if (team.fetches()) {
      s.template fetch_ahead<kTeams>(p, team.index);
      let_next_start();
    }
    return;
  }

  take_registers<BackwardRowsTraits<DP>::kTaken>();
  const int warp_row = 16 * (warp_index() % 4), g = threadIdx.x % 32 / 4;
  int before = 0, turn = 0;  // tiles of keys before this tile of rows; tiles of rows
  bool owes = false;         // the place of the last values
#pragma unroll 1
  for (;; ++turn) {
    const int place = turn % kPlaces;
    barrier_wait(&s.rows_full[place], turn / kPlaces & 1);
    const BackwardRowsWork at = s.work[place];
    if (uniform(at.rows) == 0) break;
    const int tiles = uniform(at.tiles);
    float lse[2] = {}, delta[2] = {};  // of pooled keys, then of the others
    float acc[DP / 8][4] = {}, c[kKeys / 8][4], ds[kKeys / 8][4];
    uint32_t a[kKeys / 16][4];
    auto start_scores = [&](int tile, auto& c, auto& ds) {
      const int stage = (before + tile) % kStages, phase = (before + tile) / kStages & 1;
      barrier_wait(&ring.k_full[stage], phase);
      barrier_wait(&ring.v_full[stage], phase);
      pin(c);
      pin(ds);
      wgmma_fence();
      multiply_nt<T>(c, s.q[place], ring.k[stage]);
      multiply_nt<T>(ds, s.grad_out[place], ring.v[stage]);
      wgmma_commit();
    };
    auto start_gradient = [&](int tile, const auto& a) {
      pin(acc);
      wgmma_fence();
      multiply_pn<T>(acc, a, ring.k[(before + tile) % kStages]);
      wgmma_commit();
    };
    // Scores of a tile, complete -> their gradients, as the left operand of the next product.
    auto differentiate = [&](int tile, bool last, auto& c, auto& ds, auto& a) {
      const int stage = (before + tile) % kStages;
      const bool pooled = tile < at.pooled_tiles;
      pin(c);
      pin(ds);
      if (tile == 0 || tile == at.pooled_tiles) {
        const auto& sums = pooled ? s.pooled_sums[place] : s.sums[place];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = warp_row + g + 8 * half;
          lse[half] = sums[r / 32][0][r % 32];
          delta[half] = sums[r / 32][1][r % 32];
        }
      }
      float scale = p.scale * kLog2e;
      if (!ring.plain[stage]) {
        ring.to_logits(c, stage, scale, p.causal, at.first_row + warp_row + g);
        scale = 1.f;
      }
      barrier_arrive(kEarly && last ? &s.rows_empty[0] : &ring.v_empty[stage]);
      times_weights(ds, c, scale, lse, delta);
      if (pooled && p.coarse_sum != nullptr) s.add_coarse_sums(p, at, warp_row, tile, ds);
      pack<T>(a, ds);
    };
    // Once the gradient of the tile before has left, the place that it took.
    auto give_back = [&] {
      if (turn == 0 || (kEarly && !owes)) return;
      arrive_behind_stores(kEarly ? &ring.v_empty[(before - 1) % kStages]
                                  : &s.rows_empty[(turn - 1) % kPlaces]);
    };

    // The last of the tiles that are under way.
    auto end_tile = [&](int tile, auto& c, auto& ds, auto& a) {
      wgmma_wait<0>();
      differentiate(tile, tile + 1 == tiles, c, ds, a);
      start_gradient(tile, a);
      wgmma_wait<0>();
      pin(acc);
      barrier_arrive(&ring.k_empty[(before + tile) % kStages]);
    };
    int first = 0;  // tile of 64 keys
    if (uniform(at.few_pooled) != 0) {
      // Half of a tile, before the others.
      float few[kKeys / 16][4], few_ds[kKeys / 16][4];
      uint32_t few_a[kKeys / 32][4];
      start_scores(0, few, few_ds);
      give_back();
      end_tile(0, few, few_ds, few_a);
      first = 1;
    }
    if (tiles == 0) give_back();
    if (tiles > first) {
      start_scores(first, c, ds);
      if (first == 0) give_back();
#pragma unroll 1
      for (int tile = first; tile < tiles - 1; ++tile) {
        wgmma_wait<0>();
        differentiate(tile, false, c, ds, a);
        start_gradient(tile, a);
        start_scores(tile + 1, c, ds);
        wgmma_wait<1>();
        barrier_arrive(&ring.k_empty[(before + tile) % kStages]);
      }
      end_tile(tiles - 1, c, ds, a);
    }
    before += tiles;

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
    // Out through the place of the queries (of the last values), once every warp is done with them.
    owes = kEarly && tiles > 0;
    auto& way_out = owes ? ring.v[(before - 1) % kStages] : s.q[place];
    team.sync();
    place_rows<T>(way_out, acc);
    fence_for_copies();
    team.sync();
    if (team.first_thread()) {
      for (int i = 0; i < DP / 64; ++i) {
        give_panel(p.add, p.grad_q_map, way_out[i], 64 * i, at.first_row, at.h, at.b);
      }
      store_commit();
    }
    if (kEarly && !owes) arrive_behind_stores(&s.rows_empty[0]);
  }
  if (team.first_thread()) store_wait();
#endif
}

template <typename T, int DP>
cudaError_t launch_backward_rows(const BackwardParams& params, const Device& device,
                                 cudaStream_t stream) {
  if (params.list_rows % 64 != 0 || params.row_count != nullptr || params.sums == nullptr) {
    return cudaErrorNotSupported;
  }
  BackwardRowsMaps p{params};
  const cudaError_t error = p.set_tiles(kDtype<T>, 64, 64);
  if (error != cudaSuccess) return error;
  using Traits = BackwardRowsTraits<DP>;
  return launch_tiles<BackwardRowsShared<DP>, Traits, Traits::kTeams>(backward_rows_kernel<T, DP>,
                                                                      p, device, stream);
}

}  // namespace mra::cuda::sm90
