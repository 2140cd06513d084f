// The door of every launch in .cu files.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace mra::cuda {

// Launches `blocks` blocks of threads with `bytes` of dynamic shared memory; no blocks is no
// launch.
template <class... Params, class... Arguments>
cudaError_t launch_grid(void (*kernel)(Params...), int64_t blocks, int threads, size_t bytes,
                        cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  if (bytes > 0) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace mra::cuda
