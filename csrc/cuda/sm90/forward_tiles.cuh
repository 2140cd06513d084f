// What the forward kernels share: tiles of queries, and all that their consumers are told of them,
// on their way into places, and the warp that fetches them together with their keys.
#pragma once

#include "forward.h"
#include "keys.cuh"

namespace mra::cuda::sm90 {

struct ForwardMaps : ForwardParams, KeyMaps {
  int items;  // tiles of rows in all
  CUtensorMap q_map, out_map, moments_map;

  // For tiles of `rows` queries whose output leaves by `out_rows`.
  template <int DP>
  cudaError_t set_tiles(Dtype dtype, int rows, int out_rows) {
    const int64_t tiles = (this->rows + rows - 1) / rows * static_cast<int64_t>(B) * H;
    if (tiles > INT_MAX / 2) return cudaErrorInvalidConfiguration;
    items = static_cast<int>(tiles);
    if (moments != nullptr && dtype != Dtype::bf16) return cudaErrorNotSupported;
    const bool maps =
        (moments == nullptr || matrices_map(&moments_map, moments, B, Hk, matrix_dim<DP>(D))) &&
        tensor_map(&q_map, dtype, q, q_strides, B, H, this->rows, D, rows) &&
        tensor_map(&out_map, dtype, out, out_strides, B, H, this->rows, D, out_rows) &&
        set(*this, dtype);
    return maps ? cudaSuccess : cudaErrorNotSupported;
  }
};

// What the consumers are told of a tile of rows; no rows: of the end.
struct ForwardWork {
  int b, h, first_row, rows, pooled_tiles, tiles;
  float state_lse;
};

// What `values`, [B, H, rows] or null, holds for rows from `row` on of a tile.
__device__ __forceinline__ const float* of_rows(const float* values, const ForwardParams& p,
                                                const ForwardWork& at, int row) {
  if (values == nullptr) return nullptr;
  return values + (static_cast<int64_t>(at.b) * p.H + at.h) * p.rows + at.first_row + row;
}

// kWarps attend 16 rows each; kStages tiles of keys.
template <int DP, int kWarps, int kStages, int kPlaces = 2>
struct ForwardTiles {
  static constexpr int kRows = 16 * kWarps;
  uint16_t q[kPlaces][DP / 64][kRows][64];  // also the output on its way to memory
  KeyRing<DP, kStages, kWarps> ring;
  alignas(16) float state_mean[kPlaces][DP];
  ForwardWork work[kPlaces];
  uint64_t q_full[kPlaces], q_empty[kPlaces];
  uint32_t bitmap[1];

  // By one thread.
  __device__ void init() {
    barrier_init_ring(q_full, q_empty, kWarps);
    ring.init();
    barrier_init_done();
  }

  // By one warp.
  __device__ void fetch_ahead(const ForwardMaps& p) {
    KeyProducer<DP, decltype(ring)> producer(p, p, ring, bitmap);
    const auto fetch_last = [&] {
      if (p.moments != nullptr) producer.fetch_matrices(p.moments_map);
    };
    const auto fetch_rows = [&](const RowTile<kRows>& at, int turn) {
      const int slot = turn % kPlaces;
      if (turn >= kPlaces) barrier_wait(&q_empty[slot], turn / kPlaces - 1 & 1);
      const bool state = p.state_mean != nullptr;
      if (producer.lane == 0) {
        work[slot] = {at.b,
                      at.h,
                      at.first_row,
                      at.rows,
                      at.pooled_tiles,
                      at.tiles,
                      state ? p.state_lse[at.list_at] : 0.f};
      }
      barrier_expect(&q_full[slot], kRows * DP * 2 + (state ? p.D * 4 : 0));
      if (producer.lane == 0) {
        for (int i = 0; i < DP / 64; ++i) {
          copy_panel(q[slot][i], p.q_map, &q_full[slot], 64 * i, at.first_row, at.h, at.b);
        }
        if (state) {
          copy_bytes(state_mean[slot], p.state_mean + at.list_at * p.D, p.D * 4, &q_full[slot]);
        }
      }
      __syncwarp();
    };
    const auto end = [&](int turn) {
      const int slot = turn % kPlaces;
      if (turn >= kPlaces) barrier_wait(&q_empty[slot], turn / kPlaces - 1 & 1);
      if (producer.lane == 0) work[slot].rows = 0;
      barrier_arrive(&q_full[slot]);
    };
    producer.template run_all<kPlaces>(p, fetch_rows, fetch_last, end);
  }
};

// Adds the order-1 term to the output of a warp's 16 rows, from `row` of the queries `q`: Sigma and
// C lie in the ring's next places, as KeyProducer::fetch_matrices has put them. `share`: the pooled
// part of this thread's rows. multiply(x, first, second): x = the rows times the matrix whose
// columns from 0 on start at `first`, those from 64 on at `second`.
template <typename T, int kTiles, int kPanels, int kRows, class Ring, class Multiply>
__device__ __forceinline__ void add_order1(float (&acc)[kTiles][4], const float (&share)[2],
                                           const uint16_t (&q)[kPanels][kRows][64], int row,
                                           Ring& ring, int place, const ForwardParams& p,
                                           const ForwardWork& at_rows, const Multiply& multiply) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const float scale = p.scale;
  const float* const variance = of_rows(p.variance, p, at_rows, row);
  float x[kTiles][4];
  // Matrix `which` in the order of the ring.
  const auto with_matrix = [&](int which) {
    const int i = place + (kPanels == 1 ? 0 : which), stage = i % Ring::kStages;
    const int phase = i / Ring::kStages & 1;
    const bool values = kPanels == 1 && which == 1;
    if (kPanels > 1 || !values) barrier_wait(&ring.k_full[stage], phase);
    if (kPanels > 1 || values) barrier_wait(&ring.v_full[stage], phase);
    multiply(x, values ? ring.v[stage] : ring.k[stage], ring.v[stage]);
    if (kPanels > 1 || which == 0) barrier_arrive(&ring.k_empty[stage]);
    if (kPanels > 1 || which == 1) barrier_arrive(&ring.v_empty[stage]);
  };
  with_matrix(0);
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float dot = 0.f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint16_t* at = &q[n / 8][row + g + 8 * half][(n % 8 ^ g) * 8 + 2 * t];
      const float2 u = unpack2(*reinterpret_cast<const uint32_t*>(at), T{});
      dot += u.x * x[n][2 * half] + u.y * x[n][2 * half + 1];
    }
    float part = scale * scale / 4 * quad_sum(dot);
    if (variance != nullptr) {
      part = row + g + 8 * half < at_rows.rows ? variance[g + 8 * half] / 4 : 0.f;
    }
    const float gamma = 1.f / (1.f + part);
    factor[half] = share[half] == 0.f ? 0.f : share[half] * gamma * scale;
  }
  with_matrix(1);
  if (p.centre_term != nullptr) {
    const int64_t key_head = static_cast<int64_t>(at_rows.b) * p.Hk + at_rows.h / (p.H / p.Hk);
    const int dim = matrix_dim<64 * kPanels>(p.D);
    const float* const less = p.centre_term + key_head * dim + 2 * t;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (8 * n >= dim) break;
      const float2 u = __ldg(reinterpret_cast<const float2*>(less + 8 * n));
      x[n][0] -= u.x, x[n][1] -= u.y, x[n][2] -= u.x, x[n][3] -= u.y;
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (factor[i / 2] != 0.f) acc[n][i] = fmaf(factor[i / 2], x[n][i], acc[n][i]);
    }
  }
}

}  // namespace mra::cuda::sm90
