// The door of every launch in .cu files. On Hopper a kernel may start while the one before it in the
// stream ends (programmatic dependent launch), which hides the launch and its own preparations: it
// calls begin_grid() before it touches memory that other kernels touch.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace mra::cuda {

// Lets the next kernel start, and waits until the ones before have ended. By every thread.
__device__ __forceinline__ void begin_grid() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether the code that runs here is Hopper's: only that has begin_grid's wait in it.
inline bool overlaps_grids() {
#ifdef MRA_SM90A
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
#else
  return false;
#endif
}

// Launches `blocks` blocks of threads with `bytes` of dynamic shared memory; no blocks is no launch.
template <class... Params>
cudaError_t launch_grid(void (*kernel)(Params...), int64_t blocks, int threads, size_t bytes,
                        cudaStream_t stream, const Params&... params) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  if (bytes > 0) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps_grids() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace mra::cuda
