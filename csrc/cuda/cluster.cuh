// Blocks of threads that have one piece of work between them, as a cluster, and write to each
// other's shared memory (compute capability 9.0).
#pragma once

#include "grid.cuh"

namespace mra::cuda {

// Blocks of threads of a cluster; launch_grid takes as many.
constexpr int kMostOfCluster = 8;

// This block's place in its cluster; where kMany is false it is by itself.
template <bool kMany>
class Cluster {
 public:
  int rank = 0, blocks = 1;

  __device__ __forceinline__ Cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (kMany) {
      asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
      asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
    }
#endif
  }

  // All threads of all blocks meet; what each has written, anywhere, is seen by all.
  __device__ __forceinline__ void meet() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (kMany) {
      asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }

  // Where block `of` has what this one has at `here`, both in shared memory. Not before the first
  // meeting, as it may not have started, and not behind the last, as it may have ended.
  template <class T>
  __device__ __forceinline__ T* at(T* here, int of) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (kMany) {
      T* there;
      asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(of));
      return there;
    }
#endif
    return here;
  }
};

}  // namespace mra::cuda
