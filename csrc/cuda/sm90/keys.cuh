// What one warp of each block of threads fetches ahead for the others: tiles of 64 rows, and the
// keys that each attends as one stream of tiles of kKeys keys, first the pooled keys of key blocks
// that are not selected, then the keys of the selected blocks, gathered by the row list.
//
// A key comes with a bias in log2 units: log2 of the number of keys it stands for, or -inf where it
// has no weight. A `plain` tile needs none: every key is there and counts once, for every row.
#pragma once

#include "../sm80/tile.cuh"
#include "tma.cuh"

namespace mra::cuda::sm90 {

struct KeyMaps {
  CUtensorMap k_map, v_map, pooled_k_map, pooled_v_map;

  // False where a tensor has no map.
  bool set(const Problem& p, Dtype dtype) {
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
inline size_t bitmap_bytes(const Problem& p) {
  return p.pooled_k != nullptr ? 2 * ((p.nk + 31) / 32) * 4 : 0;
}

// A tile of rows and the keys that it attends.
struct RowTile {
  int b, h, hk, first_row, rows, pooled_blocks, pooled_tiles, tiles;
  int64_t list_at;
  List list;

  __device__ RowTile(const Problem& p, unsigned item, int tile_rows, int tile_keys) {
    const unsigned row_tiles = (p.rows + tile_rows - 1) / tile_rows;
    // Under causal the last tiles have most keys: start them first.
    const unsigned bh = item / row_tiles, from_start = item - bh * row_tiles;
    first_row = (p.causal ? row_tiles - 1 - from_start : from_start) * tile_rows;
    b = bh / static_cast<unsigned>(p.H);
    h = bh - b * p.H;
    hk = h / (p.H / p.Hk);
    rows = min(tile_rows, p.rows - first_row);
    const int64_t head = static_cast<int64_t>(b) * p.H + h;
    const int x = first_row / p.list_rows;
    list_at = head * p.row_lists.lists + x;
    list = list_of(p.row_lists, head, x);
    pooled_blocks = 0;
    if (p.pooled_k != nullptr) {
      const int64_t past = static_cast<int64_t>(x) * p.block_q >> p.log2_block_k;
      pooled_blocks = p.causal && past < p.nk ? static_cast<int>(past) : p.nk;
    }
    pooled_tiles = (pooled_blocks + tile_keys - 1) / tile_keys;
    const int64_t keys = static_cast<int64_t>(list.count) * p.block_k;
    tiles = pooled_tiles + static_cast<int>((keys + tile_keys - 1) / tile_keys);
  }
};

// Tiles of keys on their way to the consumers.
template <int DP, int kTileKeys, int kTiles>
struct KeyRing {
  static constexpr int kKeys = kTileKeys, kStages = kTiles, kPanels = DP / 64;
  uint16_t k[kStages][kPanels][kKeys][64];
  uint16_t v[kStages][kPanels][kKeys][64];
  float bias[kStages][kKeys];      // log2 units; read where a tile is not plain
  int first[kStages][kKeys / 16];  // first key of each sixteen, under causal
  int plain[kStages];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];

  // By one thread. Four warps read a tile.
  __device__ void init() {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&k_full[i], 1);
      barrier_init(&v_full[i], 1);
      barrier_init(&k_empty[i], 4);
      barrier_init(&v_empty[i], 4);
    }
  }

  // Scores of a tile that is not plain -> logits in log2 units. `row`: this lane's first.
  __device__ __forceinline__ void to_logits(float (&c)[kKeys / 8][4], int stage, float scale,
                                            bool causal, int row) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const float2 u = *reinterpret_cast<const float2*>(&bias[stage][8 * n + 2 * t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) c[n][i] = fmaf(c[n][i], scale, i % 2 ? u.y : u.x);
      if (causal) {
        const int key = first[stage][n / 2] + n % 2 * 8 + 2 * t;
        if (key > row) c[n][0] = -INFINITY;
        if (key + 1 > row) c[n][1] = -INFINITY;
        if (key > row + 8) c[n][2] = -INFINITY;
        if (key + 1 > row + 8) c[n][3] = -INFINITY;
      }
    }
  }
};

// Run by one warp.
template <int DP, class Ring>
struct KeyProducer {
  static constexpr int kKeys = Ring::kKeys, kStages = Ring::kStages, kPanels = Ring::kPanels;

  const Problem& p;
  const KeyMaps& maps;
  Ring& s;
  uint32_t* bitmaps;  // [2][ceil(nk / 32)]: selected key blocks, with pooled keys only
  RowTile at;
  int fetched = 0;            // tiles of keys so far
  const int lane, run, runs;  // run: keys of one copy, runs: copies a tile

  __device__ KeyProducer(const Problem& p, const KeyMaps& maps, Ring& s, uint32_t* bitmaps)
      : p(p),
        maps(maps),
        s(s),
        bitmaps(bitmaps),
        at(p, blockIdx.x, 64, kKeys),
        lane(threadIdx.x % 32),
        run(min(p.block_k, 64)),
        runs(kKeys / run) {}

  // The selected block that this lane's copy of tile `tile` (of the exact ones) reads; -1: none.
  __device__ int block_of(int tile) const {
    const int entry = (tile * runs + lane) * run >> p.log2_block_k;
    return lane < runs && entry < at.list.count ? at.list.entries[entry] : -1;
  }

  __device__ uint32_t* bitmap(int turn) const { return bitmaps + turn % 2 * ((p.nk + 31) / 32); }

  __device__ void mark_selected(uint32_t* bitmap, const List& list) {
    for (int i = lane; i < (p.nk + 31) / 32; i += 32) bitmap[i] = 0;
    __syncwarp();
    for (int i = lane; i < list.count; i += 32) {
      const unsigned y = list.entries[i];
      if (y < static_cast<unsigned>(p.nk)) atomicOr(bitmap + y / 32, 1u << y % 32);
    }
    __syncwarp();
  }

  // Counts of the key blocks that this lane has of pooled tile `tile`.
  __device__ void look_up_counts(int tile, int (&counts)[kKeys / 32]) const {
#pragma unroll
    for (int i = 0; i < kKeys / 32; ++i) {
      const int y = tile * kKeys + 32 * i + lane;
      counts[i] = y < at.pooled_blocks ? p.key_count[static_cast<int64_t>(at.b) * p.nk + y] : 0;
    }
  }

  __device__ void fetch_pooled(int tile, int stage, const uint32_t* bitmap,
                               const int (&counts)[kKeys / 32]) {
    const int y0 = tile * kKeys;
#pragma unroll
    for (int i = 0; i < kKeys / 32; ++i) {
      const bool there = y0 + 32 * i + lane < at.pooled_blocks;
      const bool selected = there && bitmap[y0 / 32 + i] >> lane & 1;
      s.bias[stage][32 * i + lane] =
          there && !selected ? log2_approx(static_cast<float>(counts[i])) : -INFINITY;
    }
    if (lane == 0) s.plain[stage] = 0;
    if (lane < kKeys / 16) s.first[stage][lane] = INT_MIN / 2;
    fetch(maps.pooled_k_map, maps.pooled_v_map, kKeys / 64, 64, y0 + 64 * lane);
  }

  __device__ void fetch_listed(int tile, int stage, int block) {
    const bool valid = static_cast<unsigned>(block) < static_cast<unsigned>(p.nk);
    const int within = (tile * runs + lane) * run & (p.block_k - 1);
    const int first = valid ? block * p.block_k + within : p.M;  // beyond the end: zeros
    const bool whole = lane >= runs || (first + run <= p.M && p.key_mask == nullptr &&
                                        (!p.causal || first + run - 1 <= at.first_row));
    const bool plain = __all_sync(0xffffffffu, whole);
    if (!plain) {
      for (int i = lane; i < kKeys; i += 32) {
        const int j = __shfl_sync(0xffffffffu, first, i / run) + i % run;
        const bool there =
            j < p.M && (p.key_mask == nullptr || p.key_mask[static_cast<int64_t>(at.b) * p.M + j]);
        s.bias[stage][i] = there ? 0.f : -INFINITY;
        if (i % 16 == 0) s.first[stage][i / 16] = j;
      }
    }
    if (lane == 0) s.plain[stage] = plain;
    fetch(maps.k_map, maps.v_map, runs, run, first);
  }

  // Two matrices of DP x DP that lie behind each other, the second one first: in the keys and the
  // values of one place of the ring or, of 128 columns, a panel in the keys and one in the values.
  __device__ void fetch_matrices(const CUtensorMap& map) {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      wait_for_keys();
      if (fetched >= kStages)
        barrier_wait(&s.v_empty[fetched % kStages], fetched / kStages - 1 & 1);
      const int stage = fetched % kStages, row = (kPanels - 1 - i) * DP;
      if (lane == 0) {
        barrier_expect(&s.k_full[stage], kKeys * DP * 2);
        barrier_expect(&s.v_full[stage], kKeys * DP * 2);
        for (int r = 0; r < DP; r += 64) {
          if (kPanels == 1) {
            copy_panel(s.k[stage], map, &s.k_full[stage], 0, DP, at.hk, at.b);
            copy_panel(s.v[stage], map, &s.v_full[stage], 0, 0, at.hk, at.b);
          } else {
            copy_panel(s.k[stage][r / 64], map, &s.k_full[stage], 0, row + r, at.hk, at.b);
            copy_panel(s.v[stage][r / 64], map, &s.v_full[stage], 64, row + r, at.hk, at.b);
          }
        }
      }
      __syncwarp();
      ++fetched;
    }
  }

  // Until the place of the next tile's keys is free.
  __device__ void wait_for_keys() {
    if (fetched >= kStages) barrier_wait(&s.k_empty[fetched % kStages], fetched / kStages - 1 & 1);
  }

  // Lane i < copies fetches `rows` keys and values from `from` on. What the warp wrote
  // for the stage is seen by whoever waits for its keys.
  __device__ void fetch(const CUtensorMap& k, const CUtensorMap& v, int copies, int rows,
                        int from) {
    const int stage = fetched % kStages;
    auto copy = [&](const CUtensorMap& map, uint64_t* full, uint16_t(&to)[kPanels][kKeys][64]) {
      __syncwarp();
      if (lane == 0) barrier_expect(full, kKeys * DP * 2);
      __syncwarp();
      if (lane >= copies) return;
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        copy_panel(to[i][rows * lane], map, full, 64 * i, from, at.hk, at.b);
      }
    };
    copy(k, &s.k_full[stage], s.k[stage]);
    if (fetched >= kStages) barrier_wait(&s.v_empty[stage], fetched / kStages - 1 & 1);
    copy(v, &s.v_full[stage], s.v[stage]);
    ++fetched;
  }

  // fetch_rows(tile, turn) fetches what belongs to a tile of rows alone, fetch_last() what comes
  // behind its keys.
  template <class FetchRows, class FetchLast>
  __device__ void run_all(unsigned items, FetchRows fetch_rows, FetchLast fetch_last) {
    int turn = 0;
#pragma unroll 1
    for (unsigned item = blockIdx.x; item < items; item += gridDim.x, ++turn) {
      fetch_rows(at, turn);
      if (turn == 0 && at.pooled_tiles > 0) mark_selected(bitmap(0), at.list);
      int block = block_of(0), counts[kKeys / 32];
      look_up_counts(0, counts);
      // The list of the next tile of rows is looked up while this one's keys arrive.
      const unsigned next_item = item + gridDim.x < items ? item + gridDim.x : item;
      const RowTile next_rows(p, next_item, 64, kKeys);
#pragma unroll 1
      for (int tile = 0; tile < at.tiles; ++tile) {
        const int stage = fetched % kStages, listed = tile - at.pooled_tiles;
        const int next = listed >= 0 ? block_of(listed + 1) : block;
        wait_for_keys();
        if (listed < 0) {
          fetch_pooled(tile, stage, bitmap(turn), counts);
          look_up_counts(tile + 1, counts);
        } else {
          fetch_listed(listed, stage, block);
        }
        block = next;
      }
      fetch_last();
      // While the keys that are on their way are attended.
      if (next_item != item && next_rows.pooled_tiles > 0)
        mark_selected(bitmap(turn + 1), next_rows.list);
      at = next_rows;
    }
  }
};

}  // namespace mra::cuda::sm90
