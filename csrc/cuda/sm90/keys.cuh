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
#include "queue.cuh"
#include "tma.cuh"

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
inline size_t bitmap_bytes(const Problem& p) {
  return p.pooled_k != nullptr ? 2 * ((p.nk + 31) / 32) * sizeof(uint32_t) : 0;
}

// Launches persistent blocks of threads over the items of `p`, each with a Shared.
template <class Shared, class Traits, class Maps>
cudaError_t launch_tiles(void (*kernel)(Maps), const Maps& p, const Device& device,
                         cudaStream_t stream) {
  const size_t bytes = sizeof(Shared) + 1024 + bitmap_bytes(p);
  if (bytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
  const int blocks = std::min(p.items, Traits::kBlocks * device.sms);
  return launch_grid(kernel, blocks, Traits::kThreads, bytes, stream, p);
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

// Run by one warp.
template <int DP, class Ring>
struct KeyProducer {
  static constexpr int kKeys = Ring::kKeys, kStages = Ring::kStages, kPanels = Ring::kPanels;
  using Rows = typename Ring::Rows;

  const Problem& p;
  const KeyMaps& maps;
  Ring& s;
  uint32_t* bitmaps;  // [2][ceil(nk / 32)]: selected key blocks, with pooled keys only
  Rows at;
  // 32 entries of its list, one a lane: those that hold the next tile's, and the ones behind them.
  int window, behind, windows = 0;  // windows: before this one
  int turn = 0;                     // tiles of rows before this one
  int stage = 0, empty_phase = 1;   // the next place; at first every place is empty
  const int lane, log2_run;         // of the keys of one copy

  __device__ KeyProducer(const Problem& p, const KeyMaps& maps, Ring& s, uint32_t* bitmaps)
      : p(p),
        maps(maps),
        s(s),
        bitmaps(bitmaps),
        at(p, maps, blockIdx.x),
        lane(threadIdx.x % 32),
        log2_run(min(p.log2_block_k, 6)) {}

  __device__ __forceinline__ int run() const { return 1 << log2_run; }
  __device__ __forceinline__ int runs() const { return kKeys >> log2_run; }  // copies a tile

  // Entries of a list from `first` on, one a lane; -1: none.
  __device__ int entries_from(const List& list, int first) const {
    return first + lane < list.count ? list.entries[first + lane] : -1;
  }
  // Where this lane's copy of tile `tile` (of the exact ones) starts among the listed keys.
  __device__ int place_of(int tile) const { return tile * kKeys + (lane << log2_run); }
  // The list entry that this lane's copy of tile `tile` (of the exact ones) reads.
  __device__ int entry_of(int tile) const { return place_of(tile) >> p.log2_block_k; }
  // The selected block there, of the next tile; -1: none.
  __device__ int block_of(int tile) const {
    const int block = __shfl_sync(0xffffffffu, window, entry_of(tile) % 32);
    return lane < runs() ? block : -1;
  }
  // Before block_of(tile).
  __device__ void move_window(int tile) {
    if (tile * kKeys >> p.log2_block_k >> 5 == windows) return;
    window = behind;
    behind = entries_from(at.list, 32 * (++windows + 1));
  }

  __device__ uint32_t* bitmap(int turn) const { return bitmaps + turn % 2 * ((p.nk + 31) / 32); }

  // entry: entries_from(rows.list, 0).
  __device__ void mark_selected(const Rows& rows, int entry, int turn) {
    if (rows.pooled_tiles == 0) return;
    uint32_t* bits = bitmap(turn);
    for (int i = lane; i < (p.nk + 31) / 32; i += 32) bits[i] = 0;
    __syncwarp();
    for (int i = lane; i < rows.list.count; i += 32) {
      const unsigned y = i < 32 ? entry : rows.list.entries[i];
      if (y < static_cast<unsigned>(p.nk)) atomicOr(bits + y / 32, 1u << y % 32);
    }
    __syncwarp();
  }

  // Counts of the key blocks that this lane has of pooled tile `tile`.
  __device__ void look_up_counts(int tile, int (&counts)[kKeys / 32]) const {
#pragma unroll
    for (int i = 0; i < kKeys / 32; ++i) {
      const int y = tile * kKeys + 32 * i + lane;
      counts[i] = y < at.pooled_blocks ? masses_of(p, at.b, at.hk)[y] : 0;
    }
  }

  __device__ void fetch_pooled(int tile, const int (&counts)[kKeys / 32]) {
    const int y0 = tile * kKeys;
#pragma unroll
    for (int i = 0; i < kKeys / 32; ++i) {
      const bool there = y0 + 32 * i + lane < at.pooled_blocks;
      const bool selected = there && bitmap(turn)[y0 / 32 + i] >> lane & 1;
      s.bias[stage][32 * i + lane] =
          there && !selected ? log2_approx(mass_of(p, counts[i])) : -INFINITY;
    }
    if (lane == 0) s.plain[stage] = 0;
    if (lane < kKeys / 16) s.first[stage][lane] = INT_MIN / 2;
    fetch(maps.pooled_k_map, maps.pooled_v_map, kKeys / 64, 64, y0 + 64 * lane);
  }

  // First key of this lane's copy of tile `tile`, from `block`; p.M: none, zeros from beyond the
  // end.
  __device__ int first_of(int tile, int block) const {
    const bool valid = static_cast<unsigned>(block) < static_cast<unsigned>(p.nk);
    const int within = place_of(tile) & (p.block_k - 1);
    return valid ? block * p.block_k + within : p.M;
  }

  // Key i of a tile whose copies start at `first` of each lane.
  __device__ int key_of(int first, int i) const {
    return __shfl_sync(0xffffffffu, first, i >> log2_run) + (i & (run() - 1));
  }

  // Bytes of the mask for two keys of a tile, 32 apart; of another one where there is no such key.
  // Nothing is done with them before they are there.
  __device__ void look_up_mask(int tile, int block, int (&mask)[kKeys / 32]) const {
    const int first = first_of(tile, block);
    const uint8_t* from[kKeys / 32];  // all before the first is read: a shuffle waits for reads
#pragma unroll
    for (int half = 0; half < kKeys / 32; ++half) {
      const int j = min(key_of(first, lane + 32 * half), p.M - 1);
      from[half] = p.key_mask + static_cast<int64_t>(at.b) * p.M + j;
    }
#pragma unroll
    for (int half = 0; half < kKeys / 32; ++half) mask[half] = *from[half];
  }

  // mask: what look_up_mask found; all ones without one.
  __device__ void fetch_listed(int tile, int block, const int (&mask)[kKeys / 32]) {
    const int first = first_of(tile, block);
    const bool whole = lane >= runs() ||
                       (first + run() <= p.M && (!p.causal || first + run() - 1 <= at.first_row));
    const bool plain =
        __all_sync(0xffffffffu, whole && mask[0] != 0 && mask[1] != 0) && p.scale > 0.f;
    if (!plain) {
#pragma unroll
      for (int half = 0; half < kKeys / 32; ++half) {
        const int i = lane + 32 * half, j = key_of(first, i);
        s.bias[stage][i] = j < p.M && mask[half] != 0 ? 0.f : -INFINITY;
        if (i % 16 == 0) s.first[stage][i / 16] = j;
      }
    }
    if (lane == 0) s.plain[stage] = plain;
    fetch(maps.k_map, maps.v_map, runs(), run(), first);
  }

  // A pair of matrices of DP x DP, C and Sigma, Sigma first: among the keys and the values of one
  // place of the ring or, of 128 columns, a panel among the keys and one among the values.
  __device__ void fetch_matrices(const CUtensorMap& map) {
    if (kPanels == 1) return fetch_panels(map, kSigma, kC);
    fetch_sigma(map);
    fetch_c(map);
  }

  // One of them alone, where fetch_matrices puts it.
  __device__ void fetch_sigma(const CUtensorMap& map) {
    fetch_panels(map, kSigma, kPanels == 1 ? kNothing : kSigma);
  }
  __device__ void fetch_c(const CUtensorMap& map) {
    fetch_panels(map, kPanels == 1 ? kNothing : kC, kC);
  }

  // To the next place a panel of a matrix among the keys, and one among the values. A half that
  // gets nothing goes round all the same, so that keys and values stay in step: its barriers are
  // passed by both sides, with no bytes to wait for.
  static constexpr int kC = 0, kSigma = 1, kNothing = -1;
  __device__ void fetch_panels(const CUtensorMap& map, int of_keys, int of_values) {
    wait_for_keys();
    wait_for_values();
    const auto copy = [&](int matrix, int column, uint64_t* full,
                          uint16_t(&to)[kPanels][kKeys][64]) {
      barrier_expect(full, matrix == kNothing ? 0 : kKeys * DP * 2);
      if (matrix == kNothing || lane != 0) return;
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        copy_panel(to[i], map, full, column, 64 * i, 2 * at.hk + matrix, at.b);
      }
    };
    copy(of_keys, 0, &s.k_full[stage], s.k[stage]);
    copy(of_values, 64 * (kPanels - 1), &s.v_full[stage], s.v[stage]);
    __syncwarp();
    advance();
  }

  __device__ void advance() {
    if (kStages == 1 || ++stage == kStages) stage = 0, empty_phase ^= 1;
  }

  // Until the place of the next tile's keys is free, and that of its values.
  __device__ void wait_for_keys() { barrier_wait(&s.k_empty[stage], empty_phase); }
  __device__ void wait_for_values() { barrier_wait(&s.v_empty[stage], empty_phase); }

  // Lane i < copies fetches `rows` keys and values from `from` on. What the warp wrote
  // for the stage is seen by whoever waits for its keys.
  __device__ void fetch(const CUtensorMap& k, const CUtensorMap& v, int copies, int rows,
                        int from) {
    auto copy = [&](const CUtensorMap& map, uint64_t* full, uint16_t(&to)[kPanels][kKeys][64]) {
      barrier_expect(full, kKeys * DP * 2);
      if (lane >= copies) return;
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        copy_panel(to[i][rows * lane], map, full, 64 * i, from, at.hk, at.b);
      }
    };
    copy(k, &s.k_full[stage], s.k[stage]);
    wait_for_values();
    copy(v, &s.v_full[stage], s.v[stage]);
    advance();
  }

  // fetch_rows(tile, turn) fetches what belongs to a tile of rows alone into one of kPlaces places,
  // fetch_first() what comes before its keys in the ring, fetch_last() what comes behind them;
  // end(turn) tells the consumers that no tile follows.
  template <int kPlaces, class Items, class FetchRows, class FetchFirst, class FetchLast, class End>
  __device__ void run_all(const Items& items, FetchRows fetch_rows, FetchFirst fetch_first,
                          FetchLast fetch_last, End end) {
    WorkQueue queue(items);
    at.settle(p);
    window = entries_from(at.list, 0);
    mark_selected(at, window, 0);
    fetch_rows(at, 0);
#pragma unroll 1
    for (; queue.has_item(); queue.advance(), ++turn) {
      // On their way: counts of the next pooled tile, the mask of the next exact one.
      int counts[kKeys / 32], mask[kKeys / 32] = {1, 1};
      windows = 0;
      behind = entries_from(at.list, 32);
      look_up_counts(0, counts);
      if (p.key_mask != nullptr) look_up_mask(0, block_of(0), mask);
      const bool more = queue.has_next();
      Rows next_rows(p, maps, more ? queue.next : 0);
      queue.ask();
      int next_window;
      // The next tile of rows is fetched while this one's keys arrive: once the ring has gone
      // round, as then the consumers have left the tile before.
      const int early = kPlaces > 1 ? min(at.tiles, kStages + 1) : at.tiles;
      fetch_first();
#pragma unroll 1
      for (int tile = 0;; ++tile) {
        if (tile == min(early, 1)) {
          next_rows.settle(p);
          next_window = entries_from(next_rows.list, 0);
        }
        if (tile == early && more) {
          mark_selected(next_rows, next_window, turn + 1);
          fetch_rows(next_rows, turn + 1);
        }
        if (tile == at.tiles) break;
        const int exact = tile - at.pooled_tiles;
        wait_for_keys();
        if (exact < 0) {
          fetch_pooled(tile, counts);
          look_up_counts(tile + 1, counts);
        } else {
          fetch_listed(exact, block_of(exact), mask);
          move_window(exact + 1);
          if (p.key_mask != nullptr) look_up_mask(exact + 1, block_of(exact + 1), mask);
        }
      }
      fetch_last();
      at = next_rows;
      window = next_window;
    }
    end(turn);
  }
};

}  // namespace mra::cuda::sm90
