// cp.async: copies of a thread from global to shared memory that it need not wait for, by groups.
// Not `valid`: zeros, and nothing is read.
#pragma once

#include "mma.cuh"

namespace mra::cuda {

__device__ __forceinline__ void copy_16_bytes(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(to)), "l"(from),
               "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void copy_16_bytes(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(to)), "l"(from));
}
__device__ __forceinline__ void copy_4_bytes(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_address(to)), "l"(from),
               "r"(valid ? 4 : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
// For all groups but the last kPending.
template <int kPending = 0>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}

}  // namespace mra::cuda
