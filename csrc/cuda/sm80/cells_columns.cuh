// Gradients of the pooled keys and values of one resolution below the coarsest under coarse = row
// with levels, of what cells_candidates.cuh has no places for: as backward_columns.cuh, but a block
// of threads owns children of one key block of the next coarser resolution, and the rows are those
// of the query blocks that have chosen it. Tiles of rows lie in one query block, so that a key sees
// a tile or doesn't.
#pragma once

#include "backward_columns.cuh"
#include "levels.cuh"

namespace mra::cuda {

// The stream of tiles of rows of one split, head by head, double-buffered.
template <typename T, int DP, int kWarps>
struct CellRows {
  static constexpr int kRows = kCellRows<T, DP>, kLdR = kLd<T, DP>, kTile = kRows * kLdR;

  const CellsBackward& p;
  T* q_tiles;     // [2][kRows][kLdR]
  T* grad_tiles;  // [2][kRows][kLdR]
  float* lses;    // [2][kRows] log2 units, +inf: a row without weight
  float* deltas;  // [2][kRows]
  float* biases;  // [2][keys]: log2 of the keys it stands for, -inf: doesn't see the tile

  int b, keys, y, split, parent, log2_tiles;  // log2_tiles: of the tiles of a query block
  int end_head, h;                            // head of the next tile to fetch
  int64_t tile, end;
  List list;  // of query blocks
  // Of key y + threadIdx.x
  float bias;
  List chosen;
  int next;  // place in `chosen`, -1: not yet

  static size_t shared_bytes(int keys) {
    return sizeof(T) * 4 * kTile + sizeof(float) * (4 * kRows + 2 * keys);
  }

  __device__ CellRows(const CellsBackward& p, char* smem, int b, int hk, int y, int keys, int split)
      : p(p), b(b), keys(keys), y(y), split(split) {
    q_tiles = reinterpret_cast<T*>(smem);
    grad_tiles = q_tiles + 2 * kTile;
    lses = reinterpret_cast<float*>(grad_tiles + 2 * kTile);
    deltas = lses + 2 * kRows;
    biases = deltas + 2 * kRows;
    const ResolutionBlocks &at = p.levels.at[p.r], &up = p.levels.at[p.r + 1];
    parent = y >> (up.log2_k - at.log2_k);
    log2_tiles = up.log2_q - (kRows == 32 ? 5 : 4);
    const int key = y + static_cast<int>(threadIdx.x);
    int count = 0;
    if (static_cast<int>(threadIdx.x) < keys && key < at.nk) {
      count = p.levels.key_count[static_cast<int64_t>(b) * p.levels.key_blocks + at.first_k + key];
    }
    bias = count > 0 ? log2f(static_cast<float>(count)) : -INFINITY;
    const int group = p.H / p.Hk;
    end_head = (hk + 1) * group;
    enter(hk * group);
  }

  __device__ bool more() const { return h < end_head; }

  // Goes to the first tile of the first head from `head` on that has one.
  __device__ void enter(int head) {
    next = -1;
    for (h = head; h < end_head; ++h) {
      list = list_of(p.parents, static_cast<int64_t>(b) * p.H + h, parent);
      const int64_t tiles = static_cast<int64_t>(list.count) << log2_tiles;
      tile = tiles * split / p.splits;
      end = tiles * (split + 1) / p.splits;
      if (tile < end) return;
    }
  }

  // Starts the copies of the next tile, of which there is one, into a buffer that is no longer
  // read. Rows that aren't there are zeros without weight.
  __device__ void fetch(int buffer) {
    const int x = list.entries[tile >> log2_tiles];
    const int64_t first =
        ((static_cast<int64_t>(x) << log2_tiles) + (tile & ((1 << log2_tiles) - 1))) * kRows;
    const bool inside = first >= 0 && first < p.rows;
    const int row = inside ? static_cast<int>(first) : 0, present = inside ? p.rows - row : 0;
    const T* q = static_cast<const T*>(p.q) + b * p.q_strides.b + h * p.q_strides.h;
    const T* grad =
        static_cast<const T*>(p.grad_out) + b * p.grad_out_strides.b + h * p.grad_out_strides.h;
    for (int job = warp_index(); job < kRows / 8; job += kWarps) {
      const bool grads = job >= kRows / 16;
      const int r = 16 * (job % (kRows / 16));
      T* to = (grads ? grad_tiles : q_tiles) + buffer * kTile + r * kLdR;
      copy_sixteen<T, DP>(to, grads ? grad : q,
                          static_cast<int>(grads ? p.grad_out_strides.l : p.q_strides.l), row + r,
                          present - r, p.D, p.q);
    }
    const int thread = threadIdx.x;
    const int64_t at = (static_cast<int64_t>(b) * p.H + h) * p.rows + row;
    if (thread < kRows) {
      const bool there = thread < present;
      lses[buffer * kRows + thread] = there ? p.lse2[at + thread] : INFINITY;
      copy_4_bytes(deltas + buffer * kRows + thread,
                   p.pooled_delta + p.r * p.delta_stride + (there ? at + thread : 0), there);
    }
    if (thread < keys) biases[buffer * keys + thread] = seen(row);
    if (++tile >= end) enter(h + 1);
  }

  // This thread's key for the tile of rows from `row` on.
  __device__ float seen(int row) {
    const ResolutionBlocks& at = p.levels.at[p.r];
    const int key = y + static_cast<int>(threadIdx.x), x = row >> at.log2_q;
    if (bias == -INFINITY) return bias;
    if (next < 0) {
      chosen = list_of(p.chosen, static_cast<int64_t>(b) * p.H + h, key);
      next = lower_bound(chosen, x);
    }
    while (next < chosen.count && chosen.entries[next] < x) ++next;
    const bool is_chosen = next < chosen.count && chosen.entries[next] == x;
    return is_chosen || key >= past_blocks(p.levels, p.r, x) ? -INFINITY : bias;
  }
};

template <typename T, int DP, int kSixteens>
__global__ void __maxnreg__((kColumnsRegisters<T, DP, kSixteens>))
    cells_columns_kernel(const __grid_constant__ CellsBackward p, int tile_keys) {
  constexpr int kParts = kColumnParts<DP>, kWidth = DP / kParts, kWarps = kSixteens * kParts;
  constexpr int kRows = kCellRows<T, DP>, kLdT = kLd<T, DP>, kKeys = 16 * kSixteens;
  extern __shared__ __align__(16) char smem[];

  const ResolutionBlocks& at = p.levels.at[p.r];
  const unsigned key_tiles = (at.nk + tile_keys - 1) / tile_keys, heads = p.B * p.Hk;
  const unsigned behind = blockIdx.x / key_tiles;
  const int first_key = (blockIdx.x - behind * key_tiles) * tile_keys;
  const int split = behind / heads, b = behind % heads / p.Hk, hk = behind % heads % p.Hk;
  const int keys = min(tile_keys, at.nk - first_key);
  const int key = threadIdx.x / 32 / kParts * 16, column = threadIdx.x / 32 % kParts * kWidth;
  const int g = threadIdx.x % 32 / 4;
  const int64_t head = static_cast<int64_t>(b) * p.Hk + hk;

  T* k = reinterpret_cast<T*>(smem);
  T* v = k + kKeys * kLdT;
  const int64_t means = (head * p.levels.key_blocks + at.first_k) * p.D;
  for (int i = warp_index(); i < 2 * kSixteens; i += kWarps) {
    const bool values = i >= kSixteens;
    const int r = 16 * (i % kSixteens);
    copy_sixteen<T, DP>((values ? v : k) + r * kLdT,
                        static_cast<const T*>(values ? p.pooled_v : p.pooled_k) + means, p.D,
                        first_key + r, keys - r, p.D, p.q);
  }
  CellRows<T, DP, kWarps> rows(p, smem + sizeof(T) * 2 * kKeys * kLdT, b, hk, first_key, kKeys,
                               split);
  if (static_cast<int>(threadIdx.x) >= keys) rows.bias = -INFINITY;

  float dk[kWidth / 8][4] = {}, dv[kWidth / 8][4] = {};
  // Turn -1 only fetches the first tile.
  bool left = true;
#pragma unroll 1
  for (int step = -1; left; ++step) {
    if (step >= 0) {
      wait_for_copies();
      __syncthreads();
    }
    left = rows.more();
    if (left) rows.fetch((step + 1) % 2);
    commit_copies();
    if (step < 0) continue;
    const int buffer = step % 2;

    const T* q = rows.q_tiles + buffer * rows.kTile;
    const T* grad_out = rows.grad_tiles + buffer * rows.kTile;
    const float* lse = rows.lses + buffer * kRows;
    const float* delta = rows.deltas + buffer * kRows;
    const float* biases = rows.biases + buffer * kKeys + key + g;
    const float bias[2] = {biases[0], biases[8]};
    add_cell_rows<T, DP, kRows>(dk, dv, p, k, v, key, q, grad_out, lse, delta, bias, column);
  }
  wait_for_copies();

  const int64_t to =
      ((split * static_cast<int64_t>(p.B) * p.Hk + head) * at.nk + first_key + key) * p.D;
  const bool live[2] = {true, true};
  const float scale[2] = {p.scale, p.scale};
  finish_rows(dk, scale, live, nullptr, column, p.D);
  store_rows<float>(dk, p.pooled_grad_k + to, p.D, keys - key, column, p.D);
  store_rows<float>(dv, p.pooled_grad_v + to, p.D, keys - key, column, p.D);
}

template <typename T, int DP>
cudaError_t launch_cells_columns(const CellsBackward& p, const Device& device,
                                 cudaStream_t stream) {
  auto needed = [](int sixteens) {
    return with_cell_warps(sixteens, [&](auto n) {
      return sizeof(T) * 2 * n * 16 * kLd<T, DP> +
             CellRows<T, DP, n * kColumnParts<DP>>::shared_bytes(16 * n);
    });
  };
  const ResolutionBlocks& at = p.levels.at[p.r];
  // Neighbours of one parent.
  const int children = 1 << (p.levels.at[p.r + 1].log2_k - at.log2_k);
  int keys = children < 64 ? children : 64;
  while (keys > 16 && needed(keys / 16) > static_cast<size_t>(device.max_smem)) keys /= 2;
  const int64_t tiles = (at.nk + keys - 1) / keys;
  return with_cell_warps(keys < 16 ? 1 : keys / 16, [&](auto n) {
    return launch_grid(cells_columns_kernel<T, DP, n>, tiles * p.B * p.Hk * p.splits,
                       32 * n * kColumnParts<DP>, needed(n), stream, p, keys);
  });
}

}  // namespace mra::cuda
