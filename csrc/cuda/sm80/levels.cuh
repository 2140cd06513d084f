// Calls with levels: the candidates of a query block, and which of them it has chosen.
#pragma once

#include "cells.h"
#include "tile.cuh"

namespace mra::cuda {

// Key blocks of one resolution that are candidates of a query block, ascending by position.
struct Candidates {
  const int* parents;  // what its parent has chosen one resolution up, or null: all blocks
  const int* count;    // valid keys of the blocks of this resolution
  int positions;       // some of which have no block
  int log2_children, parent_blocks;
  int end;  // blocks from here on are not seen

  // The block at a position, -1: none.
  __device__ __forceinline__ int at(int position) const {
    int y = position;
    if (parents != nullptr) {
      const int parent = parents[position >> log2_children];
      if (static_cast<unsigned>(parent) >= static_cast<unsigned>(parent_blocks)) return -1;
      y = (parent << log2_children) + (position & ((1 << log2_children) - 1));
    }
    return y < end && count[y] > 0 ? y : -1;
  }
};

// Key blocks of resolution r that end where query block x begins or before.
__device__ __forceinline__ int past_blocks(const Levels& l, int r, int x) {
  const ResolutionBlocks& at = l.at[r];
  if (!l.causal) return at.nk;
  return static_cast<int>(min(int64_t{at.nk}, (int64_t{x} << at.log2_q) >> at.log2_k));
}
// Those that begin before query block x ends.
__device__ __forceinline__ int seen_blocks(const Levels& l, int r, int x) {
  const ResolutionBlocks& at = l.at[r];
  if (!l.causal) return at.nk;
  const int64_t last = ((int64_t{x} + 1) << at.log2_q) - 1;
  return static_cast<int>(min(int64_t{at.nk}, (last >> at.log2_k) + 1));
}

// Of query block x of resolution r, in batch b, head `head` of all; blocks before `end`.
__device__ __forceinline__ Candidates candidates_of(const Levels& l, int b, int64_t head, int r,
                                                    int x, int end) {
  Candidates c{};
  c.count = l.key_count + int64_t{b} * l.key_blocks + l.at[r].first_k;
  c.positions = c.end = end;
  if (r + 1 == l.count) return c;
  const ResolutionBlocks& up = l.at[r + 1];
  const List parents = list_of(l.rows, head, up.first_q + (x >> (up.log2_q - l.at[r].log2_q)));
  c.parents = parents.entries;
  c.parent_blocks = up.nk;
  c.log2_children = up.log2_k - l.at[r].log2_k;
  c.positions = min(parents.count, up.nk) << c.log2_children;
  return c;
}

// The first place in a list, ascending, whose entry is not below y.
__device__ __forceinline__ int lower_bound(const List& list, int y) {
  int from = 0, to = list.count;
  while (from < to) {
    const int middle = (from + to) / 2;
    if (list.entries[middle] < y) {
      from = middle + 1;
    } else {
      to = middle;
    }
  }
  return from;
}
__device__ __forceinline__ bool contains(const List& list, int y) {
  const int at = lower_bound(list, y);
  return at < list.count && list.entries[at] == y;
}

// The coarse cells of query block x of resolution r: its candidates in the past, less the chosen.
struct CoarseCells {
  Candidates all;
  List chosen;

  __device__ CoarseCells(const Levels& l, int b, int64_t head, int r, int x)
      : all(candidates_of(l, b, head, r, x, past_blocks(l, r, x))),
        chosen(list_of(l.rows, head, l.at[r].first_q + x)) {}

  __device__ __forceinline__ int at(int position) const {
    const int y = position < all.positions ? all.at(position) : -1;
    return y >= 0 && !contains(chosen, y) ? y : -1;
  }
};

// Rows of a tile that meets the keys of a block of threads: in one query block of any resolution.
template <typename T, int DP>
inline constexpr int kCellRows = sizeof(T) == 2 || DP <= 64 ? 32 : 16;

// f(integral_constant<int, warps>), warps in 1, 2, 4.
template <class F>
auto with_cell_warps(int warps, F f) {
  return with_warps(warps,
                    [&](auto w) { return f(std::integral_constant<int, (w < 4 ? w : 4)>{}); });
}

// Adds what a tile of kRows rows gives to the gradients of sixteen cells' means, dk less the scale:
// of those from `key` on in k and v, their columns from `column` on. lse, delta: of the rows; bias:
// of keys g and g + 8.
template <typename T, int DP, int kRows, int kTiles>
__device__ __forceinline__ void add_cell_rows(float (&dk)[kTiles][4], float (&dv)[kTiles][4],
                                              const CellsBackward& p, const T* k, const T* v,
                                              int key, const T* q, const T* grad_out,
                                              const float* lse, const float* delta,
                                              const float (&bias)[2], int column) {
  constexpr int kLdT = kLd<T, DP>;
  const int t = threadIdx.x % 4;
  float s[kRows / 8][4] = {}, ds[kRows / 8][4];
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float2 d = *reinterpret_cast<const float2*>(delta + 8 * n + 2 * t);
    ds[n][0] = ds[n][2] = -d.x;
    ds[n][1] = ds[n][3] = -d.y;
  }
  multiply_nt<T, DP>(s, k, key, q, kLdT, p.tf32_scores);
  multiply_nt<T, DP>(ds, v, key, grad_out, kLdT, p.tf32);
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float2 w = *reinterpret_cast<const float2*>(lse + 8 * n + 2 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = fmaf(s[n][i], p.scale * kLog2e, i % 2 ? -w.y : -w.x);
      s[n][i] = exp2_approx(x + bias[i / 2]);
      ds[n][i] *= s[n][i];
    }
  }
  multiply_pn<T>(dv, s, grad_out, kLdT, column, p.tf32);
  multiply_pn<T>(dk, ds, q, kLdT, column, p.tf32);
}

}  // namespace mra::cuda
