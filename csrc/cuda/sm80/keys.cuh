// The keys that a tile of rows attends, as one stream of tiles of kKeys keys, double-buffered:
// first the pooled keys of every key block that is not selected, then the keys of the selected
// blocks, gathered by the row list. Each key comes with a bias in log2 units: log2 of the number
// of keys it stands for, or -inf where it has no weight.
//
// The forward and the row backward kernel both read this stream. Selected blocks are skipped among
// the pooled keys by a bitmap when the tile's rows share one list, and by a cursor a row when each
// row has its own (the block-coarse part).
#pragma once

#include <climits>

#include "tile.cuh"

namespace mra::cuda {

template <typename T, int DP, int kKeys>
struct KeyStream {
  static constexpr int kLdK = kLd<T, DP>;
  static constexpr int kTile = kKeys * kLdK;
  static constexpr int kGranules = kKeys / 16;
  static constexpr float kNone = -INFINITY;

  const Problem& p;
  T* k_tiles;         // [2][kKeys][kLdK]
  T* v_tiles;         // [2][kKeys][kLdK]
  float* biases;      // [2][kKeys]
  int* granules;      // [3][kGranules]: first key of each 16 keys of a tile, -1: none
  uint2* row_masks;   // [2][threads / 2]: keys of the tile that row r doesn't see (own lists only)
  uint32_t* bitmap;   // [ceil(nk / 32)]: selected key blocks (shared list only)

  int b, hk, first_row, rows, x;
  const T *k, *v, *pooled_k, *pooled_v;
  const int* list;
  int list_count, pooled_blocks, pooled_tiles, tiles;
  // own lists: the cursor of row threadIdx.x
  const int *cursor, *cursor_end;
  int next, visible;

  static size_t shared_bytes(const Problem& p, int threads) {
    size_t bytes = sizeof(T) * 4 * kTile + sizeof(float) * 2 * kKeys + sizeof(int) * 3 * kGranules;
    if (p.pooled_k == nullptr) return bytes;
    return bytes + (p.list_rows == 1 ? sizeof(uint2) * threads : sizeof(uint32_t) * ((p.nk + 31) / 32));
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
    if (pooled) end += own_lists ? 2 * blockDim.x : (p.nk + 31) / 32;
    granules = reinterpret_cast<int*>(end);

    k = static_cast<const T*>(p.k) + b * p.k_strides.b + hk * p.k_strides.h;
    v = static_cast<const T*>(p.v) + b * p.v_strides.b + hk * p.v_strides.h;
    const int64_t pooled_head = (static_cast<int64_t>(b) * p.Hk + hk) * p.nk * p.D;
    pooled_k = static_cast<const T*>(p.pooled_k) + pooled_head;
    pooled_v = static_cast<const T*>(p.pooled_v) + pooled_head;

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
      for (int i = threadIdx.x; i < (p.nk + 31) / 32; i += blockDim.x) bitmap[i] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < list_count; i += blockDim.x) {
        const unsigned y = list[i];
        if (y < static_cast<unsigned>(p.nk)) atomicOr(bitmap + y / 32, 1u << y % 32);
      }
    }
    find_granules(0);
    find_granules(1);
    __syncthreads();
  }

  __device__ int seen_blocks(int x) const {
    if (!p.causal) return p.nk;
    return min(p.nk, static_cast<int>(static_cast<int64_t>(x) * p.block_q >> p.log2_block_k));
  }

  __device__ void advance() {
    next = cursor < cursor_end ? *cursor++ : INT_MAX;
  }

  // Looked up one tile ahead, so that no copy waits for its address.
  __device__ void find_granules(int tile) {
    const int i = threadIdx.x;
    if (i >= kGranules || tile < pooled_tiles || tile >= tiles) return;
    const int64_t at = static_cast<int64_t>(tile - pooled_tiles) * kKeys + 16 * i;
    const int64_t entry = at >> p.log2_block_k;
    int first = -1;
    if (entry < list_count) {
      const int y = list[entry];
      if (static_cast<unsigned>(y) < static_cast<unsigned>(p.nk)) {
        const int64_t key = (static_cast<int64_t>(y) << p.log2_block_k) + (at & (p.block_k - 1));
        first = key < p.M ? static_cast<int>(key) : -1;
      }
    }
    granules[tile % 3 * kGranules + i] = first;
  }

  __device__ int key_of(int tile, int r) const {
    const int first = granules[tile % 3 * kGranules + r / 16];
    return first >= 0 && first + r % 16 < p.M ? first + r % 16 : -1;
  }

  // Starts the copies of a tile and writes its biases: call with granules of it found and seen by
  // all threads, and its buffer no longer read.
  __device__ void fetch(int tile) {
    const int buffer = tile % 2;
    T *kt = k_tiles + buffer * kTile, *vt = v_tiles + buffer * kTile;
    float* bias = biases + buffer * kKeys;
    if (tile < pooled_tiles) {
      const int y0 = tile * kKeys;
      auto row = [&](const T* base) {
        return [=](int r) {
          return y0 + r < pooled_blocks ? base + static_cast<int64_t>(y0 + r) * p.D : nullptr;
        };
      };
      load_rows<T, DP, kKeys>(kt, p.D, p.q, row(pooled_k));
      load_rows<T, DP, kKeys>(vt, p.D, p.q, row(pooled_v));
      for (int r = threadIdx.x; r < kKeys; r += blockDim.x) {
        const int y = y0 + r;
        float w = kNone;
        if (y < pooled_blocks && (p.list_rows == 1 || !(bitmap[y / 32] >> y % 32 & 1))) {
          const int c = p.key_count[static_cast<int64_t>(b) * p.nk + y];
          if (c > 0) w = log2f(static_cast<float>(c));
        }
        bias[r] = w;
      }
      if (p.list_rows == 1 && threadIdx.x < blockDim.x / 2) {
        row_masks[buffer * (blockDim.x / 2) + threadIdx.x] = own_mask(y0);
      }
    } else {
      auto row = [&](const T* base, int64_t stride) {
        return [=](int r) {
          const int j = key_of(tile, r);
          return j >= 0 ? base + j * stride : nullptr;
        };
      };
      load_rows<T, DP, kKeys>(kt, p.D, p.q, row(k, p.k_strides.l));
      load_rows<T, DP, kKeys>(vt, p.D, p.q, row(v, p.v_strides.l));
      for (int r = threadIdx.x; r < kKeys; r += blockDim.x) {
        const int j = key_of(tile, r);
        const bool live =
            j >= 0 && (p.key_mask == nullptr || p.key_mask[static_cast<int64_t>(b) * p.M + j]);
        bias[r] = live ? 0.f : kNone;
      }
    }
    commit_copies();
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

  // Scores of a tile as a warp holds them -> logits in log2 units, -inf where a key has no weight
  // for the row. `row` is the first of the warp's 16 rows, counted from first_row.
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
      const uint2* masks = row_masks + tile % 2 * (blockDim.x / 2) + row + g;
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
      const int* first = granules + tile % 3 * kGranules;
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

// Warps of 16 rows a block of threads: all rows of a list, fewer where shared memory is short.
template <class Needed>
int row_warps(const Problem& p, int smem_limit, Needed needed) {
  int warps = p.list_rows == 1 ? 4 : p.list_rows / 16;
  while (warps > 1 && needed(warps) > static_cast<size_t>(smem_limit)) warps /= 2;
  return warps;
}

inline int64_t row_blocks(const Problem& p, int warps) {
  return (p.rows + 16 * warps - 1) / (16 * warps) * static_cast<int64_t>(p.B) * p.H;
}

}  // namespace mra::cuda
