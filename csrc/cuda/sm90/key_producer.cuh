// The warp that fetches ahead the keys that tiles of rows attend, in a ring (keys.cuh).
#pragma once

#include "keys.cuh"
#include "queue.cuh"

namespace mra::cuda::sm90 {

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
  // Its exact keys, in copies of run() of them, 32 copies a window. A lane has one of each window:
  // where its keys start (p.M: none, zeros from beyond the end), and its block in the window
  // behind; -1: none. `whole`: one bit a copy whose keys all count for all rows, if they aren't
  // masked.
  int first, behind;
  uint32_t whole;
  int turn = 0;                    // tiles of rows before this one
  int stage = 0, empty_phase = 1;  // the next place; at first every place is empty
  const int lane, log2_run;        // of the keys of one copy

  __device__ KeyProducer(const Problem& p, const KeyMaps& maps, Ring& s, uint32_t* bitmaps,
                         unsigned item)
      : p(p),
        maps(maps),
        s(s),
        bitmaps(bitmaps),
        at(p, maps, item),
        lane(threadIdx.x % 32),
        log2_run(min(p.log2_block_k, 6)) {}

  __device__ __forceinline__ int run() const { return 1 << log2_run; }
  __device__ __forceinline__ int runs() const { return kKeys >> log2_run; }  // copies a tile
  // Which of its window is the first copy of tile `tile` (of the exact ones).
  __device__ __forceinline__ int copy_of(int tile) const { return tile * runs() % 32; }

  // The block of this lane's copy in window `w` of a list.
  __device__ int block_of(const List& list, int w) const {
    const int i = 32 * w + lane << log2_run >> p.log2_block_k;
    return i < list.count ? list.entries[i] : -1;
  }
  // On to window `w`, whose blocks are `block`.
  __device__ void open_window(int w, int block) {
    const bool valid = static_cast<unsigned>(block) < static_cast<unsigned>(p.nk);
    const int within = (lane << log2_run) & (p.block_k - 1);
    first = valid ? (block << p.log2_block_k) + within : p.M;
    const int last = first + run() - 1;
    whole = __ballot_sync(0xffffffffu,
                          last < p.M && (!p.causal || last <= at.first_row) && p.scale > 0.f);
    behind = block_of(at.list, w + 1);
  }
  // Before what is asked of tile `tile`.
  __device__ void move_window(int tile) {
    if (copy_of(tile) == 0) open_window(tile * runs() / 32, behind);
  }

  __device__ uint32_t* bitmap(int turn) const { return bitmaps + turn % 2 * ((p.nk + 31) / 32); }

  // block: block_of(rows.list, 0).
  __device__ void mark_selected(const Rows& rows, int block, int turn) {
    if (rows.pooled_tiles == 0) return;
    uint32_t* bits = bitmap(turn);
    for (int i = lane; i < (p.nk + 31) / 32; i += 32) bits[i] = 0;
    __syncwarp();
    for (int i = lane; i < rows.list.count; i += 32) {
      const unsigned y = i < 32 && p.log2_block_k <= 6 ? block : rows.list.entries[i];
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
    fetch(maps.pooled_k_map, maps.pooled_v_map, lane, kKeys / 64, 64, y0 + 64 * lane);
  }

  // Key i of a tile whose first copy in the window is `copy`.
  __device__ int key_of(int copy, int i) const {
    return __shfl_sync(0xffffffffu, first, copy + (i >> log2_run)) + (i & (run() - 1));
  }

  // Bytes of the mask for two keys of a tile, 32 apart; of another one where there is no such key.
  // Nothing is done with them before they are there.
  __device__ void look_up_mask(int tile, int (&mask)[kKeys / 32]) const {
    const uint8_t* from[kKeys / 32];  // all before the first is read: a shuffle waits for reads
#pragma unroll
    for (int half = 0; half < kKeys / 32; ++half) {
      const int j = min(key_of(copy_of(tile), lane + 32 * half), p.M - 1);
      from[half] = p.key_mask + static_cast<int64_t>(at.b) * p.M + j;
    }
#pragma unroll
    for (int half = 0; half < kKeys / 32; ++half) mask[half] = *from[half];
  }

  // mask: what look_up_mask found; all ones without one.
  __device__ void fetch_listed(int tile, const int (&mask)[kKeys / 32]) {
    const int copy = copy_of(tile);
    bool plain = (~whole >> copy & (1u << runs()) - 1) == 0;
    if (p.key_mask != nullptr) plain &= __all_sync(0xffffffffu, mask[0] != 0 && mask[1] != 0);
    if (!plain) {
#pragma unroll
      for (int half = 0; half < kKeys / 32; ++half) {
        const int i = lane + 32 * half, j = key_of(copy, i);
        s.bias[stage][i] = j < p.M && mask[half] != 0 ? 0.f : -INFINITY;
        if (i % 16 == 0) s.first[stage][i / 16] = j;
      }
    }
    if (lane == 0) s.plain[stage] = plain;
    fetch(maps.k_map, maps.v_map, lane - copy, runs(), run(), first);
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

  // The lanes whose `copy` is one of a tile's `copies` fetch `rows` keys and values each, from
  // `from` on. What the warp wrote for the stage is seen by whoever waits for its keys.
  __device__ void fetch(const CUtensorMap& k, const CUtensorMap& v, int copy, int copies, int rows,
                        int from) {
    const auto start = [&](const CUtensorMap& map, uint64_t* full,
                           uint16_t(&to)[kPanels][kKeys][64]) {
      barrier_expect(full, kKeys * DP * 2);
      if (static_cast<unsigned>(copy) >= static_cast<unsigned>(copies)) return;
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        copy_panel(to[i][rows * copy], map, full, 64 * i, from, at.hk, at.b);
      }
    };
    start(k, &s.k_full[stage], s.k[stage]);
    wait_for_values();
    start(v, &s.v_full[stage], s.v[stage]);
    advance();
  }

  // fetch_rows(tile, turn) fetches what belongs to a tile of rows alone into one of kPlaces places,
  // fetch_first() what comes before its keys in the ring, fetch_last() what comes behind them;
  // end(turn) tells the consumers that no tile follows.
  template <int kPlaces, class Queue, class FetchRows, class FetchFirst, class FetchLast, class End>
  __device__ void run_all(Queue queue, FetchRows fetch_rows, FetchFirst fetch_first,
                          FetchLast fetch_last, End end) {
    if (!queue.has_item()) return end(0);
    at.settle(p);
    int block = block_of(at.list, 0);  // of the next tile of rows
    mark_selected(at, block, 0);
    fetch_rows(at, 0);
#pragma unroll 1
    for (; queue.has_item(); queue.advance(), ++turn) {
      // On their way: counts of the next pooled tile, the mask of the next exact one.
      int counts[kKeys / 32], mask[kKeys / 32] = {1, 1};
      open_window(0, block);
      look_up_counts(0, counts);
      if (p.key_mask != nullptr) look_up_mask(0, mask);
      const bool more = queue.has_next();
      Rows next_rows(p, maps, more ? queue.next : 0);
      queue.ask();
      // The next tile of rows is fetched while this one's keys arrive: once the ring has gone
      // round, as then the consumers have left the tile before.
      const int early = kPlaces > 1 ? min(at.tiles, kStages + 1) : at.tiles;
      fetch_first();
#pragma unroll 1
      for (int tile = 0;; ++tile) {
        if (tile == min(early, 1)) {
          next_rows.settle(p);
          block = block_of(next_rows.list, 0);
        }
        if (tile == early && more) {
          mark_selected(next_rows, block, turn + 1);
          fetch_rows(next_rows, turn + 1);
        }
        if (tile == at.tiles) break;
        const int exact = tile - at.pooled_tiles;
        wait_for_keys();
        if (exact < 0) {
          fetch_pooled(tile, counts);
          look_up_counts(tile + 1, counts);
        } else {
          fetch_listed(exact, mask);
          move_window(exact + 1);
          if (p.key_mask != nullptr) look_up_mask(exact + 1, mask);
        }
      }
      fetch_last();
      at = next_rows;
    }
    end(turn);
  }
};

}  // namespace mra::cuda::sm90
