// What the forward kernels share: tiles of queries, and all that their consumers are told of them,
// on their way into two places, and the warp that fetches them together with their keys.
#pragma once

#include "forward.h"
#include "keys.cuh"

namespace mra::cuda::sm90 {

struct ForwardMaps : ForwardParams, KeyMaps {
  int items;  // tiles of rows in all
  CUtensorMap q_map, out_map, moments_map;

  // For tiles of `rows` queries whose output leaves by `out_rows`.
  cudaError_t set_tiles(Dtype dtype, int rows, int out_rows) {
    const int64_t tiles = (this->rows + rows - 1) / rows * static_cast<int64_t>(B) * H;
    if (tiles > INT_MAX / 2) return cudaErrorInvalidConfiguration;
    items = static_cast<int>(tiles);
    const bool maps =
        tensor_map(&q_map, dtype, q, q_strides, B, H, this->rows, D, rows) &&
        tensor_map(&out_map, dtype, out, out_strides, B, H, this->rows, D, out_rows) &&
        set(*this, dtype);
    return maps ? cudaSuccess : cudaErrorNotSupported;
  }
};

// What the consumers are told of a tile of rows.
struct ForwardWork {
  int b, h, first_row, rows, pooled_tiles, tiles;
  float state_lse;
};

// kWarps attend 16 rows each; kStages tiles of keys.
template <int DP, int kWarps, int kStages>
struct ForwardTiles {
  static constexpr int kRows = 16 * kWarps;
  uint16_t q[2][DP / 64][kRows][64];  // also the output on its way to memory
  KeyRing<DP, kStages, kWarps> ring;
  alignas(16) float state_mean[2][DP];
  ForwardWork work[2];
  uint64_t q_full[2], q_empty[2];
  uint32_t bitmap[1];

  // By one thread. `givers` give a place back.
  __device__ void init(int givers) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&q_full[i], 1);
      barrier_init(&q_empty[i], givers);
    }
    ring.init();
    barrier_init_done();
  }

  // By one warp.
  __device__ void fetch_ahead(const ForwardMaps& p) {
    KeyProducer<DP, decltype(ring)> producer(p, p, ring, bitmap);
    const auto fetch_last = [&] {
      if constexpr (kRows == 64) {
        if (p.moments != nullptr) producer.fetch_matrices(p.moments_map);
      }
    };
    const auto fetch_rows = [&](const RowTile<kRows>& at, int turn) {
      const int slot = turn % 2;
      if (turn >= 2) barrier_wait(&q_empty[slot], turn / 2 - 1 & 1);
      const bool state = p.state_mean != nullptr;
      if (producer.lane == 0) {
        work[slot] = {at.b,
                      at.h,
                      at.first_row,
                      at.rows,
                      at.pooled_tiles,
                      at.tiles,
                      state ? p.state_lse[at.list_at] : 0.f};
        barrier_expect(&q_full[slot], kRows * DP * 2 + (state ? p.D * 4 : 0));
        for (int i = 0; i < DP / 64; ++i) {
          copy_panel(q[slot][i], p.q_map, &q_full[slot], 64 * i, at.first_row, at.h, at.b);
        }
        if (state) {
          copy_bytes(state_mean[slot], p.state_mean + at.list_at * p.D, p.D * 4, &q_full[slot]);
        }
      }
      __syncwarp();
    };
    producer.template run_all<2>(p.items, fetch_rows, fetch_last);
  }
};

}  // namespace mra::cuda::sm90
