#include <map>
#include <mutex>
#include <utility>

#include "grid.cuh"

namespace mra::cuda {

// Asking takes a third of a launch's time, so what a kernel may have on a device is remembered. It
// only grows, whichever thread asks: forward and backward launch some kernels from two threads.
cudaError_t allow_shared(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) most = bytes;
  return error;
}

}  // namespace mra::cuda
