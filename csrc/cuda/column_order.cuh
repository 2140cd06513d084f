// In which order the kernels of the columns take their items (ColumnOrder in delta.h), found beside
// the sums of the rows.
#pragma once

#include "delta.h"
#include "grid.cuh"

namespace mra::cuda {

// Entries in all lists of an item; kDirect: an item has one list, its own.
template <bool kDirect>
__device__ __forceinline__ int entries_of(const ColumnOrder& c, int item) {
  if constexpr (kDirect) return c.count[item];
  const unsigned head = static_cast<unsigned>(item) / c.items;
  const unsigned y = (item - head * c.items) / c.items_block;
  const int* list = c.count + static_cast<int64_t>(head) * c.group * c.lists + y;
  int entries = 0;
  for (int i = 0; i < c.group; ++i) entries += list[static_cast<int64_t>(i) * c.lists];
  return entries;
}

// By 256 threads, the first of which has item `first`: each finds the place of its item. All count
// for themselves, so that no block of threads waits for another.
template <bool kDirect>
__device__ void place_items(const ColumnOrder& c, int first) {
  constexpr int kClasses = ColumnOrder::kClasses, kBatch = 16;  // readings in flight
  // Of each warp: items in classes below the index, of all, of those before `first`, of its own.
  __shared__ int all_of[8][kClasses + 1], before_of[8][kClasses + 1], own_of[8][kClasses + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, item = first + threadIdx.x;
  const int mine = item < c.all ? entries_of<kDirect>(c, item) : -1;

  int below[kClasses] = {}, before[kClasses];
  const auto count = [&](int begin, int end) {  // multiples of 256, but for the last end
#pragma unroll 1
    for (int i = begin + threadIdx.x; i < end; i += 256 * kBatch) {
      int entries[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int at = i + 256 * j;
        entries[j] = at < end ? entries_of<kDirect>(c, at) : -1;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
#pragma unroll
        for (int k = 0; k < kClasses; ++k) below[k] += entries[j] > c.above[k];
      }
    }
  };
  count(0, first);
#pragma unroll
  for (int k = 0; k < kClasses; ++k) before[k] = below[k];
  count(first, c.all);

  int kind = 0;
#pragma unroll
  for (int k = 0; k < kClasses; ++k) kind += mine <= c.above[k];
  unsigned same = 0, lower = 0;  // lanes with an item of this lane's class, of a lower one
#pragma unroll
  for (int k = 0; k < kClasses; ++k) {
    const unsigned here = __ballot_sync(kFullWarp, mine > c.above[k]);
    if (k == kind) same = here & ~lower;
    lower = here;
    const int all = __reduce_add_sync(kFullWarp, below[k]);
    const int earlier = __reduce_add_sync(kFullWarp, before[k]);
    if (lane == 0) {
      all_of[warp][k + 1] = all, before_of[warp][k + 1] = earlier;
      own_of[warp][k + 1] = __popc(here);
    }
  }
  if (lane == 0) all_of[warp][0] = before_of[warp][0] = own_of[warp][0] = 0;
  __syncthreads();
  if (mine < 0) return;
  int place = __popc(same & (1u << lane) - 1);
#pragma unroll
  for (int w = 0; w < 8; ++w) {
    place += all_of[w][kind] + before_of[w][kind + 1] - before_of[w][kind];
    if (w < warp) place += own_of[w][kind + 1] - own_of[w][kind];
  }
  c.order[place] = item;
}

// Blocks of 256 threads that find the order: `c` as it is handed over.
inline int64_t order_blocks(const ColumnOrder& c) {
  return c.order == nullptr ? 0 : (int64_t{c.all} + 255) / 256;
}
__device__ __forceinline__ void order_columns(const ColumnOrder& c, int block) {
  if (c.group == 1 && c.items_block == 1) {
    place_items<true>(c, 256 * block);
  } else {
    place_items<false>(c, 256 * block);
  }
}

}  // namespace mra::cuda
