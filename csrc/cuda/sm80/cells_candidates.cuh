// Gradients of the pooled keys and values of one resolution below the coarsest under coarse = row
// with levels: the parts that the rows of one query block of the next coarser resolution give to
// all of its candidates. A block of threads owns up to 64 of these and walks the rows once, where
// an owner of keys (cells_columns.cuh) would fetch the rows of each query block that has chosen
// their parent. What belongs to one key is summed by cells_sum.cu.
#pragma once

#include "backward_columns.cuh"
#include "levels.cuh"

namespace mra::cuda {

// The candidates of one block of threads, and the rows that it walks.
template <typename T, int DP, int kKeys>
struct Candidate {
  static constexpr int kRows = kCellRows<T, DP>, kTile = kRows * kLd<T, DP>;
  T* k;             // [kKeys][kLd]
  T* v;             // [kKeys][kLd]
  T* q_tiles;       // [2][kRows][kLd]
  T* grad_tiles;    // [2][kRows][kLd]
  float* lses;      // [2][kRows] log2 units, +inf: a row without weight
  float* deltas;    // [2][kRows]
  float* biases;    // [kKeys]: log2 of the keys it stands for, -inf: an empty place
  int* ids;         // [kKeys]: its block, -1: an empty place
  uint32_t* taken;  // [kKeys]: which of 32 query blocks have chosen it

  static constexpr size_t bytes() {
    return sizeof(T) * (2 * kKeys * kLd<T, DP> + 4 * kTile) + 4 * (4 * kRows + 3 * kKeys);
  }
  __device__ explicit Candidate(char* smem) {
    k = reinterpret_cast<T*>(smem);
    v = k + kKeys * kLd<T, DP>;
    q_tiles = v + kKeys * kLd<T, DP>;
    grad_tiles = q_tiles + 2 * kTile;
    lses = reinterpret_cast<float*>(grad_tiles + 2 * kTile);
    deltas = lses + 2 * kRows;
    biases = deltas + 2 * kRows;
    ids = reinterpret_cast<int*>(biases + kKeys);
    taken = reinterpret_cast<uint32_t*>(ids + kKeys);
  }
};

// Sets taken[] for the query blocks 32 window .. of resolution r that lie in [x0, x1); `all` are
// their candidates, and taken[] is of those from place `first` on. By the whole block of threads.
template <int kKeys>
__device__ __forceinline__ void look_up_taken(uint32_t* taken, const Levels& l, int64_t head, int r,
                                              const Candidates& all, int first, int window, int x0,
                                              int x1) {
  for (int i = threadIdx.x; i < kKeys; i += blockDim.x) taken[i] = 0;
  __syncthreads();
  const List parents{all.parents, all.positions >> all.log2_children};
  const int end = min(x1, 32 * window + 32), warps = blockDim.x / 32;
  for (int x = max(x0, 32 * window) + threadIdx.x / 32; x < end; x += warps) {
    const List chosen = list_of(l.rows, head, l.at[r].first_q + x);
    for (int t = threadIdx.x % 32; t < chosen.count; t += 32) {
      const int y = chosen.entries[t], at = lower_bound(parents, y >> all.log2_children);
      if (y < 0 || at >= parents.count || parents.entries[at] != y >> all.log2_children) continue;
      const int place = (at << all.log2_children) + (y & ((1 << all.log2_children) - 1)) - first;
      if (place >= 0 && place < kKeys) atomicOr(&taken[place], 1u << x % 32);
    }
  }
  __syncthreads();
}

template <typename T, int DP, int kSixteens>
__global__ void __maxnreg__((kColumnsRegisters<T, DP, kSixteens>))
    cells_candidates_kernel(const __grid_constant__ CellsBackward p) {
  constexpr int kParts = kColumnParts<DP>, kWidth = DP / kParts, kKeys = 16 * kSixteens;
  constexpr int kRows = kCellRows<T, DP>, kLdT = kLd<T, DP>, kThreads = 32 * kSixteens * kParts;
  extern __shared__ __align__(16) char smem[];
  const Candidate<T, DP, kKeys> s(smem);

  const Levels& l = p.levels;
  const ResolutionBlocks &at = l.at[p.r], &up = l.at[p.r + 1];
  const unsigned chunks = (p.places + kKeys - 1) / kKeys, part = blockIdx.x / chunks;
  const int first_place = (blockIdx.x - part * chunks) * kKeys;
  const unsigned unit = part / p.splits, bh = unit / static_cast<unsigned>(up.nq);
  const int split = part - unit * p.splits, block = unit - bh * up.nq;
  const int b = bh / static_cast<unsigned>(p.H), h = bh - b * p.H;
  const int key = threadIdx.x / 32 / kParts * 16, column = threadIdx.x / 32 % kParts * kWidth;
  const int g = threadIdx.x % 32 / 4;

  const int log2_below = up.log2_q - at.log2_q;
  const int x0 = block << log2_below, x1 = min(at.nq, (block + 1) << log2_below);
  const Candidates all = candidates_of(l, b, bh, p.r, x0, past_blocks(l, p.r, x1 - 1));
  if (first_place >= all.positions) return;  // never read

  for (int i = threadIdx.x; i < kKeys; i += kThreads) {
    const int place = first_place + i;
    const int y = place < min(all.positions, p.places) ? all.at(place) : -1;
    s.ids[i] = y;
    s.biases[i] = y < 0 ? -INFINITY : log2f(static_cast<float>(all.count[y]));
  }
  __syncthreads();
  {
    constexpr int kChunk = 16 / sizeof(T), kChunks = DP / kChunk;
    const int64_t means =
        ((static_cast<int64_t>(b) * p.Hk + h / (p.H / p.Hk)) * l.key_blocks + at.first_k) * p.D;
    for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
      const int r = i / kChunks, d = i % kChunks * kChunk, y = s.ids[r];
      const bool valid = y >= 0 && d < p.D;
      const int64_t from = valid ? means + static_cast<int64_t>(y) * p.D + d : 0;
      copy_16_bytes(s.k + r * kLdT + d, static_cast<const T*>(p.pooled_k) + from, valid);
      copy_16_bytes(s.v + r * kLdT + d, static_cast<const T*>(p.pooled_v) + from, valid);
    }
  }

  // The tiles of this split of the block's rows.
  const int block_row = block << up.log2_q, block_rows = min(1 << up.log2_q, p.rows - block_row);
  const int64_t tiles = (block_rows + kRows - 1) / kRows;
  const int first_tile = static_cast<int>(tiles * split / p.splits);
  const int end_tile = static_cast<int>(tiles * (split + 1) / p.splits);
  const T* q_head = static_cast<const T*>(p.q) + b * p.q_strides.b + h * p.q_strides.h;
  const T* grad_head =
      static_cast<const T*>(p.grad_out) + b * p.grad_out_strides.b + h * p.grad_out_strides.h;
  const auto fetch = [&](int tile, int buffer) {
    const int row = block_row + tile * kRows, present = p.rows - row;
    for (int job = warp_index(); job < kRows / 8; job += kThreads / 32) {
      const bool grads = job >= kRows / 16;
      const int r = 16 * (job % (kRows / 16));
      T* to = (grads ? s.grad_tiles : s.q_tiles) + buffer * s.kTile + r * kLdT;
      copy_sixteen<T, DP>(to, grads ? grad_head : q_head,
                          static_cast<int>(grads ? p.grad_out_strides.l : p.q_strides.l), row + r,
                          present - r, p.D, p.q);
    }
    if (threadIdx.x < kRows) {
      const int i = threadIdx.x, to = buffer * kRows + i;
      const bool there = i < present;
      const int64_t from = there ? static_cast<int64_t>(bh) * p.rows + row + i : 0;
      if (there) {
        copy_4_bytes(s.lses + to, p.lse2 + from, true);
      } else {
        s.lses[to] = INFINITY;
      }
      copy_4_bytes(s.deltas + to, p.pooled_delta + p.r * p.delta_stride + from, there);
    }
  };

  float dk[kWidth / 8][4] = {}, dv[kWidth / 8][4] = {};
  int window = -1;
  // The turn before the first tile only fetches that.
#pragma unroll 1
  for (int tile = first_tile - 1; tile < end_tile; ++tile) {
    if (tile >= first_tile) {
      wait_for_copies();
      __syncthreads();
    }
    if (tile + 1 < end_tile) fetch(tile + 1, (tile + 1) % 2);
    commit_copies();
    if (tile < first_tile) continue;
    const int x = (block_row + tile * kRows) >> at.log2_q, buffer = tile % 2;
    if (x / 32 != window) {
      window = x / 32;
      look_up_taken<kKeys>(s.taken, l, bh, p.r, all, first_place, window, x0, x1);
    }
    float bias[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = key + g + 8 * half;
      const bool seen = !(s.taken[i] >> x % 32 & 1) && s.ids[i] < past_blocks(l, p.r, x);
      bias[half] = seen ? s.biases[i] : -INFINITY;
    }

    const T* q = s.q_tiles + buffer * s.kTile;
    const T* grad_out = s.grad_tiles + buffer * s.kTile;
    const float* lse = s.lses + buffer * kRows;
    const float* delta = s.deltas + buffer * kRows;
    add_cell_rows<T, DP, kRows>(dk, dv, p, s.k, s.v, key, q, grad_out, lse, delta, bias, column);
  }
  wait_for_copies();

  const int64_t to = (static_cast<int64_t>(part) * p.places + first_place + key) * p.D;
  const int present = p.places - first_place - key;
  const bool live[2] = {true, true};
  const float scale[2] = {p.scale, p.scale};
  finish_rows(dk, scale, live, nullptr, column, p.D);
  store_rows<float>(dk, p.pooled_grad_k + to, p.D, present, column, p.D);
  store_rows<float>(dv, p.pooled_grad_v + to, p.D, present, column, p.D);
}

template <typename T, int DP>
cudaError_t launch_cells_candidates(const CellsBackward& p, const Device& device,
                                    cudaStream_t stream) {
  const auto needed = [](int sixteens) {
    return with_cell_warps(sixteens, [](auto n) { return Candidate<T, DP, 16 * n>::bytes(); });
  };
  int sixteens = p.places > 32 ? 4 : p.places > 16 ? 2 : 1;
  while (sixteens > 1 && needed(sixteens) > static_cast<size_t>(device.max_smem)) sixteens /= 2;
  const int64_t chunks = (p.places + 16 * sixteens - 1) / (16 * sixteens);
  const int64_t parts = int64_t{p.B} * p.H * p.levels.at[p.r + 1].nq * p.splits;
  return with_cell_warps(sixteens, [&](auto n) {
    return launch_grid(cells_candidates_kernel<T, DP, n>, parts * chunks, 32 * n * kColumnParts<DP>,
                       needed(n), stream, p);
  });
}

}  // namespace mra::cuda
