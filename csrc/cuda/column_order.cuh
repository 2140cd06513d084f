// In which order the kernels of the columns take their items (ColumnOrder in delta.h), found along
// with the sums of the rows.
#pragma once

#include "delta.h"
#include "grid.cuh"

namespace mra::cuda {

// How many items each class of ColumnOrder has.
struct ClassCounts {
  static constexpr int kClasses = 6, kBits = 21;
  uint64_t words[2] = {};

  // Words are chosen by selects: an index would put them in memory.
  static __device__ __forceinline__ int shift(int kind) {
    return kBits * (kind < 3 ? kind : kind - 3);
  }
  __device__ __forceinline__ void add(int kind, bool one = true) {
    const uint64_t more = static_cast<uint64_t>(one) << shift(kind);
    words[0] += kind < 3 ? more : 0;
    words[1] += kind < 3 ? 0 : more;
  }
  __device__ __forceinline__ void add(const ClassCounts& other) {
    words[0] += other.words[0], words[1] += other.words[1];
  }
  __device__ __forceinline__ int of(int kind) const {
    const uint64_t word = kind < 3 ? words[0] : words[1];
    return static_cast<int>(word >> shift(kind)) & (1 << kBits) - 1;
  }
  __device__ __forceinline__ void sum_warp() {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
      for (uint64_t& word : words) word += __shfl_xor_sync(kFullWarp, word, step);
    }
  }
};

// Entries in all lists of an item; kOne: in its only one. 0 beyond the last item.
template <bool kOne>
__device__ __forceinline__ int entries_of(const ColumnOrder& c, int item) {
  if (item >= c.all) return 0;
  const unsigned head = static_cast<unsigned>(item) / c.items, group = kOne ? 1 : c.group;
  const unsigned y = (item - head * c.items) / c.items_block;
  const int* list = c.count + static_cast<int64_t>(head) * group * c.lists + y;
  int entries = list[0];
  if constexpr (!kOne) {
    for (int i = 1; i < c.group; ++i) entries += list[static_cast<int64_t>(i) * c.lists];
  }
  return entries;
}

__device__ __forceinline__ int class_of(const ColumnOrder& c, int64_t entries) {
  const int64_t mean = c.mean;
  if (entries > 2 * mean) return entries > 8 * mean ? 0 : entries > 4 * mean ? 1 : 2;
  if (mean < ColumnOrder::kLongLists * c.group || 8 * entries > 7 * mean) return 3;
  return 8 * entries > 5 * mean ? 4 : 5;
}

// By 256 threads, the first of which has item `first`: each finds the place of its item. All count
// for themselves, so that no block of threads waits for another.
template <bool kOne>
__device__ void place_items(const ColumnOrder& c, int first) {
  constexpr int kBatch = 8;                                   // readings in flight
  __shared__ ClassCounts all_of[8], before_of[8], own_of[8];  // of each warp
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, item = first + threadIdx.x;
  ClassCounts all, before, own;
#pragma unroll 1
  for (int i = threadIdx.x; i < c.all; i += 256 * kBatch) {
    int entries[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) entries[j] = entries_of<kOne>(c, i + 256 * j);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int kind = class_of(c, entries[j]);
      all.add(kind, i + 256 * j < c.all);
      before.add(kind, i + 256 * j < first);
    }
  }
  const int kind = item < c.all ? class_of(c, entries_of<kOne>(c, item)) : -1;
  const uint32_t same = __match_any_sync(kFullWarp, kind);
  if (kind >= 0) own.add(kind);
  all.sum_warp();
  before.sum_warp();
  own.sum_warp();
  if (lane == 0) all_of[warp] = all, before_of[warp] = before, own_of[warp] = own;
  __syncthreads();
  all = before = {};
  for (int w = 0; w < 8; ++w) {
    all.add(all_of[w]);
    before.add(before_of[w]);
    if (w < warp) before.add(own_of[w]);
  }
  if (kind < 0) return;
  int place = before.of(kind) + __popc(same & (1u << lane) - 1);
  for (int i = 0; i < kind; ++i) place += all.of(i);
  c.order[place] = item;
}

__device__ __forceinline__ void order_columns(const ColumnOrder& c) {
  for (int64_t i = int64_t{blockIdx.x} * 256; i < c.all; i += int64_t{gridDim.x} * 256) {
    __syncthreads();
    c.group == 1 ? place_items<true>(c, static_cast<int>(i))
                 : place_items<false>(c, static_cast<int>(i));
  }
}

}  // namespace mra::cuda
