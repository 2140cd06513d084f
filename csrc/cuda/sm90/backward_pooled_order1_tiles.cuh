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
// the warpgroups that attend rows, of the one that adds up, and of the warps that fetch, look up
// and sum columns: as many as the launch has.
template <int kKeys>
struct PooledOrder1Traits {
  static constexpr int kStages = kKeys == 32 ? 6 : 5, kTeams = 2;
  static constexpr int kThreads = 128 * (kTeams + 2);
  static constexpr int kRowRegisters = kKeys == 32 ? 160 : 152;
  static constexpr int kSumRegisters = kKeys == 32 ? 152 : 168, kFewRegisters = 40;
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

template <int kPooledKeys>
struct PooledOrder1Shared {
  using Traits = PooledOrder1Traits<kPooledKeys>;
  static constexpr int kKeys = kPooledKeys, kStages = Traits::kStages, kTeams = Traits::kTeams;
  // Of every other item: C and Sigma, pooled keys and values.
  uint16_t moments[2][2][1][64][64], k[2][1][kKeys][64], v[2][1][kKeys][64];
  uint16_t rows[kStages][3][1][64][64];  // q, then q - centre; dO; o, then dq on its way to memory
  // Of each team's last tile, side by side: gradients of the logits, weights.
  uint16_t weights[kTeams][kKeys / 32][64][64];
  // Of every other item: the centre, its product with Sigma, log2 of the keys' masses.
  alignas(16) float centre[2][64], centre_sigma[2][64], bias[2][64];
  // ... sums over its rows: of dq, of the gradients of each logit.
  float dq_sums[2][64], mass_grads[2][kKeys];
  float numbers[kStages][3][64];     // of each row: share, lse in log2 units, dlse
  float row_weights[kTeams][2][64];  // a, b
  // Of 32 tiles of rows, and of each stage: keys that either 32 rows don't see.
  uint32_t windows[2][32][2][kKeys / 32], unseen[kStages][2][kKeys / 32];
  uint64_t item_full[2], item_empty[2], summed[2], window_full[2], window_empty[2];
  uint64_t full[kStages], empty[kStages], numbers_full[kStages], dq_full[kStages];
  uint64_t weights_full[kTeams], weights_empty[kTeams];

  // By one thread.
  __device__ void init() {
    barrier_init_ring(item_full, item_empty, 4 * kTeams + 4);
    barrier_init_ring(window_full, window_empty, 1);
    barrier_init_ring(full, empty, 9);  // a team, the warps that add up, one that sums columns
    for (auto& barrier : numbers_full) barrier_init(&barrier, 1);
    for (auto& barrier : dq_full) barrier_init(&barrier, 4);
    for (auto& barrier : summed) barrier_init(&barrier, 2);
    for (auto& barrier : weights_full) barrier_init(&barrier, 4);
    for (auto& barrier : weights_empty) barrier_init(&barrier, 5);
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
      const auto& unseen = s.windows[window % 2][tile % 32];
      uint32_t mine = 0;  // of the first lanes one word each
      if (lane < kKeys / 16) mine = (&unseen[0][0])[lane];
      if (tile % 32 == 31 || tile + 1 == at.tiles) {
        barrier_arrive(&s.window_empty[window % 2]);
        ++window;
      }
      if (round > 0) barrier_wait(&s.empty[stage], round - 1 & 1);
      if (lane < kKeys / 16) (&s.unseen[stage][0][0])[lane] = mine;
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

// Which keys tiles of rows don't see, 32 of them at once, a tile a lane; by one warp.
template <int kKeys>
struct PooledOrder1Windows {
  const PooledOrder1Maps& p;
  PooledOrder1Shared<kKeys>& s;
  int item = blockIdx.x, tile = 0, window = 0;  // the next

  __device__ void look_up() {
    if (item >= p.items) return;
    const PooledOrder1Item at(p, item);
    const int mine = tile + threadIdx.x % 32;
    uint64_t unseen[2] = {0, 0};
    if (mine < at.tiles) {
      unseen_by_tile(p, at.head, at.first + 64 * mine, 0, unseen);
    }
    const int place = window % 2;
    if (window >= 2) barrier_wait(&s.window_empty[place], window / 2 - 1 & 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      auto& to = s.windows[place][threadIdx.x % 32][i];
      to[0] = static_cast<uint32_t>(unseen[i]);
      if constexpr (kKeys > 32) to[1] = static_cast<uint32_t>(unseen[i] >> 32);
    }
    barrier_arrive(&s.window_full[place]);
    ++window;
    tile += 32;
    if (tile >= at.tiles) item += gridDim.x, tile = 0;
  }
};

// By one warp: what belongs to rows, two of each tile for a lane, and the windows, one ahead.
template <int kKeys>
__device__ void look_up(const PooledOrder1Maps& p, PooledOrder1Shared<kKeys>& s) {
  constexpr int kStages = PooledOrder1Traits<kKeys>::kStages;
  const int lane = threadIdx.x % 32;
  PooledOrder1Windows<kKeys> windows{p, s};
  windows.look_up();
  int count = 0;
#pragma unroll 1
  for (int item = blockIdx.x; item < p.items; item += gridDim.x) {
    const PooledOrder1Item at(p, item);
    const int64_t head = static_cast<int64_t>(at.head) * p.rows;
    const float* const grad_lse =
        p.grad_lse + (p.grad_lse == nullptr ? 0 : at.b * p.lse_strides.b + at.h * p.lse_strides.h);
#pragma unroll 1
    for (int tile = 0; tile < at.tiles; ++tile, ++count) {
      if (tile % 32 == 0) windows.look_up();
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

// Where in a panel this lane's eight are, of sixteen rows and the columns from 16 i on, transposed.
__device__ __forceinline__ int transposed_columns(int i) {
  const int lane = threadIdx.x % 32;
  return (lane % 8 + lane / 16 * 8) * 128 + (2 * i + lane / 8 % 2 ^ lane % 8) * 16;
}

// Adds the sums of kColumns columns of a panel over its 64 rows, by one warp: of columns 16 i + g
// and 16 i + g + 8 to sums[i][0] and sums[i][2].
template <int kColumns>
__device__ __forceinline__ void sum_columns(float (&sums)[kColumns / 16][4],
                                            const uint16_t (&panel)[64][64]) {
  using T = __nv_bfloat16;
  const uint32_t ones = 0x3f803f80;
#pragma unroll
  for (int k = 0; k < 64; k += 16) {
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      Mma<T>::A a;
      ldmatrix_x4<true>(a.r, smem_address(panel) + 128 * k + transposed_columns(i));
      Mma<T>::product(sums[i], a, ones, ones);
    }
  }
}
// ... to the item's sums.
template <int kColumns>
__device__ __forceinline__ void store_columns(const float (&sums)[kColumns / 16][4], float* to) {
  const int lane = threadIdx.x % 32;
  if (lane % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < kColumns / 16; ++i) {
    to[16 * i + lane / 4] = sums[i][0];
    to[16 * i + 8 + lane / 4] = sums[i][2];
  }
}

// By one warp: sums of dq (kOfRows), or of the gradients of the logits, over an item's rows.
template <bool kOfRows, int kKeys>
__device__ void sum_items(const PooledOrder1Maps& p, PooledOrder1Shared<kKeys>& s) {
  using Traits = PooledOrder1Traits<kKeys>;
  constexpr int kColumns = kOfRows ? 64 : kKeys;
  int count = 0, turn = 0;
#pragma unroll 1
  for (int item = blockIdx.x; item < p.items; item += gridDim.x, ++turn) {
    const int tiles = PooledOrder1Item(p, item).tiles;
    float sums[kColumns / 16][4] = {};
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile, ++count) {
      if constexpr (kOfRows) {
        const int stage = count % Traits::kStages;
        barrier_wait(&s.dq_full[stage], count / Traits::kStages & 1);
        sum_columns<kColumns>(sums, s.rows[stage][2][0]);
        barrier_arrive(&s.empty[stage]);
      } else {
        const int team = count % Traits::kTeams;
        barrier_wait(&s.weights_full[team], count / Traits::kTeams & 1);
        sum_columns<kColumns>(sums, s.weights[team][0]);
        barrier_arrive(&s.weights_empty[team]);
      }
    }
    const int slot = turn % 2;
    if (turn >= 2) barrier_wait(&s.item_empty[slot], turn / 2 - 1 & 1);
    store_columns<kColumns>(sums, kOfRows ? s.dq_sums[slot] : s.mass_grads[slot]);
    barrier_arrive(&s.summed[slot]);
  }
}

// This warp's 16 rows of a panel, sixteen columns at once, as products lie in registers.
struct WarpRows {
  uint32_t at;

  __device__ __forceinline__ WarpRows() {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    at = warp * 2048 + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
  }
  __device__ __forceinline__ void load(uint32_t (&x)[4], const uint16_t (&panel)[64][64],
                                       int column) const {
    ldmatrix_x4<false>(x, smem_address(&panel[0][0]) + (at ^ column * 2));
  }
  __device__ __forceinline__ void store(uint16_t (&panel)[64][64], int column,
                                        const uint32_t (&x)[4]) const {
    stmatrix_x4(smem_address(&panel[0][0]) + (at ^ column * 2), x[0], x[1], x[2], x[3]);
  }
};

}  // namespace mra::cuda::sm90
