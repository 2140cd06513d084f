// What the kernels share that take one block of threads for a key head: of so many threads where
// heads are few or long, else of few, so that a multiprocessor has several heads in hand.
#pragma once

#include <type_traits>

#include "grid.cuh"

namespace mra::cuda {

constexpr int kHeadThreads = 1024, kShortHeadThreads = 256;

// f(integral_constant<int, threads>), for heads of `items` things to add up.
template <class F>
cudaError_t by_length(int64_t items, F f) {
  return items <= 64 ? f(std::integral_constant<int, kShortHeadThreads>{})
                     : f(std::integral_constant<int, kHeadThreads>{});
}

// A thread has four columns of `quads` times four, items in turns.
template <int kThreads>
struct Turns {
  int quads, turns, turn, quad;

  __device__ __forceinline__ explicit Turns(int quads) : quads(quads), turns(kThreads) {
    while (turns * quads > kThreads) turns /= 2;
    turn = threadIdx.x / quads, quad = threadIdx.x % quads;
  }

  // Sum of item(0) to item(count - 1), this thread's columns of each: what turn 0 returns, and
  // leaves in sums[quad] without a barrier behind it.
  template <class Item>
  __device__ __forceinline__ float4 sum(float4 (&sums)[kThreads], int count,
                                        const Item& item) const {
    float4 sum{};
    const auto add = [&](const float4& u) {
      sum.x += u.x, sum.y += u.y, sum.z += u.z, sum.w += u.w;
    };
    if (turn < turns) {
#pragma unroll 4
      for (int i = turn; i < count; i += turns) add(item(i));
      sums[threadIdx.x] = sum;
    }
    for (int step = turns / 2; step > 0; step /= 2) {
      __syncthreads();
      if (turn < step) {
        add(sums[threadIdx.x + step * quads]);
        sums[threadIdx.x] = sum;
      }
    }
    return sum;
  }
};

}  // namespace mra::cuda
