// Which pooled keys a tile of rows doesn't see.
#pragma once

#include "../sm80/tile.cuh"

namespace mra::cuda::sm90 {

// Of the 64 pooled keys from first_key on, a bit each: those in list x of a head [B, H] and, under
// causal, those that don't lie wholly in its past.
__device__ __forceinline__ uint64_t unseen_by(const BackwardParams& p, int64_t head, int x,
                                              int first_key) {
  uint64_t unseen = 0;
  const List list = list_of(p.row_lists, head, x);
  int from = 0, count = list.count;  // to the first entry not before this tile's keys
  while (count > 0) {
    const int half = count / 2;
    if (list.entries[from + half] < first_key) {
      from += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  for (; from < list.count; ++from) {
    const unsigned y = list.entries[from] - first_key;
    if (y >= 64) break;
    unseen |= 1ull << y;
  }
  if (p.causal) {  // seen are y with (y + 1) block_k <= x block_q
    const int64_t seen = (static_cast<int64_t>(x) * p.list_rows >> p.log2_block_k) - first_key;
    if (seen < 64) unseen |= seen <= 0 ? ~0ull : ~0ull << seen;
  }
  return unseen;
}
// Of a tile of 64 rows from `row` on: those that its first and its last 32 rows don't see.
template <typename Bits>
__device__ __forceinline__ void unseen_by_tile(const BackwardParams& p, int64_t head, int row,
                                               int first_key, Bits (&unseen)[2]) {
  const int x = row / p.list_rows;
  unseen[0] = unseen[1] = static_cast<Bits>(unseen_by(p, head, x, first_key));
  if (p.list_rows == 32 && x + 1 < p.row_lists.lists) {
    unseen[1] = static_cast<Bits>(unseen_by(p, head, x + 1, first_key));
  }
}

}  // namespace mra::cuda::sm90
