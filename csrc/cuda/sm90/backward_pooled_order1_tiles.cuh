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
// the warpgroups that attend rows, of the one that adds up, and of the warps that fetch and look
// up: as many as the launch has.
struct PooledOrder1Traits {
  static constexpr int kStages = 5, kTeams = 2;
  static constexpr int kThreads = 128 * (kTeams + 2);
  static constexpr int kRowRegisters = 176, kSumRegisters = 128, kFewRegisters = 32;
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

struct PooledOrder1Shared {
  static constexpr int kKeys = kPooledOrder1Keys, kStages = PooledOrder1Traits::kStages;
  static constexpr int kTeams = PooledOrder1Traits::kTeams, kRowWarps = 4 * kTeams;
  // Of every other item: C and Sigma, pooled keys and values.
  uint16_t moments[2][2][1][64][64], k[2][1][kKeys][64], v[2][1][kKeys][64];
  uint16_t rows[kStages][3][1][64][64];  // q, then q - centre; dO; o, then dq on its way to memory
  // Of each team's last tile, side by side: gradients of the logits, weights. Of the last tile, a
  // (q - centre) and b (q - centre).
  uint16_t weights[kTeams][1][64][64], weighted[2][1][64][64];
  // Of every other item: the centre, its product with Sigma, log2 of the keys' masses.
  alignas(16) float centre[2][64], centre_sigma[2][64], bias[2][64];
  // ... sums of each warp's rows: order 1 of the queries, gradients of each logit.
  float row_sums[2][kRowWarps][64], mass_grads[2][kRowWarps][kKeys];
  float numbers[kStages][3][64];  // of each row: share, lse in log2 units, dlse
  float mass_sums[kKeys];
  float row_weights[kTeams][2][64];  // a, b
  alignas(16) uint2 windows[2][32];  // of 32 tiles of rows: keys that either 32 rows don't see
  uint2 unseen[kStages];
  uint64_t item_full[2], item_empty[2], summed[2], window_full[2], window_empty[2];
  uint64_t full[kStages], empty[kStages], numbers_full[kStages];
  uint64_t weights_full[kTeams], weights_empty[kTeams];

  // By one thread.
  __device__ void init() {
    barrier_init_ring(item_full, item_empty, kRowWarps + 4);
    barrier_init_ring(window_full, window_empty, 1);
    barrier_init_ring(full, empty, 8);  // a team, and the warps that add up
    for (auto& barrier : numbers_full) barrier_init(&barrier, 1);
    for (auto& barrier : summed) barrier_init(&barrier, kRowWarps);
    for (auto& barrier : weights_full) barrier_init(&barrier, 4);
    for (auto& barrier : weights_empty) barrier_init(&barrier, 4);
    barrier_init_done();
  }
};

// By one warp.
__device__ inline void fetch_item(const PooledOrder1Maps& p, PooledOrder1Shared& s,
                                  const PooledOrder1Item& at, int turn) {
  constexpr int kKeys = PooledOrder1Shared::kKeys;
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
__device__ inline void fetch_rows(const PooledOrder1Maps& p, PooledOrder1Shared& s) {
  constexpr int kStages = PooledOrder1Traits::kStages;
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
      const uint2 unseen = s.windows[window % 2][tile % 32];
      if (tile % 32 == 31 || tile + 1 == at.tiles) {
        barrier_arrive(&s.window_empty[window % 2]);
        ++window;
      }
      if (round > 0) barrier_wait(&s.empty[stage], round - 1 & 1);
      if (lane == 0) s.unseen[stage] = unseen;
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
__device__ inline void look_up_unseen(const PooledOrder1Maps& p, PooledOrder1Shared& s) {
  const int lane = threadIdx.x % 32;
  int window = 0;
#pragma unroll 1
  for (int item = blockIdx.x; item < p.items; item += gridDim.x) {
    const PooledOrder1Item at(p, item);
#pragma unroll 1
    for (int tile0 = 0; tile0 < at.tiles; tile0 += 32, ++window) {
      uint32_t unseen[2] = {};
      if (tile0 + lane < at.tiles) {
        unseen_by_tile(p, at.head, at.first + 64 * (tile0 + lane), 0, unseen);
      }
      if (window >= 2) barrier_wait(&s.window_empty[window % 2], window / 2 - 1 & 1);
      s.windows[window % 2][lane] = make_uint2(unseen[0], unseen[1]);
      barrier_arrive(&s.window_full[window % 2]);
    }
  }
}

// By one warp: what belongs to rows, two of each tile for a lane.
__device__ inline void look_up_numbers(const PooledOrder1Maps& p, PooledOrder1Shared& s) {
  constexpr int kStages = PooledOrder1Traits::kStages;
  const int lane = threadIdx.x % 32;
  int count = 0;
#pragma unroll 1
  for (int item = blockIdx.x; item < p.items; item += gridDim.x) {
    const PooledOrder1Item at(p, item);
    const int64_t head = static_cast<int64_t>(at.head) * p.rows;
    const float* const grad_lse =
        p.grad_lse + (p.grad_lse == nullptr ? 0 : at.b * p.lse_strides.b + at.h * p.lse_strides.h);
#pragma unroll 1
    for (int tile = 0; tile < at.tiles; ++tile, ++count) {
      const int stage = count % kStages, round = count / kStages;
      float x[2][3];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = at.first + 64 * tile + 32 * half + lane;
        const bool there = i < p.rows;
        x[half][0] = there ? p.share[head + i] : 0.f;
        x[half][1] = there ? p.lse[head + i] : 0.f;
        x[half][2] = there && p.grad_lse != nullptr ? grad_lse[i * p.lse_strides.l] : 0.f;
      }
      if (round > 0) barrier_wait(&s.empty[stage], round - 1 & 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const to = &s.numbers[stage][0][32 * half + lane];
        to[0] = x[half][0];
        to[64] = x[half][1] * kLog2e;
        to[128] = x[half][2];
      }
      barrier_arrive(&s.numbers_full[stage]);
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
    stmatrix_x4(smem_address(&panel[0][0][0]) + (at ^ column * 2), x[0], x[1], x[2], x[3]);
  }
};

}  // namespace mra::cuda::sm90
