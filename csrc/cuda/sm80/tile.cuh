// Tiles of rows in shared memory, filled by cp.async.
#pragma once

#include <climits>

#include "../dtype.cuh"
#include "mma.cuh"
#include "params.h"

namespace mra::cuda {

// Rows are padded by 16 bytes: eight rows of 16 bytes then fall in different banks.
template <typename T, int DP>
inline constexpr int kLd = DP + 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ void copy_16_bytes(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(to)), "l"(from),
               "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group 0;"); }

// tile[r][:] = source(r)[0 .. D), zeros beyond D and where source(r) is null. `anything` is a
// readable address for copies of no bytes.
template <typename T, int DP, int kRows, class Source>
__device__ __forceinline__ void load_rows(T* tile, int D, const void* anything, Source source,
                                          int rows = kRows) {
  constexpr int kChunk = 16 / sizeof(T), kChunks = DP / kChunk;
  for (int c = threadIdx.x; c < rows * kChunks; c += blockDim.x) {
    const int r = c / kChunks, d = c % kChunks * kChunk;
    const T* row = source(r);
    const bool valid = row != nullptr && d < D;
    copy_16_bytes(tile + r * kLd<T, DP> + d, valid ? row + d : anything, valid);
  }
}

// One list of blocks. Kept inside the index whatever a given plan holds.
struct List {
  const int* entries;
  int count;
};
__device__ __forceinline__ List list_of(const Lists& lists, int64_t head, int which) {
  const int64_t at = head * lists.lists + which, start = lists.start[at];
  if (start < 0 || start >= lists.capacity) return {lists.index, 0};
  const int64_t room = lists.capacity - start, count = lists.count[at];
  return {lists.index + head * lists.capacity + start,
          static_cast<int>(count < 0 ? 0 : count < room ? count : room)};
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <typename T>
__device__ __forceinline__ void store_pair(T* p, float x, float y) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float2*>(p) = make_float2(x, y);
  } else {
    *reinterpret_cast<uint32_t*>(p) = Mma<T>::pack(x, y);
  }
}

// Sums of 16 rows x 8 kTiles columns as a warp holds them -> global rows of T. row(r) is null for
// a row that isn't there, addend(r, d) what is added to columns d and d + 1.
template <typename T, int kTiles, class Row, class Addend>
__device__ __forceinline__ void store_rows(const float (&c)[kTiles][4], int n0, int D, Row row,
                                           Addend addend) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* to = row(g + 8 * half);
    if (to == nullptr) continue;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int d = n0 + 8 * n + 2 * t;
      if (d >= D) continue;
      const float2 a = addend(g + 8 * half, d);
      store_pair(to + d, c[n][2 * half] + a.x, c[n][2 * half + 1] + a.y);
    }
  }
}

// Launches `blocks` of `warps` warps with `bytes` of shared memory; no blocks is no launch.
template <class Params>
cudaError_t launch(void (*kernel)(Params), const Params& p, int64_t blocks, int warps, size_t bytes,
                   cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), 32 * warps, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace mra::cuda
