// The fine forward on Hopper: what sm80/forward.cuh computes, for half types and head dims up to
// 256. Persistent blocks of threads take tiles of 64 rows in turns: one warp fetches queries and
// keys ahead by bulk tensor copies, a warpgroup attends by wgmma with the softmax in registers. Or
// tiles of 128 rows, where these have one list: two warpgroups then read the same keys.
#pragma once

#include "../sm80/softmax.cuh"
#include "forward_tiles.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

// Measured choices (docs/kernels.md): places for rows, stages of the ring, blocks of threads a
// multiprocessor.
template <int DP, int kRows>
struct ForwardTraits {
  static constexpr int kPlaces = DP <= 128 ? 2 : 1, kStages = kRows == 128 ? 4
                                                              : DP == 64   ? 3
                                                              : DP == 128  ? 2
                                                                           : 1;
  static constexpr int kBlocks = kRows == 128 ? 1 : DP == 64 ? 3 : 2;
  static constexpr int kThreads = kRows == 128 ? 288 : DP <= 128 ? 160 : 256;
  // At most 32 pooled keys as half a tile, by themselves. At D 128, where fewer blocks of threads
  // fill the gaps, that took 6 % longer, and 2 % with other pooled keys.
  static constexpr bool kHalves = DP == 64;
};

template <int DP, int kRows>
using ForwardShared = ForwardTiles<DP, kRows / 16, ForwardTraits<DP, kRows>::kStages,
                                   ForwardTraits<DP, kRows>::kPlaces>;

template <typename T, int DP, int kRows>
__global__ void __launch_bounds__(ForwardTraits<DP, kRows>::kThreads,
                                  ForwardTraits<DP, kRows>::kBlocks)
    forward_kernel(const __grid_constant__ ForwardMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = ForwardShared<DP, kRows>;
  using Traits = ForwardTraits<DP, kRows>;
  constexpr int kKeys = 64, kStages = Traits::kStages, kPanels = DP / 64, kPlaces = Traits::kPlaces;
  constexpr bool kMoves = Traits::kThreads == 256;  // registers, to those who attend
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);

  s.init();
  constexpr int kAttending = kRows / 16;  // warps
  if (warp_index() >= kAttending) {
    if (kMoves) give_registers<64>();
    if (warp_index() == kAttending) s.fetch_ahead(p);
    return;
  }
  if (kMoves) take_registers<192>();
  auto& ring = s.ring;
  const int group = kRows == 128 ? uniform(threadIdx.x / 128) : 0;
  auto& q = s.q[group];

  // The only place for queries is given back with the last scores; the output then leaves through
  // the place of the last values.
  constexpr bool kEarly = kPlaces == 1;
  const int warp_row = 16 * (kRows == 128 ? warp_index() % 4 : warp_index()),
            g = threadIdx.x % 32 / 4;
  const bool first_thread = (kRows == 128 ? threadIdx.x % 128 : threadIdx.x) == 0;
  int before = 0, turn = 0;  // places of the ring before this tile's keys; tiles of rows
  bool owes = false;         // the place of the last values
#pragma unroll 1
  for (;; ++turn) {
    const int slot = turn % kPlaces;
    barrier_wait(&s.q_full[slot], turn / kPlaces & 1);
    ForwardWork at = s.work[slot];
    if (uniform(at.rows) == 0) break;
    if (kRows == 128) at.first_row += 64 * group, at.rows -= 64 * group;
    const int tiles = uniform(at.tiles);
    if constexpr (kOrder1<DP>) {
      // In registers that then take scores.
      if (p.centre != nullptr) {
        find_gamma<T, kKeys / 8, DP>(s.gamma[threadIdx.x], q[slot], s.centre(slot), warp_row, ring,
                                     before, p, at, [&](auto& x, int stage, int n) {
                                       pin(x);
                                       wgmma_fence();
                                       multiply_panel<T>(x, q[slot],
                                                         n == 0 ? ring.k[stage] : ring.v[stage]);
                                       wgmma_commit();
                                       wgmma_wait<0>();
                                       pin(x);
                                     });
        ++before;
      }
    }
    OnlineSoftmax<T, DP> softmax;
    softmax.start(p.state_mean != nullptr ? s.vectors[slot][0] : nullptr, &s.work[slot].state_lse,
                  p.D);
    if (p.row_mask != nullptr) {
      softmax.leave_out(p.row_mask + static_cast<int64_t>(at.b) * p.rows + at.first_row + warp_row,
                        at.rows - warp_row);
    }
    float c[kKeys / 8][4];
    uint32_t weights[kKeys / 16][4];
    using Place = RingPlace<kStages>;
    const auto place_of = [&](int tile) { return Place(before + tile); };
    // there: what barrier_passed has said of the keys, or the values.
    auto start_scores = [&](const Place& place, auto& c, bool there = false) {
      barrier_wait(&ring.k_full[place.stage], place.phase, there);
      pin(c);
      wgmma_fence();
      multiply_nt<T>(c, q[slot], ring.k[place.stage]);
      wgmma_commit();
    };
    auto start_values = [&](const Place& place, const auto& weights, bool there = false) {
      barrier_wait(&ring.v_full[place.stage], place.phase, there);
      pin(softmax.acc);
      wgmma_fence();
      multiply_pn<T>(softmax.acc, weights, ring.v[place.stage]);
      wgmma_commit();
    };
    // Scores of a tile, complete -> weights; as OnlineSoftmax::weigh. Calls ask() on the way.
    const auto nothing = [] {};
    bool settled = false;
    auto weigh = [&](int tile, const Place& place, bool plain, auto& c, float(&factor)[2],
                     const auto& ask) {
      const float scale = p.scale * kLog2e;
      const auto to_logits = [&](auto& c) {
        if (!plain) ring.to_logits(c, place.stage, scale, p.causal, at.first_row + warp_row + g);
      };
      to_logits(c);
      const float rest = plain ? scale : 1.f;
      ask();
      bool grown = false, weighed = false;
      if (settled) {
        weighed = softmax.weigh_on(c, rest);
        if (!weighed) {
          scores_again<T>(c, q[slot], ring.k[place.stage], warp_row);
          to_logits(c);
        }
      }
      if (!weighed) {
        grown = softmax.weigh(c, rest, factor);
        settled = softmax.settled();
      }
      barrier_arrive(&ring.k_empty[place.stage]);
      if (tile + 1 == at.pooled_tiles)
        end_pooled<T, DP>(softmax, s.gamma[threadIdx.x], p, at, warp_row);
      return grown;
    };
    // Once the output of the tile before has left, the place that it took.
    auto give_back = [&] {
      if (turn == 0 || (kEarly && !owes)) return;
      arrive_behind_stores(kEarly ? &ring.v_empty[(before - 1) % kStages] : &s.q_empty[slot ^ 1]);
    };
    int first = 0;  // tile of 64 keys
    if (Traits::kHalves && uniform(at.few_pooled) != 0) {
      // Half of a tile, before the others.
      float few[kKeys / 16][4], factor[2];
      uint32_t weights[kKeys / 32][4];
      const Place place = place_of(0);
      start_scores(place, few);
      give_back();
      wgmma_wait<0>();
      pin(few);
      if (weigh(0, place, ring.plain[place.stage], few, factor, nothing)) softmax.rescale(factor);
      pack<T>(weights, few);
      start_values(place, weights);
      wgmma_wait<0>();
      pin(softmax.acc);
      barrier_arrive(&ring.v_empty[place.stage]);
      first = 1;
    }
    if (tiles == 0) give_back();
    if constexpr (kEarly) {
      // Both places are fetched into while the other blocks of threads compute.
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        const bool last = tile + 1 == tiles;
        const Place place = place_of(tile);
        float factor[2];
        start_scores(place, c);
        if (tile == 0) give_back();
        wgmma_wait<0>();
        pin(c);
        const bool grown = weigh(tile, place, ring.plain[place.stage], c, factor, nothing);
        if (last) barrier_arrive(&s.q_empty[slot]);
        if (grown) softmax.rescale(factor);
        pack<T>(weights, c);
        start_values(place, weights);
        wgmma_wait<0>();
        pin(softmax.acc);
        if (!last) barrier_arrive(&ring.v_empty[place.stage]);
      }
    } else if (tiles > first) {
      float factor[2];
      Place values = place_of(first);
      start_scores(values, c);
      if (first == 0) give_back();
      wgmma_wait<0>();
      pin(c);
      if (weigh(first, values, ring.plain[values.stage], c, factor, nothing))
        softmax.rescale(factor);
      pack<T>(weights, c);
      Place keys = place_of(first + 1);
      bool keys_there = false, values_there = false;
      // The softmax of a tile runs beside the values of the one before.
#pragma unroll 1
      for (int tile = first + 1; tile < tiles; ++tile) {
        start_scores(keys, c, keys_there);
        const bool plain = ring.plain[keys.stage];  // on its way beside the products
        start_values(values, weights, values_there);
        wgmma_wait<1>();
        pin(c);
        Place next;
        const bool grown = weigh(tile, keys, plain, c, factor, [&] {
          next = place_of(tile + 1);
          next.settle();  // beside the softmax, not when the next turn needs it
          keys_there = barrier_passed(&ring.k_full[next.stage], next.phase);
          values_there = barrier_passed(&ring.v_full[keys.stage], keys.phase);
        });
        wgmma_wait<0>();
        pin(softmax.acc);
        barrier_arrive(&ring.v_empty[values.stage]);
        if (grown) softmax.rescale(factor);
        pack<T>(weights, c);
        values = keys;
        keys = next;
      }
      start_values(values, weights);
      wgmma_wait<0>();
      pin(softmax.acc);
      barrier_arrive(&ring.v_empty[values.stage]);
    }
    before += tiles;
    float share[2];
    softmax.finish(p, at.b, at.h, at.first_row + warp_row, at.rows - warp_row, share);
    if constexpr (kOrder1<DP>) {
      if (p.term != nullptr) add_term<T>(softmax.acc, share, p, at, warp_row);
      if (p.moments != nullptr) {
        add_order1<T>(softmax.acc, share, q[slot], s.centre(slot), warp_row, ring, before, p, at,
                      s.gamma[threadIdx.x], [&](auto& x, const auto& first, const auto&) {
                        pin(x);
                        wgmma_fence();
                        multiply_matrix<T, false>(x, q[slot], first, sizeof(ring.k), false);
                        wgmma_commit();
                        wgmma_wait<0>();
                        pin(x);
                      });
      }
    }

    // Out through the place of the queries (of the last values), once every warp is done with them.
    owes = kEarly && tiles > 0;
    auto& way_out = owes ? ring.v[(before - 1) % kStages] : q[slot];
    group_sync(group);
    place_rows<T>(way_out, softmax.acc);
    fence_for_copies();
    group_sync(group);
    if (first_thread) {
      for (int i = 0; i < kPanels; ++i) {
        store_panel(p.out_map, way_out[i], 64 * i, at.first_row, at.h, at.b);
      }
      store_commit();
    }
    if (kEarly && !owes) arrive_behind_stores(&s.q_empty[slot]);
  }
  if (first_thread) store_wait();
#endif
}

template <typename T, int DP, int kRows>
cudaError_t launch_forward_rows(const ForwardParams& params, const Device& device,
                                cudaStream_t stream) {
  ForwardMaps p{params};
  const cudaError_t error = p.set_tiles<DP>(kDtype<T>, kRows, 64);
  if (error != cudaSuccess) return error;
  return launch_tiles<ForwardShared<DP, kRows>, ForwardTraits<DP, kRows>>(
      forward_kernel<T, DP, kRows>, p, device, stream);
}

// cudaErrorNotSupported: not a case for this kernel.
template <typename T, int DP>
cudaError_t launch_forward(const ForwardParams& params, const Device& device, cudaStream_t stream) {
  if (params.list_rows % 64 != 0) return cudaErrorNotSupported;
  if constexpr (DP == 128) {
    if (params.list_rows == 128) return launch_forward_rows<T, DP, 128>(params, device, stream);
  }
  return launch_forward_rows<T, DP, 64>(params, device, stream);
}

}  // namespace mra::cuda::sm90
