// The keys that a tile of rows attends, as one stream of tiles of kKeys keys, double-buffered:
// first the pooled keys of every key block that is not selected, then the keys of the selected
// blocks, gathered by the row list. A tile is put together from runs of 16 consecutive keys
// (granules), each copied by one warp.
//
// A key comes with a bias in log2 units: log2 of the number of keys it stands for, or -inf where it
// has no weight. A `plain` tile needs none: every key is there and counts once, for every row, and
// the largest score is the largest logit.
//
// The forward and the row backward kernel both read this stream. Selected blocks are skipped among
// the pooled keys by a bitmap when the tile's rows share one list, and by a cursor a row when each
// row has its own (the block-coarse part).
#pragma once

#include <climits>

#include "tile.cuh"

namespace mra::cuda {

template <typename T, int DP, int kKeys, int kWarps>
struct KeyStream {
  static constexpr int kLdK = kLd<T, DP>;
  static constexpr int kTile = kKeys * kLdK;
  static constexpr int kGranules = kKeys / 16;
  static constexpr float kNone = -INFINITY;

  const Problem& p;
  T* k_tiles;     // [2][kKeys][kLdK]
  T* v_tiles;     // [2][kKeys][kLdK]
  float* biases;  // [2][kKeys]
  int* granules;  // [2][kGranules]: first key of each granule, -1: none (tiles that aren't plain)
  uint2* row_masks;  // [2][rows of the tile]: keys that row r doesn't see (own lists only)
  uint32_t* bitmap;  // [ceil(nk / 32)]: selected key blocks (shared list only)

  int b, hk, first_row, rows, x;
  const T *k, *v, *pooled_k, *pooled_v;
  const int* masses;
  const int* list;
  int list_count, pooled_blocks, pooled_tiles, tiles;
  // The window of 32 granules that is being fetched, the same in every warp: this lane's granule.
  int window, granule;  // granule: its first key, -1: none
  unsigned whole;       // bit i: granule i is complete, and seen by every row
  int entry;            // list entry of this lane's granule of the next window, asked for early
  bool plain_fetched, plain;  // of the tile fetched last, of the tile whose turn it is
  // own lists: the cursor of row threadIdx.x
  const int *cursor, *cursor_end;
  int next, visible;

  static size_t shared_bytes(const Problem& p) {
    size_t bytes = sizeof(T) * 4 * kTile + sizeof(float) * 2 * kKeys + sizeof(int) * 2 * kGranules;
    if (p.pooled_k == nullptr) return bytes;
    return bytes +
           (p.list_rows == 1 ? sizeof(uint2) * 32 * kWarps : sizeof(uint32_t) * ((p.nk + 31) / 32));
  }

  __device__ KeyStream(const Problem& p, char* smem, int b, int h, int first_row, int rows)
      : p(p), b(b), hk(h / (p.H / p.Hk)), first_row(first_row), rows(rows) {
    k_tiles = reinterpret_cast<T*>(smem);
    v_tiles = k_tiles + 2 * kTile;
    biases = reinterpret_cast<float*>(v_tiles + 2 * kTile);
    row_masks = reinterpret_cast<uint2*>(biases + 2 * kKeys);
    bitmap = reinterpret_cast<uint32_t*>(row_masks);
    const bool pooled = p.pooled_k != nullptr, own_lists = p.list_rows == 1;
    uint32_t* end = bitmap;
    if (pooled) end += own_lists ? 64 * kWarps : (p.nk + 31) / 32;
    granules = reinterpret_cast<int*>(end);

    k = static_cast<const T*>(p.k) + b * p.k_strides.b + hk * p.k_strides.h;
    v = static_cast<const T*>(p.v) + b * p.v_strides.b + hk * p.v_strides.h;
    const int64_t pooled_head = (static_cast<int64_t>(b) * p.Hk + hk) * p.nk * p.D;
    pooled_k = static_cast<const T*>(p.pooled_k) + pooled_head;
    pooled_v = static_cast<const T*>(p.pooled_v) + pooled_head;

    masses = masses_of(p, b, hk);

    x = first_row / p.list_rows;
    const int64_t head = static_cast<int64_t>(b) * p.H + h;
    const List shared_list = list_of(p.row_lists, head, x);
    list = shared_list.entries;
    list_count = shared_list.count;
    // Blocks that the coarse part of these rows may see: (y + 1) bk <= x bq under causal.
    const int last_x = own_lists ? first_row + rows - 1 : x;
    pooled_blocks = pooled ? seen_blocks(last_x) : 0;
    pooled_tiles = (pooled_blocks + kKeys - 1) / kKeys;
    const int64_t keys = p.exact ? static_cast<int64_t>(list_count) * p.block_k : 0;
    tiles = pooled_tiles + static_cast<int>((keys + kKeys - 1) / kKeys);

    window = -1;
    plain_fetched = plain = false;
    entry = entry_of(0);
    if (pooled && own_lists) {
      cursor = cursor_end = nullptr;
      next = INT_MAX;
      visible = 0;
      if (static_cast<int>(threadIdx.x) < rows) {
        const List own = list_of(p.row_lists, head, x + threadIdx.x);
        cursor = own.entries;
        cursor_end = cursor + own.count;
        visible = seen_blocks(x + threadIdx.x);
        advance();
      }
    } else if (pooled) {
      for (int i = threadIdx.x; i < (p.nk + 31) / 32; i += 32 * kWarps) bitmap[i] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < list_count; i += 32 * kWarps) {
        const unsigned y = list[i];
        if (y < static_cast<unsigned>(p.nk)) atomicOr(bitmap + y / 32, 1u << y % 32);
      }
    }
    if (pooled) __syncthreads();
  }

  __device__ int seen_blocks(int x) const {
    if (!p.causal) return p.nk;
    return min(p.nk, static_cast<int>(static_cast<int64_t>(x) * p.block_q >> p.log2_block_k));
  }

  __device__ void advance() { next = cursor < cursor_end ? *cursor++ : INT_MAX; }

  // The list entry that this lane's granule of a window lies in, -1: none.
  __device__ int entry_of(int window) const {
    const int i = (32 * window + static_cast<int>(threadIdx.x % 32)) * 16 >> p.log2_block_k;
    return p.exact && i < list_count ? list[i] : -1;
  }

  __device__ void open_window() {
    ++window;
    const int y = entry;
    entry = entry_of(window + 1);
    granule = -1;
    if (static_cast<unsigned>(y) < static_cast<unsigned>(p.nk)) {
      const int at = static_cast<int>(threadIdx.x % 32) * 16;  // windows are multiples of a block
      const int key = (y << p.log2_block_k) + (at & (p.block_k - 1));
      if (key < p.M) granule = key;
    }
    whole = __ballot_sync(0xffffffffu, granule >= 0 && granule + 16 <= p.M &&
                                           !(p.causal && granule + 15 > first_row));
  }

  // First key of granule i of the tile being fetched; called by whole warps.
  __device__ int first_of(int tile, int i) const {
    return __shfl_sync(0xffffffffu, granule, ((tile - pooled_tiles) * kGranules + i) % 32);
  }

  // Starts the copies of a tile, if there is one: in the turn of the tile before it (or before the
  // first), with that one's keys seen by all threads and those of the one before no longer read.
  __device__ __forceinline__ void ahead(int tile) {
    plain = plain_fetched;
    plain_fetched = false;
    if (tile >= pooled_tiles && tile < tiles) {
      const int g = (tile - pooled_tiles) * kGranules % 32;
      if (g == 0) open_window();
      constexpr unsigned kAll = (1u << kGranules) - 1;
      plain_fetched = (whole >> g & kAll) == kAll && p.key_mask == nullptr && p.scale > 0.f;
    }
    if (plain_fetched && p.D == DP)
      fetch_plain(tile);
    else if (tile < tiles)
      fetch_any(tile);
    commit_copies();
  }

  // Calls copy(granule, of the values) for this warp's share of a tile.
  template <class Copy>
  __device__ __forceinline__ void share(Copy copy) {
    const int warp = warp_index();
#pragma unroll
    for (int n = 0; n < 2 * kGranules; n += kWarps) {
      const int job = n + warp;
      if (2 * kGranules % kWarps != 0 && job >= 2 * kGranules) break;
      copy(job % kGranules, kGranules % kWarps == 0 ? n >= kGranules : job >= kGranules);
    }
  }

  __device__ __forceinline__ void fetch_plain(int tile) {
    const int buffer = tile % 2 * kTile;
    share([&](int i, bool values) {
      SixteenRows<T, DP>::copy(
          (values ? v_tiles : k_tiles) + buffer + 16 * i * kLdK, values ? v : k,
          static_cast<int>(values ? p.v_strides.l : p.k_strides.l), first_of(tile, i));
    });
  }

  __device__ void fetch_any(int tile) {
    constexpr int kThreads = 32 * kWarps, kEach = (kKeys + kThreads - 1) / kThreads;
    const bool pooled = tile < pooled_tiles;
    // Counts or mask first: they arrive while the copies are started.
    int count[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) count[i] = keys_behind(tile, threadIdx.x + i * kThreads);

    const int buffer = tile % 2 * kTile;
    share([&](int i, bool values) {
      T* to = (values ? v_tiles : k_tiles) + buffer + 16 * i * kLdK;
      const int y = tile * kKeys + 16 * i, j = pooled ? y : first_of(tile, i);
      const int present = pooled ? pooled_blocks - y : j < 0 ? 0 : p.M - j;
      const T* from = pooled ? (values ? pooled_v : pooled_k) : (values ? v : k);
      const int stride = pooled ? p.D : static_cast<int>(values ? p.v_strides.l : p.k_strides.l);
      SixteenRows<T, DP>::copy_some(to, from, stride, j, present, p.D, p.q);
    });

    float* bias = biases + tile % 2 * kKeys;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int r = threadIdx.x + i * kThreads;
      if (r >= kKeys) continue;
      bias[r] = count[i] <= 0 ? kNone : pooled ? log2f(mass_of(p, count[i])) : 0.f;
    }
    if (!pooled && p.causal) {
      const int first = first_of(tile, threadIdx.x % kGranules);
      if (threadIdx.x < kGranules) granules[tile % 2 * kGranules + threadIdx.x] = first;
    }
    if (pooled && p.list_rows == 1 && threadIdx.x < 16 * kWarps) {
      row_masks[tile % 2 * (16 * kWarps) + threadIdx.x] = own_mask(tile * kKeys);
    }
  }

  // Bits of how many keys key r of a tile stands for, 0: it has no weight. Called by whole warps.
  __device__ int keys_behind(int tile, int r) const {
    if (tile < pooled_tiles) {
      const int y = tile * kKeys + r;
      if (r >= kKeys || y >= pooled_blocks) return 0;
      if (p.list_rows != 1 && (bitmap[y / 32] >> y % 32 & 1)) return 0;
      return masses[y];
    }
    const int first = first_of(tile, r / 16 % kGranules), j = first + r % 16;
    if (r >= kKeys || first < 0 || j >= p.M) return 0;
    return p.key_mask == nullptr || p.key_mask[static_cast<int64_t>(b) * p.M + j];
  }

  // Keys y0 .. y0 + kKeys - 1 that row threadIdx.x has selected or may not see yet.
  __device__ uint2 own_mask(int y0) {
    static_assert(kKeys <= 64);
    uint64_t mask = 0;
    for (; next < y0 + kKeys; advance()) {
      if (next >= y0) mask |= 1ull << (next - y0);
    }
    if (visible < y0 + kKeys) mask |= ~0ull << max(0, visible - y0);
    return make_uint2(static_cast<uint32_t>(mask), static_cast<uint32_t>(mask >> 32));
  }

  // Scores of a tile that is not plain, as a warp holds them -> logits in log2 units, -inf where a
  // key has no weight for the row. `row` is the first of the warp's 16 rows, counted from
  // first_row.
  template <int kTiles>
  __device__ __forceinline__ void to_logits(float (&s)[kTiles][4], int tile, int row,
                                            float scale_log2) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const float* bias = biases + tile % 2 * kKeys;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 c = *reinterpret_cast<const float2*>(bias + 8 * n + 2 * t);
      s[n][0] = fmaf(s[n][0], scale_log2, c.x);
      s[n][1] = fmaf(s[n][1], scale_log2, c.y);
      s[n][2] = fmaf(s[n][2], scale_log2, c.x);
      s[n][3] = fmaf(s[n][3], scale_log2, c.y);
    }
    if (tile < pooled_tiles) {
      if (p.list_rows != 1) return;
      const uint2* masks = row_masks + tile % 2 * (16 * kWarps) + row + g;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 m = masks[8 * half];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const uint32_t word = n < 4 ? m.x : m.y;
          const int bit = n % 4 * 8 + 2 * t;
          if (word >> bit & 1) s[n][2 * half] = kNone;
          if (word >> (bit + 1) & 1) s[n][2 * half + 1] = kNone;
        }
      }
    } else if (p.causal) {
      const int* first = granules + tile % 2 * kGranules;
      const int i = first_row + row + g;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (first[n / 2] + 15 <= first_row + row) continue;
        const int j = first[n / 2] + n % 2 * 8 + 2 * t;
        if (j > i) s[n][0] = kNone;
        if (j + 1 > i) s[n][1] = kNone;
        if (j > i + 8) s[n][2] = kNone;
        if (j + 1 > i + 8) s[n][3] = kNone;
      }
    }
  }
};

// Warps of 16 rows a block of threads: all rows of a list, fewer where shared memory is short. Rows
// with lists of their own (the block-coarse part) are few: as many blocks as fill the device.
// needed(warps) is the shared memory that a block of them takes.
template <class Needed>
int row_warps(const Problem& p, const Device& device, Needed needed) {
  int warps = p.list_rows == 1 ? 4 : p.list_rows / 16;
  auto wasteful = [&] {
    return p.list_rows == 1 &&
           (16 * warps >= 2 * p.rows ||
            (warps > 2 && (p.rows / (16 * warps) + 1ll) * p.B * p.H < 4 * device.sms));
  };
  while (warps > 1 && (wasteful() || needed(warps) > static_cast<size_t>(device.max_smem)))
    warps /= 2;
  return warps;
}

inline int64_t row_blocks(const Problem& p, int warps) {
  return (p.rows + 16 * warps - 1) / (16 * warps) * static_cast<int64_t>(p.B) * p.H;
}

}  // namespace mra::cuda
