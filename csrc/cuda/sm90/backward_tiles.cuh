// What the kernels of dQ share: tiles of queries and output gradients, and all that their consumers
// are told of them, on their way into places, and the warp that fetches them together with their
// keys.
#pragma once

#include "backward.h"
#include "key_producer.cuh"

namespace mra::cuda::sm90 {

struct BackwardRowsMaps : BackwardParams, KeyMaps {
  int items;  // tiles of rows in all
  CUtensorMap q_map, grad_out_map, grad_q_map;

  // For tiles of `rows` rows whose gradient leaves by `grad_rows`.
  cudaError_t set_tiles(Dtype dtype, int rows, int grad_rows) {
    const int64_t tiles = (this->rows + rows - 1) / rows * static_cast<int64_t>(B) * H;
    if (tiles > INT_MAX / 2) return cudaErrorInvalidConfiguration;
    items = static_cast<int>(tiles);
    const auto map = [&](CUtensorMap* to, const void* data, const Strides& strides, int box) {
      return tensor_map(to, dtype, data, strides, B, H, this->rows, D, box);
    };
    const bool maps =
        map(&q_map, q, q_strides, rows) && map(&grad_out_map, grad_out, grad_out_strides, rows) &&
        map(&grad_q_map, grad_q, grad_q_strides, grad_rows) && set(*this, dtype, rows);
    return maps ? cudaSuccess : cudaErrorNotSupported;
  }
};

// What the consumers are told of a tile of rows; no rows: of the end.
struct BackwardRowsWork {
  int b, h, first_row, rows, pooled_tiles, tiles, few_pooled;
};

// Gradients of weights -> those of their logits, by the weights: scores times `scale` less lse.
template <int kTiles>
__device__ __forceinline__ void times_weights(float (&ds)[kTiles][4], const float (&c)[kTiles][4],
                                              float scale, const float (&lse)[2],
                                              const float (&delta)[2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ds[n][i] = (ds[n][i] - delta[i / 2]) * exp2_approx(fmaf(c[n][i], scale, -lse[i / 2]));
    }
  }
}

// kWarps attend 16 rows each, kGroups times: each group other tiles of keys; kStages tiles of keys.
template <int DP, int kWarps, int kStages, int kPlaces, int kGroups = 1>
struct BackwardRowsTiles {
  static constexpr int kRows = 16 * kWarps;
  uint16_t q[kPlaces][DP / 64][kRows][64];  // also the gradient on its way to memory
  uint16_t grad_out[kPlaces][DP / 64][kRows][64];
  KeyRing<DP, kStages, kWarps> ring;
  // Of each 32 rows lse (log2 units) and delta; for pooled keys.
  alignas(16) float sums[kPlaces][kRows / 32][2][32], pooled_sums[kPlaces][kRows / 32][2][32];
  alignas(16) float q_block[2][DP];  // of every other tile
  float coarse_sum[kRows];           // each written and read by one thread
  BackwardRowsWork work[kPlaces];
  uint64_t rows_full[kPlaces], rows_empty[kPlaces];
  uint64_t handed;  // the sums of one group, to another
  uint32_t bitmap[1];

  // By one thread.
  __device__ void init() {
    barrier_init_ring(rows_full, rows_empty, kWarps * kGroups);
    if (kGroups > 1) barrier_init(&handed, kWarps);
    ring.init();
    barrier_init_done();
  }

  // Adds up the gradients of the pooled logits of a warp's 16 rows, from `row` on of the tile.
  template <int kTiles>
  __device__ __forceinline__ void add_coarse_sums(const BackwardParams& p,
                                                  const BackwardRowsWork& at, int row, int tile,
                                                  const float (&ds)[kTiles][4]) {
    const int64_t head = static_cast<int64_t>(at.b) * p.H + at.h;
    sum_columns(ds, coarse_sum + row, tile, at.pooled_tiles,
                p.coarse_sum + head * p.rows + at.first_row + row, at.rows - row);
  }

  // By one warp, of kTeams in a block of threads.
  template <int kTeams = 1>
  __device__ void fetch_ahead(const BackwardRowsMaps& p, int team = 0) {
    const WorkQueue<BackwardRowsMaps, kTeams> queue(p, team);
    KeyProducer<DP, decltype(ring)> producer(p, p, ring, bitmap, queue.first());
    const auto fetch_rows = [&](const auto& at, int turn) {
      const int place = turn % kPlaces;
      uint64_t* full = &rows_full[place];
      if (turn >= kPlaces) barrier_wait(&rows_empty[place], turn / kPlaces - 1 & 1);
      if (producer.lane == 0) {
        work[place] = {at.b,     at.h,           at.first_row, at.rows, at.pooled_tiles,
                       at.tiles, at.few_pooled()};
      }
      constexpr int kSums = sizeof(sums[0]);
      const bool pooled = p.pooled_k != nullptr, block = p.q_block != nullptr;
      barrier_expect(full, 2 * kRows * DP * 2 + (pooled ? 2 : 1) * kSums + (block ? p.D * 4 : 0));
      if (producer.lane == 0) {
        for (int i = 0; i < DP / 64; ++i) {
          copy_panel(q[place][i], p.q_map, full, 64 * i, at.first_row, at.h, at.b);
          copy_panel(grad_out[place][i], p.grad_out_map, full, 64 * i, at.first_row, at.h, at.b);
        }
        const int64_t from = (at.head * sum_chunks(p.rows) + at.first_row / 32) * 64;
        copy_bytes(sums[place], p.sums + from, kSums, full);
        if (pooled) copy_bytes(pooled_sums[place], p.pooled_sums + from, kSums, full);
        if (block) {
          const int head = p.q_block_heads == p.H ? at.h : at.hk;
          copy_bytes(q_block[turn % 2], p.q_block_of(at.b, head, at.x), p.D * 4, full);
        }
      }
      __syncwarp();
    };
    const auto end = [&](int turn) {
      const int place = turn % kPlaces;
      if (turn >= kPlaces) barrier_wait(&rows_empty[place], turn / kPlaces - 1 & 1);
      if (producer.lane == 0) work[place].rows = 0;
      barrier_arrive(&rows_full[place]);
    };
    const auto nothing = [] {};
    producer.template run_all<kPlaces>(queue, fetch_rows, nothing, nothing, end);
  }
};

}  // namespace mra::cuda::sm90
