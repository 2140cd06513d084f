// The rows that a tile of keys is attended by, as one stream of tiles of kRows rows over the query
// heads that share the keys, double-buffered: queries, output gradients, lse and delta.
//
// kPooled false: the rows of the column list of one key block. kPooled true: all rows of this
// split; each pooled key masks those whose list has selected its block, or that may not see it.
#pragma once

#include "tile.cuh"

namespace mra::cuda {

template <typename T, int DP, int kRows, bool kPooled>
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
  T* q_tiles;       // [2][kRows][kLdR]
  T* grad_tiles;    // [2][kRows][kLdR]
  float* lses;      // [2][kRows] log2 units, +inf: no such row
  float* deltas;    // [2][kRows]
  uint2* masks;     // [2][keys]: rows of the tile that a pooled key doesn't see
  int* granules;    // [3][kGranules]: first row of each 16 rows of a tile, -1: none

  int b, end_head, keys, y;
  int first_tile, last_tile;  // kPooled: tiles of this split
  Place found, fetched;       // next tiles to look up and to fetch
  int found_slot, fetched_slot;
  // kPooled: the cursor of pooled key threadIdx.x
  const int *cursor, *cursor_end;
  int cursor_head, next;

  static size_t shared_bytes(int keys) {
    return sizeof(T) * 4 * kTile + sizeof(float) * 4 * kRows + sizeof(int) * 3 * kGranules +
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
    found_slot = fetched_slot = 0;
    found = place(hk * group);
    fetched = found;
    find_granules();
    find_granules();
    __syncthreads();
  }

  __device__ bool more() const { return fetched.h < end_head; }

  __device__ List column(int h, int y) const {
    return list_of(p.column_lists, static_cast<int64_t>(b) * p.H + h, y);
  }

  // First tile of the first head from h on that has one.
  __device__ Place place(int h) const {
    Place at{h, 0, 0, {nullptr, 0}};
    for (; at.h < end_head; ++at.h) {
      if (kPooled) {
        at.tiles = last_tile - first_tile;
      } else {
        at.list = column(at.h, y);
        at.tiles = static_cast<int>(
            (static_cast<int64_t>(at.list.count) * p.block_q + kRows - 1) / kRows);
      }
      if (at.tiles > 0) break;
    }
    return at;
  }
  __device__ void step(Place& at) const {
    if (++at.tile >= at.tiles) at = place(at.h + 1);
  }

  // Looked up one tile ahead of its fetch.
  __device__ void find_granules() {
    if (found.h >= end_head) return;
    const int i = threadIdx.x;
    if (i < kGranules) {
      int first = -1;
      if (kPooled) {
        first = (first_tile + found.tile) * kRows + 16 * i;
      } else {
        const int64_t at = static_cast<int64_t>(found.tile) * kRows + 16 * i;
        const int64_t entry = at / p.block_q;
        if (entry < found.list.count) first = found.list.entries[entry] * p.block_q + at % p.block_q;
      }
      granules[found_slot * kGranules + i] = first < p.rows ? first : -1;
    }
    found_slot = (found_slot + 1) % 3;
    step(found);
  }

  // Starts the copies of the next tile into `buffer`.
  __device__ void fetch(int buffer) {
    constexpr float kLog2e = 1.4426950408889634f;
    const int h = fetched.h;
    const int* first = granules + fetched_slot * kGranules;
    auto row_of = [&](int r) {
      const int f = first[r / 16];
      return f >= 0 && f + r % 16 < p.rows ? f + r % 16 : -1;
    };
    auto load = [&](T* to, const void* from, const Strides& strides) {
      const T* base = static_cast<const T*>(from) + b * strides.b + h * strides.h;
      load_rows<T, DP, kRows>(to, p.D, p.q, [&](int r) {
        const int i = row_of(r);
        return i >= 0 ? base + i * strides.l : nullptr;
      });
    };
    load(q_tiles + buffer * kTile, p.q, p.q_strides);
    load(grad_tiles + buffer * kTile, p.grad_out, p.grad_out_strides);
    const float* delta = kPooled ? p.pooled_delta : p.delta;
    for (int r = threadIdx.x; r < kRows; r += blockDim.x) {
      const int i = row_of(r);
      const int64_t at = (static_cast<int64_t>(b) * p.H + h) * p.rows + i;
      const float lse = i >= 0 ? p.lse[at] * kLog2e : -INFINITY;
      lses[buffer * kRows + r] = lse == -INFINITY ? INFINITY : lse;
      deltas[buffer * kRows + r] = i >= 0 ? delta[at] : 0.f;
    }
    if (kPooled && static_cast<int>(threadIdx.x) < keys) {
      masks[buffer * keys + threadIdx.x] = own_mask(h, (first_tile + fetched.tile) * kRows);
    }
    commit_copies();
    fetched_slot = (fetched_slot + 1) % 3;
    step(fetched);
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
