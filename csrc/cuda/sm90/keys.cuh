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

struct ForwardMaps : ForwardParams {
  int items;  // tiles of rows in all
  CUtensorMap q_map, k_map, v_map, pooled_k_map, pooled_v_map, out_map;
};

// Measured choices (docs/kernels.md): keys a tile, stages of the ring, blocks of threads a
// multiprocessor.
template <int DP>
struct ForwardTraits {
#ifdef MRA_KEYS
  static constexpr int kKeys = MRA_KEYS, kStages = MRA_STAGES, kBlocks = MRA_BLOCKS;
#else
  static constexpr int kKeys = 64, kStages = DP == 64 ? 3 : 2, kBlocks = DP == 64 ? 3 : 2;
#endif
  static constexpr int kRows = 64, kThreads = 160;
#ifdef MRA_PERSIST
  static constexpr bool kPersistent = MRA_PERSIST;
#else
  static constexpr bool kPersistent = false;
#endif
};

// A tile of rows and the keys that it attends.
struct ForwardTile {
  int b, h, hk, first_row, rows, pooled_blocks, pooled_tiles, tiles;
  int64_t list_at;
  List list;

  __device__ ForwardTile(const ForwardParams& p, unsigned item, int tile_rows, int tile_keys) {
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

// What the consumers are told of a tile.
struct ForwardWork {
  int b, h, first_row, rows, pooled_tiles, tiles;
  float state_lse;
};

template <int DP>
struct ForwardShared {
  using Traits = ForwardTraits<DP>;
  static constexpr int kKeys = Traits::kKeys, kStages = Traits::kStages, kPanels = DP / 64;
  uint16_t q[2][kPanels][64][64];  // also the output on its way to memory
  uint16_t k[kStages][kPanels][kKeys][64];
  uint16_t v[kStages][kPanels][kKeys][64];
  float state_mean[2][DP];
  ForwardWork work[2];
  float bias[kStages][kKeys];      // log2 units; read where a tile is not plain
  int first[kStages][kKeys / 16];  // first key of each sixteen, under causal
  int plain[kStages];
  uint64_t q_full[2], q_empty[2];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  uint32_t bitmap[1];  // [ceil(nk / 32)]: selected key blocks, with pooled keys only
};

template <int DP>
struct ForwardProducer {
  using Shared = ForwardShared<DP>;
  static constexpr int kKeys = Shared::kKeys, kStages = Shared::kStages, kPanels = Shared::kPanels;

  const ForwardMaps& p;
  Shared& s;
  ForwardTile at;
  int fetched = 0;            // tiles of keys so far
  const int lane, run, runs;  // run: keys of one copy, runs: copies a tile

  __device__ ForwardProducer(const ForwardMaps& p, Shared& s)
      : p(p),
        s(s),
        at(p, blockIdx.x, 64, kKeys),
        lane(threadIdx.x % 32),
        run(min(p.block_k, 64)),
        runs(kKeys / run) {}

  // The selected block that this lane's copy of tile `tile` (of the exact ones) reads; -1: none.
  __device__ int block_of(int tile) const {
    const int entry = (tile * runs + lane) * run >> p.log2_block_k;
    return lane < runs && entry < at.list.count ? at.list.entries[entry] : -1;
  }

  __device__ void mark_selected() {
    for (int i = lane; i < (p.nk + 31) / 32; i += 32) s.bitmap[i] = 0;
    __syncwarp();
    for (int i = lane; i < at.list.count; i += 32) {
      const unsigned y = at.list.entries[i];
      if (y < static_cast<unsigned>(p.nk)) atomicOr(s.bitmap + y / 32, 1u << y % 32);
    }
    __syncwarp();
  }

  __device__ void fetch_pooled(int tile, int stage) {
    const int y0 = tile * kKeys;
#pragma unroll
    for (int i = lane; i < kKeys; i += 32) {
      const int y = y0 + i;
      float bias = -INFINITY;
      if (y < at.pooled_blocks && !(s.bitmap[y / 32] >> y % 32 & 1)) {
        bias = log2f(static_cast<float>(p.key_count[static_cast<int64_t>(at.b) * p.nk + y]));
      }
      s.bias[stage][i] = bias;
    }
    if (lane == 0) s.plain[stage] = 0;
    for (int i = lane; i < kKeys / 16; i += 32) s.first[stage][i] = INT_MIN / 2;
    fetch(p.pooled_k_map, p.pooled_v_map, kKeys / 64, 64, y0 + 64 * lane);
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
    fetch(p.k_map, p.v_map, runs, run, first);
  }

  // Lane i < copies fetches `rows` keys and values from `from` on. What the warp wrote for the
  // stage is seen by whoever waits for its keys.
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

  // Tells the consumers of the tile of rows, and fetches what belongs to it alone.
  __device__ void fetch_rows(int slot) {
    const bool state = p.state_mean != nullptr;
    if (lane == 0) {
      s.work[slot] = {at.b,
                      at.h,
                      at.first_row,
                      at.rows,
                      at.pooled_tiles,
                      at.tiles,
                      state ? p.state_lse[at.list_at] : 0.f};
      barrier_expect(&s.q_full[slot], 64 * DP * 2 + (state ? p.D * 4 : 0));
      for (int i = 0; i < kPanels; ++i) {
        copy_panel(s.q[slot][i], p.q_map, &s.q_full[slot], 64 * i, at.first_row, at.h, at.b);
      }
      if (state) {
        copy_bytes(s.state_mean[slot], p.state_mean + at.list_at * p.D, p.D * 4, &s.q_full[slot]);
      }
    }
    __syncwarp();
  }

  __device__ void run_all() {
    int turn = 0;
#pragma unroll 1
    for (unsigned item = blockIdx.x; item < p.items; item += gridDim.x, ++turn) {
      const int slot = turn % 2;
      if (turn >= 2) barrier_wait(&s.q_empty[slot], turn / 2 - 1 & 1);
      fetch_rows(slot);
      if (at.pooled_tiles > 0) mark_selected();
      int block = block_of(0);
      // The list of the next tile of rows is looked up while this one's keys arrive.
      const unsigned next_item = item + gridDim.x < p.items ? item + gridDim.x : item;
      const ForwardTile next_rows(p, next_item, 64, kKeys);
#pragma unroll 1
      for (int tile = 0; tile < at.tiles; ++tile) {
        const int stage = fetched % kStages, listed = tile - at.pooled_tiles;
        const int next = listed >= 0 ? block_of(listed + 1) : block;
        if (fetched >= kStages) barrier_wait(&s.k_empty[stage], fetched / kStages - 1 & 1);
        if (listed < 0)
          fetch_pooled(tile, stage);
        else
          fetch_listed(listed, stage, block);
        block = next;
      }
      at = next_rows;
    }
  }
};

}  // namespace mra::cuda::sm90
