// How the items of a kernel's work are handed out to persistent blocks of threads.
#pragma once

#include <climits>

namespace mra::cuda::sm90 {

// Two items for a start; the next ones go in order to whoever asks first. Asked for two items
// ahead, so that no block of threads waits for an answer: of each item ask(), behind what else is
// read for it, then advance(). By one warp. `p.queue` is a counter, at zero when the kernel starts,
// `p.items` the number of items. kTeams warps of a block of threads take items each for itself: few
// items are spread over all blocks.
template <class Params, int kTeams = 1>
struct WorkQueue {
  const Params& p;
  unsigned item, next;

  __device__ __forceinline__ explicit WorkQueue(const Params& p, int team = 0)
      : p(p), item(blockIdx.x + gridDim.x * team), next(item + gridDim.x * kTeams) {}
  // The first item; another for a team that comes too late for one.
  __device__ __forceinline__ unsigned first() const {
    return kTeams == 1 ? item : min(item, p.items - 1u);
  }
  __device__ __forceinline__ bool has_item() const { return item < p.items; }
  __device__ __forceinline__ bool has_next() const { return next < p.items; }
  // One lane asks. Not by atomicAdd: the compiler would make it one of all lanes, which share the
  // answer and wait for it right here.
  __device__ __forceinline__ void ask() {
    answer = has_next() ? 0 : p.items;
    if (has_next() && threadIdx.x % 32 == 0) answer = atomicInc(p.queue, INT_MAX);
  }
  __device__ __forceinline__ void advance() {
    item = next;
    unsigned blocks;  // read again each time: no register keeps it
    asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
    // By a reduction, whose result the compiler knows to be the same for all lanes.
    next = 2 * kTeams * blocks + __reduce_max_sync(0xffffffffu, answer);
  }

 private:
  unsigned answer;
};

}  // namespace mra::cuda::sm90
