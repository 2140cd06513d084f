// The lists of rows that the warp which fetches for a key block's gradients reads: one for each
// query head of its key head. Where they lie is asked for a key block ahead, and their first
// entries a head ahead, as a warp that waits for memory has nothing to do meanwhile.
#pragma once

#include "../sm80/tile.cuh"

namespace mra::cuda::sm90 {

// Asks where the column lists of a key block lie, one for each query head of its key head, from
// `head` of all batch entries on: by one warp, a head a lane. No register waits for the answer; it
// is there behind wait_for_copies().
__device__ __forceinline__ void ask_for_lists(ListPlace (&places)[32], const Lists& lists, int head,
                                              int group, int block) {
  const int lane = threadIdx.x % 32;
  // No branch around the copies: it would cost the consumers their uniform descriptors.
  const int64_t at = static_cast<int64_t>(head + min(lane, group - 1)) * lists.lists + block;
  copy_4_bytes(&places[lane].start, lists.start + at, true);
  copy_4_bytes(&places[lane].count, lists.count + at, true);
  commit_copies();
}

// List i of these.
__device__ __forceinline__ List list_of_head(const ListPlace (&places)[32], const Lists& lists,
                                             int head, int i, int block) {
  return i < 32 ? list_at(lists, head + i, places[i]) : list_of(lists, head + i, block);
}

// Sum of tiles_of(entries) over all of these.
template <class TilesOf>
__device__ __forceinline__ int tiles_of_lists(const ListPlace (&places)[32], const Lists& lists,
                                              int head, int group, int block,
                                              const TilesOf& tiles_of) {
  int sum = 0;
  for (int i = threadIdx.x % 32; i < group; i += 32) {
    sum += tiles_of(list_of_head(places, lists, head, i, block).count);
  }
  return __reduce_add_sync(kFullWarp, sum);
}

}  // namespace mra::cuda::sm90
