// The key blocks that a block of threads takes in turns, and the lists of rows that the warp which
// fetches for their gradients reads: one for each query head of a key head. Where they lie is asked
// for a key block ahead, and their first entries a head ahead, as a warp that waits for memory has
// nothing to do meanwhile.
#pragma once

#include "../sm80/tile.cuh"
#include "queue.cuh"

namespace mra::cuda::sm90 {

// Tile: the keys of an item, made from it; `tiles` of rows attend them. Items are taken in the
// order p.order, or as they come where that is null.
template <class Maps, class Tile, int kTeams = 1>
struct ColumnTiles {
  const Maps& p;
  ListPlace (&places)[2][32];  // of the lists of this tile of keys and of the next
  WorkQueue<Maps, kTeams> queue;
  int turn = 0;

  __device__ ColumnTiles(const Maps& p, ListPlace (&places)[2][32], int team = 0)
      : p(p), places(places), queue(p, team) {
    ask(first(), 0);
    answered();
  }

  __device__ __forceinline__ bool has_tile() const { return queue.has_item(); }
  // The tile whose turn it is. tiles_of(entries): tiles of rows of a list.
  template <class TilesOf>
  __device__ __forceinline__ Tile take(const TilesOf& tiles_of) {
    Tile at = tile_of(queue.item);
    int sum = 0;
    for (int i = threadIdx.x % 32; i < p.group; i += 32) sum += tiles_of(list_of(at, i).count);
    at.tiles = __reduce_add_sync(kFullWarp, sum);
    ask(next(), turn + 1);
    queue.ask();
    return at;
  }
  __device__ __forceinline__ void advance() {
    queue.advance();
    ++turn;
  }

  // List i of that tile.
  __device__ __forceinline__ List list_of(const Tile& at, int i) const {
    return list_of(at, turn, i);
  }
  __device__ __forceinline__ List first_of_first() const { return list_of(first(), 0, 0); }
  __device__ __forceinline__ List first_of_next() const {
    answered();
    return list_of(next(), turn + 1, 0);
  }

 private:
  __device__ __forceinline__ Tile tile_of(unsigned i) const {
    // Not by a branch: it would cost the consumers their uniform descriptors.
    unsigned item = i;
    asm volatile("{\n.reg .pred p;\nsetp.ne.u64 p, %1, 0;\n@p ld.global.u32 %0, [%2];\n}"
                 : "+r"(item)
                 : "l"(p.order), "l"(p.order + i));
    return Tile(p, item);
  }
  // Of a team that comes too late, some tile.
  __device__ __forceinline__ Tile first() const { return tile_of(queue.first()); }
  __device__ __forceinline__ Tile next() const {
    return tile_of(queue.has_next() ? queue.next : 0);
  }
  // By one warp, a head a lane. No register waits for the answer.
  __device__ __forceinline__ void ask(const Tile& at, int turn) const {
    const Lists& lists = p.column_lists;
    const int lane = threadIdx.x % 32, head = at.first_head(p) + min(lane, p.group - 1);
    // No branch around the copies: it would cost the consumers their uniform descriptors.
    const int64_t from = static_cast<int64_t>(head) * lists.lists + at.list(p);
    copy_4_bytes(&places[turn % 2][lane].start, lists.start + from, true);
    copy_4_bytes(&places[turn % 2][lane].count, lists.count + from, true);
    commit_copies();
  }
  static __device__ __forceinline__ void answered() {
    wait_for_copies();
    __syncwarp();
  }
  __device__ __forceinline__ List list_of(const Tile& at, int turn, int i) const {
    const int head = at.first_head(p) + i;
    return i < 32 ? list_at(p.column_lists, head, places[turn % 2][i])
                  : cuda::list_of(p.column_lists, head, at.list(p));
  }
};

}  // namespace mra::cuda::sm90
