// The rows that a tile of keys is attended by, as one stream of tiles of kRows rows over the query
// heads that share the keys, double-buffered: queries, output gradients, lse and delta. A tile is
// put together from runs of 16 consecutive rows (granules), each copied by one warp.
//
// kPooled false: the rows of the column list of one key block. kPooled true: all rows of this
// split; each pooled key masks those whose list has selected its block, or that may not see it.
#pragma once

#include "tile.cuh"

namespace mra::cuda {

template <typename T, int DP, int kRows, bool kPooled, int kWarps>
struct RowStream {
  static constexpr int kLdR = kLd<T, DP>;
  static constexpr int kTile = kRows * kLdR;
  static constexpr int kGranules = kRows / 16;
  static_assert(kRows <= 64);

  // A place in the sequence of tiles: head by head.
  struct Place {
    int h, tile, tiles;  // head, tile in it, tiles of it
    List list;
  };

  const BackwardParams& p;
  T* q_tiles;     // [2][kRows][kLdR]
  T* grad_tiles;  // [2][kRows][kLdR]
  float* lses;    // [2][kRows] log2 units, +inf: a row without weight
  float* deltas;  // [2][kRows]
  uint2* masks;   // [2][keys]: rows of the tile that a pooled key doesn't see
  int* granules;  // [2][kGranules]: first row of each granule, -1: none (causal only)

  int b, end_head, keys, y;
  int first_tile, last_tile;  // kPooled: tiles of this split
  Place at;                   // the next tile to fetch
  // Its window of 32 granules, the same in every warp: first row of this lane's granule, -1: none,
  // and the list entry of this lane's granule of the next window, asked for early.
  int granule, entry;
  const T *q, *grad;  // of head at.h
  const float *lse, *delta;
  // kPooled: the cursor of pooled key threadIdx.x
  const int *cursor, *cursor_end;
  int cursor_head, next;

  static size_t shared_bytes(int keys) {
    return sizeof(T) * 4 * kTile + sizeof(float) * 4 * kRows + sizeof(int) * 2 * kGranules +
           (kPooled ? sizeof(uint2) * 2 * keys : 0);
  }

  // `y`: the key block, or the first pooled key, of `keys` in all.
  __device__ RowStream(const BackwardParams& p, char* smem, int b, int hk, int y, int keys,
                       int first_tile, int last_tile)
      : p(p), b(b), keys(keys), y(y), first_tile(first_tile), last_tile(last_tile) {
    q_tiles = reinterpret_cast<T*>(smem);
    grad_tiles = q_tiles + 2 * kTile;
    lses = reinterpret_cast<float*>(grad_tiles + 2 * kTile);
    deltas = lses + 2 * kRows;
    masks = reinterpret_cast<uint2*>(deltas + 2 * kRows);
    granules = reinterpret_cast<int*>(masks + (kPooled ? 2 * keys : 0));
    const int group = p.H / p.Hk;
    end_head = (hk + 1) * group;
    cursor_head = -1;
    enter(hk * group);
  }

  // More tiles to fetch?
  __device__ bool more() const { return at.h < end_head; }

  __device__ List column(int h, int y) const {
    return list_of(p.column_lists, static_cast<int64_t>(b) * p.H + h, y);
  }

  // Goes to the first tile of the first head from h on that has one.
  __device__ void enter(int h) {
    at = {h, 0, 0, {nullptr, 0}};
    for (; at.h < end_head; ++at.h) {
      if (kPooled) {
        at.tiles = last_tile - first_tile;
      } else {
        at.list = column(at.h, y);
        at.tiles =
            static_cast<int>((static_cast<int64_t>(at.list.count) * p.block_q + kRows - 1) / kRows);
      }
      if (at.tiles > 0) break;
    }
    if (!more()) return;
    entry = entry_of(0);
    q = static_cast<const T*>(p.q) + b * p.q_strides.b + at.h * p.q_strides.h;
    grad =
        static_cast<const T*>(p.grad_out) + b * p.grad_out_strides.b + at.h * p.grad_out_strides.h;
    const int64_t head = (static_cast<int64_t>(b) * p.H + at.h) * p.rows;
    lse = (kPooled ? p.pooled_lse2 : p.lse2) + head;
    delta = (kPooled ? p.pooled_delta : p.delta) + head;
  }

  // The list entry that this lane's granule of a window lies in, -1: none.
  __device__ int entry_of(int window) const {
    if (kPooled) return -1;
    const int i = (32 * window + static_cast<int>(threadIdx.x % 32)) * 16 / p.block_q;
    return i < at.list.count ? at.list.entries[i] : -1;
  }

  __device__ void open_window(int window) {
    const int y = entry;
    entry = entry_of(window + 1);
    const int64_t row =
        static_cast<int64_t>(y) * p.block_q + static_cast<int>(threadIdx.x % 32) * 16 % p.block_q;
    granule = y >= 0 && row < p.rows ? static_cast<int>(row) : -1;
  }

  // Starts the copies of the next tile, of which there is one, into a buffer that is no longer
  // read. Rows that aren't there are zeros, which add nothing.
  __device__ void fetch(int buffer) {
    const int g = at.tile * kGranules % 32;
    if (!kPooled && g == 0) open_window(at.tile * kGranules / 32);
    const int own = (first_tile + at.tile) * kRows;  // kPooled: first row of the tile
    // First row of granule i; called by whole warps.
    auto first_of = [&](int i) {
      if (kPooled) return own + 16 * i < p.rows ? own + 16 * i : -1;
      return __shfl_sync(0xffffffffu, granule, g + i);
    };
    const int warp = warp_index();
#pragma unroll
    for (int n = 0; n < 2 * kGranules; n += kWarps) {
      const int job = n + warp;
      if (2 * kGranules % kWarps != 0 && job >= 2 * kGranules) break;
      const bool grads = kGranules % kWarps == 0 ? n >= kGranules : job >= kGranules;
      T* to = (grads ? grad_tiles : q_tiles) + buffer * kTile + 16 * (job % kGranules) * kLdR;
      const int stride = static_cast<int>(grads ? p.grad_out_strides.l : p.q_strides.l);
      const int i = first_of(job % kGranules);
      copy_sixteen<T, DP>(to, grads ? grad : q, stride, i, i < 0 ? 0 : p.rows - i, p.D, p.q);
    }
    const int thread = threadIdx.x;
#pragma unroll
    for (int r0 = 0; r0 < kRows; r0 += 32 * kWarps) {
      const int r = r0 + thread, f = first_of(r / 16 % kGranules), i = f + r % 16;
      if (r >= kRows) continue;
      const bool valid = f >= 0 && i < p.rows;
      copy_4_bytes(lses + buffer * kRows + r, lse + (valid ? i : 0), valid);
      copy_4_bytes(deltas + buffer * kRows + r, delta + (valid ? i : 0), valid);
    }
    if (!kPooled && p.causal) {
      const int first = first_of(thread % kGranules);
      if (thread < kGranules) granules[buffer * kGranules + thread] = first;
    }
    if (kPooled && thread < keys) masks[buffer * keys + thread] = own_mask(at.h, own);
    if (++at.tile >= at.tiles) enter(at.h + 1);
  }

  __device__ void advance() { next = cursor < cursor_end ? *cursor++ : INT_MAX; }

  // Rows i0 .. i0 + kRows - 1 of head h that don't see pooled key y + threadIdx.x.
  __device__ uint2 own_mask(int h, int i0) {
    const int own = y + threadIdx.x;
    if (own >= p.nk) return make_uint2(~0u, ~0u);
    if (cursor_head != h) {
      cursor_head = h;
      const List list = column(h, own);
      int count = list.count;
      cursor = list.entries;
      cursor_end = cursor + count;
      while (count > 0) {  // first entry that reaches this split
        const int half = count / 2;
        if ((static_cast<int64_t>(cursor[half]) + 1) * p.list_rows <= i0) {
          cursor += half + 1;
          count -= half + 1;
        } else {
          count = half;
        }
      }
      advance();
    }
    auto below = [](int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0ull : (1ull << n) - 1; };
    uint64_t mask = 0;
    while (next != INT_MAX) {
      const int64_t from = static_cast<int64_t>(next) * p.list_rows - i0, to = from + p.list_rows;
      if (from >= kRows) break;
      mask |= below(to) & ~below(from);
      if (to > kRows) break;
      advance();
    }
    if (p.causal) {  // seen by x with (y + 1) bk <= x bq only
      const int64_t x = ((static_cast<int64_t>(own) + 1) * p.block_k + p.block_q - 1) / p.block_q;
      mask |= below(x * p.list_rows - i0);
    }
    return make_uint2(static_cast<uint32_t>(mask), static_cast<uint32_t>(mask >> 32));
  }
};

}  // namespace mra::cuda
