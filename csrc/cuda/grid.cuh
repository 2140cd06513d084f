// The door of every launch in .cu files.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace mra::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// What lanes 0 .. this one have, of which the first kLanes count; by a whole warp.
template <int kLanes = 32>
__device__ __forceinline__ int sum_up_to_lane(int x, int lane) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int before = __shfl_up_sync(kFullWarp, x, step);
    if (lane >= step) x += before;
  }
  return x;
}

// How blocks of threads run together. Compute capability 9.0.
struct Together {
  // A kernel may start while the one launched before it still runs, if it is launched `beside` that
  // one and does not depend on it: it then starts once every block of threads of the other has
  // called let_next_start or has ended. Its own block 0 ends with wait_for_previous, so that
  // whatever is launched behind it finds both done.
  bool beside = false;
  int cluster = 1;  // blocks of threads of a cluster, a divisor of their number (cluster.cuh)
};
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Sets the two counters of a plan's queues to zero, by the first block of threads.
__device__ __forceinline__ void clear_queues(int32_t* queues) {
  if (blockIdx.x == 0 && threadIdx.x < 2) queues[threadIdx.x] = 0;
}

// Lets a kernel have `bytes` of dynamic shared memory, or more.
cudaError_t allow_shared(const void* kernel, int bytes);

// Launches `blocks` blocks of threads with `bytes` of dynamic shared memory; no blocks is no
// launch.
template <class... Params, class... Arguments>
cudaError_t launch_grid(void (*kernel)(Params...), int64_t blocks, int threads, size_t bytes,
                        cudaStream_t stream, Together together, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  if (bytes > 0) {
    const cudaError_t error =
        allow_shared(reinterpret_cast<const void*>(kernel), static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (together.beside) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (together.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(together.cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(arguments)...);
}
template <class... Params, class... Arguments>
cudaError_t launch_grid(void (*kernel)(Params...), int64_t blocks, int threads, size_t bytes,
                        cudaStream_t stream, const Arguments&... arguments) {
  return launch_grid(kernel, blocks, threads, bytes, stream, Together{}, arguments...);
}

}  // namespace mra::cuda
