// How many blocks each query block may take: from shapes alone, the same on every device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "stages.h"

namespace mra {

inline int log2_of(int64_t power) {
  int n = 0;
  while (power >>= 1) ++n;
  return n;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Key blocks of query block x that are not wholly in its future.
inline int64_t visible_blocks(const Options& o, int64_t N, int64_t nk, int64_t x) {
  if (!o.causal) return nk;
  const int64_t last = std::min((x + 1) * o.block_q, N) - 1;
  return std::min(nk, last / o.block_k + 1);
}

// m of query block x of head h: at least 1, at most its visible blocks.
inline int64_t row_budget(const Options& o, int64_t N, int64_t nk, int64_t h, int64_t x) {
  const int64_t seen = visible_blocks(o, N, nk, x);
  if (o.blocks_per_row) return std::min(*o.blocks_per_row, seen);
  const double density = o.head_density.empty() ? *o.density : o.head_density[h];
  return std::min(seen, std::max<int64_t>(1, static_cast<int64_t>(std::ceil(density * seen))));
}

// Pairs that global selection, which has one density for all heads, may take of a head's map.
inline int64_t map_budget(const Options& o, int64_t N, int64_t nk) {
  int64_t budget = 0;
  for (int64_t x = 0; x < ceil_div(N, o.block_q); ++x) budget += row_budget(o, N, nk, 0, x);
  return budget;
}

// Room for one query block's list: the largest budget, or all pairs that the diagonal can cross.
inline int64_t row_capacity(const Options& o, int64_t nk) {
  Options full = o;
  full.causal = false;
  full.head_density.clear();
  const int64_t m = row_budget(full, 0, nk, 0, 0);
  const int64_t crossing = o.causal ? std::max<int64_t>(1, o.block_q / o.block_k) : 0;
  return std::min(nk, std::max(m, crossing));
}

}  // namespace mra
