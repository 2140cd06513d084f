// Heads for backward_pooled_order1.cuh: what lies in shared memory, and the warps that fetch it.
#pragma once

#include "../sm80/tile.cuh"
#include "backward.h"
#include "tma.cuh"
#include "unseen.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

struct PooledOrder1Maps : PooledOrder1 {
  CUtensorMap q_map, grad_out_map, out_map, grad_q_map, k_map, v_map, moments_map;
  int tiles, items;  // of a chunk; chunks of heads
};

// Measured choices (docs/kernels.md): places for tiles of rows, and the registers of the threads of
// the warpgroups that attend rows, of the one that adds up, and of the one that fetches: as many as
// the launch has.
template <int kKeys>
struct PooledOrder1Traits {
  static constexpr int kStages = kKeys == 32 ? 4 : 3, kTeams = 2;
  static constexpr int kThreads = 128 * (kTeams + 2);
  static constexpr int kRowRegisters = 168;
  static constexpr int kSumRegisters = 136, kFewRegisters = 40;
};

// A chunk of a query head.
struct PooledOrder1Item {
  int head, b, h, hk, chunk, first, tiles;

  __device__ __forceinline__ PooledOrder1Item(const PooledOrder1Maps& p, int item)
      : head(item / p.chunks),
        b(head / p.H),
        h(head - b * p.H),
        hk(h / (p.H / p.Hk)),
        chunk(item - head * p.chunks),
        first(chunk * p.tiles * 64),
        tiles(min(p.tiles, (p.rows - first + 63) / 64)) {}
};

template <int kKeys>
struct PooledOrder1Shared {
  static constexpr int kStages = PooledOrder1Traits<kKeys>::kStages;
  static constexpr int kTeams = PooledOrder1Traits<kKeys>::kTeams, kRowWarps = 4 * kTeams;
  static constexpr int kWeighted = kKeys == 32 ? 3 : 4;
  // Of every other item: C and Sigma, pooled keys and values.
  uint16_t moments[2][2][1][64][64], k[2][1][kKeys][64], v[2][1][kKeys][64];
  uint16_t rows[kStages][3][1][64][64];  // q, then q - centre; dO; o, then dq on its way to memory
  // Of each team's last tile: a (q - centre), b (q - centre), and of the logits gradients and
  // weights, side by side where there are few.
  uint16_t weighted[kTeams][kWeighted][1][64][64];
  // Of every other item: the centre, its product with Sigma, log2 of the keys' masses.
  alignas(16) float centre[2][64], centre_sigma[2][64], bias[2][64];
  // ... sums of each warp's rows: order 1 of the queries, gradients of each logit.
  float row_sums[2][kRowWarps][64], mass_grads[2][kRowWarps][kKeys];
  alignas(16) uint4 windows[2][32];  // of 32 tiles of rows: keys that either 32 rows don't see
  alignas(16) uint32_t unseen[kStages][2][2];
  uint64_t item_full[2], item_empty[2], summed[2], window_full[2], window_empty[2];
  uint64_t full[kStages], empty[kStages], weighted_full[kTeams], weighted_empty[kTeams];

  // By one thread.
  __device__ void init() {
    barrier_init_ring(item_full, item_empty, kRowWarps + 4);
    barrier_init_ring(window_full, window_empty, 1);
    barrier_init_ring(full, empty, 8);  // a team, and the warps that add up
    for (int i = 0; i < 2; ++i) barrier_init(&summed[i], kRowWarps);
    for (int i = 0; i < kTeams; ++i) {
      barrier_init(&weighted_full[i], 4);
      barrier_init(&weighted_empty[i], 4);
    }
    barrier_init_done();
  }
};

// By one warp.
template <int kKeys>
__device__ void fetch_item(const PooledOrder1Maps& p, PooledOrder1Shared<kKeys>& s,
                           const PooledOrder1Item& at, int turn) {
  const int slot = turn % 2, lane = threadIdx.x % 32, dim = matrix_dim<64>(p.D);
  uint64_t* const full = &s.item_full[slot];
  if (turn >= 2) barrier_wait(&s.item_empty[slot], turn / 2 - 1 & 1);
  const int* const masses = masses_of(p, at.b, at.hk);
#pragma unroll
  for (int y = lane; y < kKeys; y += 32) {
    const float mass = y < p.nk ? mass_of(p, masses[y]) : 0.f;
    s.bias[slot][y] = mass > 0.f ? log2_approx(mass) : -INFINITY;
  }
  barrier_expect(full, 2 * 64 * 64 * 2 + 2 * kKeys * 64 * 2 + 4 * (p.D + dim));
  if (lane != 0) return;
  copy_matrices<64>(s.moments[slot], p.moments_map, full, at.hk, at.b);
  copy_panel(s.k[slot], p.k_map, full, 0, 0, at.hk, at.b);
  copy_panel(s.v[slot], p.v_map, full, 0, 0, at.hk, at.b);
  const int64_t key_head = static_cast<int64_t>(at.b) * p.Hk + at.hk;
  copy_bytes(s.centre[slot], p.centre + key_head * p.D, 4 * p.D, full);
  copy_bytes(s.centre_sigma[slot], p.centre_term + (key_head * 2 + 1) * dim, 4 * dim, full);
}

// By one warp: all items of this block of threads.
template <int kKeys>
__device__ void fetch_rows(const PooledOrder1Maps& p, PooledOrder1Shared<kKeys>& s) {
  constexpr int kStages = PooledOrder1Traits<kKeys>::kStages;
  const int lane = threadIdx.x % 32;
  int before = 0, window = 0, turn = 0;
#pragma unroll 1
  for (int item = blockIdx.x; item < p.items; item += gridDim.x, ++turn) {
    const PooledOrder1Item at(p, item);
    fetch_item(p, s, at, turn);
    __syncwarp();
#pragma unroll 1
    for (int tile = 0; tile < at.tiles; ++tile) {
      const int stage = (before + tile) % kStages, round = (before + tile) / kStages;
      if (tile % 32 == 0) barrier_wait(&s.window_full[window % 2], window / 2 & 1);
      const uint4 unseen = s.windows[window % 2][tile % 32];
      if (tile % 32 == 31 || tile + 1 == at.tiles) {
        barrier_arrive(&s.window_empty[window % 2]);
        ++window;
      }
      if (round > 0) barrier_wait(&s.empty[stage], round - 1 & 1);
      if (lane == 0) *reinterpret_cast<uint4*>(s.unseen[stage]) = unseen;
      uint64_t* const full = &s.full[stage];
      barrier_expect(full, 3 * 64 * 64 * 2);
      if (lane == 0) {
        const int row = at.first + 64 * tile;
        copy_panel(s.rows[stage][0], p.q_map, full, 0, row, at.h, at.b);
        copy_panel(s.rows[stage][1], p.grad_out_map, full, 0, row, at.h, at.b);
        copy_panel(s.rows[stage][2], p.out_map, full, 0, row, at.h, at.b);
      }
      __syncwarp();
    }
    before += at.tiles;
  }
}

// By one warp, a tile of rows each lane.
template <int kKeys>
__device__ void look_up_unseen(const PooledOrder1Maps& p, PooledOrder1Shared<kKeys>& s) {
  const int lane = threadIdx.x % 32;
  int window = 0;
#pragma unroll 1
  for (int item = blockIdx.x; item < p.items; item += gridDim.x) {
    const PooledOrder1Item at(p, item);
#pragma unroll 1
    for (int tile0 = 0; tile0 < at.tiles; tile0 += 32, ++window) {
      uint64_t unseen[2] = {0, 0};
      if (tile0 + lane < at.tiles) {
        const int x = (at.first + 64 * (tile0 + lane)) / p.list_rows;
        unseen[0] = unseen[1] = unseen_by(p, at.head, x, 0);
        if (p.list_rows == 32 && x + 1 < p.row_lists.lists) {
          unseen[1] = unseen_by(p, at.head, x + 1, 0);
        }
      }
      if (window >= 2) barrier_wait(&s.window_empty[window % 2], window / 2 - 1 & 1);
      s.windows[window % 2][lane] =
          make_uint4(static_cast<uint32_t>(unseen[0]), static_cast<uint32_t>(unseen[0] >> 32),
                     static_cast<uint32_t>(unseen[1]), static_cast<uint32_t>(unseen[1] >> 32));
      barrier_arrive(&s.window_full[window % 2]);
    }
  }
}

// This warp's 16 rows of a panel, sixteen columns at once, as products lie in registers.
struct WarpRows {
  uint32_t at;

  __device__ __forceinline__ WarpRows() {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    at = warp * 2048 + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
  }
  __device__ __forceinline__ void load(uint32_t (&x)[4], const uint16_t (&panel)[1][64][64],
                                       int column) const {
    ldmatrix_x4<false>(x, smem_address(&panel[0][0][0]) + (at ^ column * 2));
  }
  __device__ __forceinline__ void store(uint16_t (&panel)[1][64][64], int column,
                                        const uint32_t (&x)[4]) const {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     smem_address(&panel[0][0][0]) + (at ^ column * 2)),
                 "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
  }
};

}  // namespace mra::cuda::sm90
