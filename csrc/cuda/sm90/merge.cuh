// Tiles of 64 rows, or keys, that span several blocks with a list each: one warp makes the ascending
// union of the lists, whose entries tell which lists have them. What a list lacks is skipped by the
// warps whose rows are its own.
#pragma once

#include "../sm80/tile.cuh"

namespace mra::cuda::sm90 {

// Blocks that merged lists may name: more of them are left to the generic kernels.
inline constexpr int kMaxMerged = 4096;

struct MergedEntry {
  uint32_t bits;
  __device__ int block() const { return bits & 0xffffff; }
  __device__ uint32_t lists() const { return bits >> 24; }  // one bit each
};

// Words of shared memory for lists of blocks 0 .. blocks: a bitmap each and, of several, the union.
__host__ __device__ constexpr int list_words(int lists, int blocks) {
  return lists * ((blocks + 31) / 32) + (lists > 1 ? blocks : 0);
}

// One bit for each of the list's blocks, by one warp.
__device__ inline void mark(uint32_t* bitmap, const List& list, int blocks) {
  for (int i = threadIdx.x % 32; i < list.count; i += 32) {
    const unsigned y = list.entries[i];
    if (y < static_cast<unsigned>(blocks)) atomicOr(bitmap + y / 32, 1u << y % 32);
  }
}

// Lists `first` to `first` + kLists - 1 of a head, as far as they exist, marked in `space`
// (list_words) and, of several, merged behind the bitmaps. Returns the length of the union.
template <int kLists>
__device__ int read_lists(const Lists& lists, int64_t head, int first, int blocks,
                          uint32_t* space) {
  const int lane = threadIdx.x % 32, words = (blocks + 31) / 32;
  __syncwarp();
  for (int i = lane; i < kLists * words; i += 32) space[i] = 0;
  __syncwarp();
#pragma unroll
  for (int l = 0; l < kLists; ++l) {
    if (first + l < lists.lists) mark(space + l * words, list_of(lists, head, first + l), blocks);
  }
  __syncwarp();
  if constexpr (kLists == 1) return 0;
  uint32_t* entries = space + kLists * words;
  int count = 0;
  for (int w0 = 0; w0 < words; w0 += 32) {
    const int w = w0 + lane;
    uint32_t own[kLists], any = 0;
#pragma unroll
    for (int l = 0; l < kLists; ++l) {
      own[l] = w < words ? space[l * words + w] : 0;
      any |= own[l];
    }
    const int mine = __popc(any);
    int sum = mine;  // of the words up to this lane's
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    for (int at = count + sum - mine; any != 0; any &= any - 1) {
      const int bit = __ffs(static_cast<int>(any)) - 1;
      uint32_t which = 0;
#pragma unroll
      for (int l = 0; l < kLists; ++l) which |= (own[l] >> bit & 1) << l;
      entries[at++] = 32 * w + bit | which << 24;
    }
    count += __shfl_sync(0xffffffffu, sum, 31);
  }
  __syncwarp();
  return count;
}

// Of a tile of 64 that is gathered in runs of `run`, a lane each: four bits a list, one for each
// sixteen that it has. `lists`: those that have this lane's run.
__device__ inline uint32_t wanted_sixteens(uint32_t lists, int run) {
  const int lane = threadIdx.x % 32, each = run / 16;
  uint32_t wanted = 0;
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    if (lists >> l & 1) wanted |= ((1u << each) - 1) << (4 * l + each * lane);
  }
  return __reduce_or_sync(0xffffffffu, lane * run < 64 ? wanted : 0);
}

// Of a left operand of 64 columns the sixteens that are wanted, zeros for the others. A branch around
// the work on those would serialise the products.
template <int kLists>
__device__ __forceinline__ void keep_wanted(uint32_t (&a)[4][4], unsigned wanted) {
  if constexpr (kLists == 1) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t mask = wanted >> j & 1 ? ~0u : 0u;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[j][i] &= mask;
  }
}

}  // namespace mra::cuda::sm90
