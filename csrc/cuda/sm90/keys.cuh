// What one warp of each block of threads fetches ahead for the others: tiles of rows, and the
// keys that each attends as one stream of tiles of kKeys keys, first the pooled keys of key blocks
// that are not selected, then the keys of the selected blocks, gathered by the row list.
//
// A key comes with a bias in log2 units: log2 of the number of keys it stands for, or -inf where it
// has no weight. A `plain` tile needs none: every key is there and counts once, for every row, and
// the largest score is the largest logit.
#pragma once

#include <algorithm>

#include "../sm80/tile.cuh"
#include "divisor.h"
#include "team.cuh"

namespace mra::cuda::sm90 {

struct KeyMaps {
  CUtensorMap k_map, v_map, pooled_k_map, pooled_v_map;
  // Tiles of rows a head; query heads, or batch entries by densities; heads of a key head.
  Divisor row_tiles, heads, group, list_rows;

  // For RowTile<rows, by_head>. False where a tensor has no map.
  bool set(const Problem& p, Dtype dtype, int rows, bool by_head = false) {
    row_tiles = Divisor((p.rows + rows - 1) / rows);
    heads = Divisor(by_head && p.by_head ? p.B : p.H);
    group = Divisor(p.H / p.Hk);
    list_rows = Divisor(p.list_rows);
    const int run = p.block_k < 64 ? p.block_k : 64;
    if (!tensor_map(&k_map, dtype, p.k, p.k_strides, p.B, p.Hk, p.M, p.D, run) ||
        !tensor_map(&v_map, dtype, p.v, p.v_strides, p.B, p.Hk, p.M, p.D, run)) {
      return false;
    }
    if (p.pooled_k == nullptr) return true;
    return means_map(&pooled_k_map, dtype, p.pooled_k, p.B, p.Hk, p.nk, p.D) &&
           means_map(&pooled_v_map, dtype, p.pooled_v, p.B, p.Hk, p.nk, p.D);
  }
};

// Bytes behind the shared memory of a kernel that reads pooled keys: see KeyProducer::bitmap.
__host__ __device__ inline int bitmap_bytes(const Problem& p) {
  return p.pooled_k != nullptr ? 2 * ((p.nk + 31) / 32) * 4 : 0;
}

// launch_teams for tiles of rows.
template <class Shared, class Traits, int kTeams = 1, class Maps>
cudaError_t launch_tiles(void (*kernel)(Maps), const Maps& p, const Device& device,
                         cudaStream_t stream) {
  return launch_teams<Shared, Traits, kTeams>(kernel, p, device, stream, Together{}, bitmap_bytes(p));
}

// A tile of kRows rows, which share list x, and the keys that it attends, 64 a tile. kByHead: heads
// with densities of their own come by these.
template <int kRows, bool kByHead>
struct RowTile {
  int b, h, hk, x, first_row, rows, pooled_blocks, pooled_tiles, tiles;
  int64_t head;
  ListPlace place;
  List list;

  // Asks where the list lies; what follows from that is there once settled.
  __device__ RowTile(const Problem& p, const KeyMaps& maps, unsigned item) {
    // Under causal the last tiles have most keys: start them first.
    const unsigned bh = maps.row_tiles.divide(item), from_start = item - bh * maps.row_tiles.d;
    first_row = (p.causal ? maps.row_tiles.d - 1 - from_start : from_start) * kRows;
    if constexpr (kByHead) {
      const unsigned outer = maps.heads.divide(bh), inner = bh - outer * maps.heads.d;
      b = p.by_head ? inner : outer;
      h = p.by_head ? p.head_order[outer] : inner;
    } else {
      b = maps.heads.divide(bh);
      h = bh - b * p.H;
    }
    hk = maps.group.divide(h);
    rows = min(kRows, p.rows - first_row);
    head = kByHead ? static_cast<int64_t>(b) * p.H + h : bh;
    x = maps.list_rows.divide(first_row);
    place = place_of_list(p.row_lists, head, x);
  }
  // At most 32 pooled keys, but some: half of a tile.
  __device__ bool few_pooled() const { return pooled_blocks - 1u < 32u; }

  __device__ void settle(const Problem& p) {
    list = list_at(p.row_lists, head, place);
    pooled_blocks = 0;
    if (p.pooled_k != nullptr) {
      const int64_t past = static_cast<int64_t>(x) * p.block_q >> p.log2_block_k;
      pooled_blocks = p.causal && past < p.nk ? static_cast<int>(past) : p.nk;
    }
    pooled_tiles = (pooled_blocks + 63) / 64;
    tiles =
        pooled_tiles + static_cast<int>((static_cast<int64_t>(list.count) * p.block_k + 63) / 64);
  }
};

// Tiles of keys on their way to the kWarps warps that attend them.
template <int DP, int kTiles, int kWarps, bool kByHead = false>
struct KeyRing {
  using Rows = RowTile<16 * kWarps, kByHead>;
  static constexpr int kKeys = 64, kStages = kTiles, kRows = 16 * kWarps, kPanels = DP / 64;
  uint16_t k[kStages][kPanels][kKeys][64];
  uint16_t v[kStages][kPanels][kKeys][64];
  float bias[kStages][kKeys];      // log2 units; read where a tile is not plain
  int first[kStages][kKeys / 16];  // first key of each sixteen, under causal
  int plain[kStages];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];

  // By one thread.
  __device__ void init() {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&k_full[i], 1);
      barrier_init(&v_full[i], 1);
      barrier_init(&k_empty[i], kWarps);
      barrier_init(&v_empty[i], kWarps);
    }
  }

  // Scores of a tile that is not plain -> logits in log2 units. `row`: this lane's first.
  template <int kScores>
  __device__ __forceinline__ void to_logits(float (&c)[kScores][4], int stage, float scale,
                                            bool causal, int row) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kScores; ++n) {
      const float2 u = *reinterpret_cast<const float2*>(&bias[stage][8 * n + 2 * t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) c[n][i] = fmaf(c[n][i], scale, i % 2 ? u.y : u.x);
    }
    if (!causal) return;
#pragma unroll
    for (int n = 0; n < kScores; ++n) {
      const int key = first[stage][n / 2] + n % 2 * 8 + 2 * t;
      if (key > row) c[n][0] = -INFINITY;
      if (key + 1 > row) c[n][1] = -INFINITY;
      if (key > row + 8) c[n][2] = -INFINITY;
      if (key + 1 > row + 8) c[n][3] = -INFINITY;
    }
  }
};

}  // namespace mra::cuda::sm90
