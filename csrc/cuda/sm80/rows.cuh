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
  T* q_tiles;       // [2][kRows][kLdR]
  T* grad_tiles;    // [2][kRows][kLdR]
  float* lses;      // [2][kRows] log2 units, +inf: a row without weight
  float* deltas;    // [2][kRows]
  uint2* masks;     // [2][keys]: rows of the tile that a pooled key doesn't see
  int* granules;    // [4][kGranules]: first row of each granule of a tile, -1: none
  int* heads;       // [4]: head of the tile, -1: there is no such tile

  int b, end_head, keys, y;
  int first_tile, last_tile;  // kPooled: tiles of this split
  Place ahead;                // the next tile to look up
  int entry, entry_head, entry_tile;  // looked up: list entry of granule threadIdx.x
  int base_head;                      // the head that these are of:
  const T *q, *grad;
  const float *lse, *delta;
  // kPooled: the cursor of pooled key threadIdx.x
  const int *cursor, *cursor_end;
  int cursor_head, next;

  static size_t shared_bytes(int keys) {
    return sizeof(T) * 4 * kTile + sizeof(float) * 4 * kRows + sizeof(int) * 4 * (kGranules + 1) +
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
    heads = granules + 4 * kGranules;
    const int group = p.H / p.Hk;
    end_head = (hk + 1) * group;
    cursor_head = base_head = -1;
    ahead = place(hk * group);
    look_up();
    find_granules(0);
    __syncthreads();
  }

  __device__ bool exists(int step) const { return heads[step % 4] >= 0; }

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

  // Asks for the list entries of the tile `ahead` and moves on.
  __device__ void look_up() {
    entry = -1;
    entry_head = ahead.h < end_head ? ahead.h : -1;
    if (entry_head < 0) return;
    entry_tile = ahead.tile;
    if (!kPooled && threadIdx.x < kGranules) {
      const int i = (ahead.tile * kRows + 16 * static_cast<int>(threadIdx.x)) / p.block_q;
      if (i < ahead.list.count) entry = ahead.list.entries[i];
    }
    if (++ahead.tile >= ahead.tiles) ahead = place(ahead.h + 1);
  }

  // Tells all threads where the granules of a tile are: a tile ahead of its fetch, with entries
  // that were asked for another tile before, so that nobody waits for them.
  __device__ void find_granules(int step) {
    const int i = threadIdx.x;
    if (i < kGranules && entry_head >= 0) {
      int first;
      if (kPooled) {
        first = (first_tile + entry_tile) * kRows + 16 * i;
      } else {
        const int64_t row = static_cast<int64_t>(entry) * p.block_q +
                            (entry_tile * kRows + 16 * i) % p.block_q;
        first = entry >= 0 && row < p.rows ? static_cast<int>(row) : -1;
      }
      granules[step % 4 * kGranules + i] = first < p.rows ? first : -1;
    }
    if (i == 0) heads[step % 4] = entry_head;
    look_up();
  }

  // Starts the copies of a tile, if there is one, and looks up the next.
  __device__ __forceinline__ void fetch_ahead(int step) {
    if (exists(step)) fetch(step);
    find_granules(step + 1);
  }

  // Starts the copies of a tile that exists: call with its granules found and seen by all threads,
  // and its buffer no longer read. Rows that aren't there are zeros, which add nothing.
  __device__ void fetch(int step) {
    const int h = heads[step % 4], buffer = step % 2;
    const int* first = granules + step % 4 * kGranules;
    if (h != base_head) {
      base_head = h;
      q = static_cast<const T*>(p.q) + b * p.q_strides.b + h * p.q_strides.h;
      grad = static_cast<const T*>(p.grad_out) + b * p.grad_out_strides.b + h * p.grad_out_strides.h;
      const int64_t head = (static_cast<int64_t>(b) * p.H + h) * p.rows;
      lse = p.lse2 + head;
      delta = (kPooled ? p.pooled_delta : p.delta) + head;
    }
    const int warp = warp_index();
#pragma unroll
    for (int n = 0; n < 2 * kGranules; n += kWarps) {
      const int job = n + warp;
      if (2 * kGranules % kWarps != 0 && job >= 2 * kGranules) break;
      const bool grads = kGranules % kWarps == 0 ? n >= kGranules : job >= kGranules;
      T* to = (grads ? grad_tiles : q_tiles) + buffer * kTile + 16 * (job % kGranules) * kLdR;
      const T* from = grads ? grad : q;
      const int stride = static_cast<int>(grads ? p.grad_out_strides.l : p.q_strides.l);
      const int i = first[job % kGranules];
      copy_sixteen<T, DP>(to, from, stride, i, i < 0 ? 0 : p.rows - i, p.D, p.q);
    }
    for (int r = threadIdx.x; r < kRows; r += 32 * kWarps) {
      const int f = first[r / 16], i = f + r % 16;
      const bool valid = f >= 0 && i < p.rows;
      copy_4_bytes(lses + buffer * kRows + r, lse + (valid ? i : 0), valid);
      copy_4_bytes(deltas + buffer * kRows + r, delta + (valid ? i : 0), valid);
    }
    if (kPooled && static_cast<int>(threadIdx.x) < keys) {
      masks[buffer * keys + threadIdx.x] = own_mask(h, first[0]);
    }
    commit_copies();
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
