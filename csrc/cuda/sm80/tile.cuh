// Tiles of rows in shared memory, filled by cp.async.
#pragma once

#include <climits>

#include "../dtype.cuh"
#include "../grid.cuh"
#include "async_copy.cuh"
#include "mma.cuh"
#include "params.h"

namespace mra::cuda {

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Rows are padded by 16 bytes: eight rows of 16 bytes then fall in different banks.
template <typename T, int DP>
inline constexpr int kLd = DP + 16 / static_cast<int>(sizeof(T));

// Sixteen consecutive rows of a tile, copied by one warp from row `first` of `from` on.
template <typename T, int DP>
struct SixteenRows {
  static constexpr int kChunk = 16 / sizeof(T), kChunks = DP / kChunk;
  static constexpr int kLanes = kChunks < 32 ? kChunks : 32, kStep = 32 / kLanes;

  // All sixteen, of DP columns.
  static __device__ __forceinline__ void copy(T* tile, const T* from, int stride, int first) {
    const int lane = threadIdx.x % 32, r0 = lane / kLanes, d0 = lane % kLanes * kChunk;
    const T* row = from + d0 + static_cast<int64_t>(first + r0) * stride;
    T* to = tile + r0 * kLd<T, DP> + d0;
#pragma unroll
    for (int r = 0; r < 16; r += kStep, row += kStep * stride) {
#pragma unroll
      for (int c = 0; c < kChunks; c += 32) {
        copy_16_bytes(to + r * kLd<T, DP> + c * kChunk, row + c * kChunk);
      }
    }
  }

  // The first `present` of them, of D columns: zeros elsewhere. `anything` is a readable address
  // for copies of no bytes.
  static __device__ __forceinline__ void copy_some(T* tile, const T* from, int stride, int first,
                                                   int present, int D, const void* anything) {
    const int lane = threadIdx.x % 32, r0 = lane / kLanes, d0 = lane % kLanes * kChunk;
#pragma unroll 1
    for (int r = r0; r < 16; r += kStep) {
      const T* row = from + static_cast<int64_t>(first + r) * stride;
#pragma unroll
      for (int d = d0; d < DP; d += 32 * kChunk) {
        const bool valid = r < present && d < D;
        copy_16_bytes(tile + r * kLd<T, DP> + d, valid ? row + d : anything, valid);
      }
    }
  }
};

// As many of sixteen rows as there are, whatever D.
template <typename T, int DP>
__device__ __forceinline__ void copy_sixteen(T* tile, const T* from, int stride, int first,
                                             int present, int D, const void* anything) {
  using Rows = SixteenRows<T, DP>;
  if (present >= 16 && D == DP)
    Rows::copy(tile, from, stride, first);
  else
    Rows::copy_some(tile, from, stride, first, present, D, anything);
}

// The warp of this thread, known to be the same for all of its lanes.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
}

// One list of blocks. Kept inside the index whatever a given plan holds.
struct List {
  const int* entries;
  int count;
};
// Where a list of a head lies, as it was read: nothing waits for that until list_at.
struct ListPlace {
  int start, count;
};
__device__ __forceinline__ ListPlace place_of_list(const Lists& lists, int64_t head, int which) {
  const int64_t at = head * lists.lists + which;
  return {lists.start[at], lists.count[at]};
}
__device__ __forceinline__ List list_at(const Lists& lists, int64_t head, const ListPlace& place) {
  const int64_t start = place.start, count = place.count, room = lists.capacity - start;
  if (start < 0 || room <= 0) return {lists.index, 0};
  return {lists.index + head * lists.capacity + start, static_cast<int>(count < 0      ? 0
                                                                        : count < room ? count
                                                                                       : room)};
}
__device__ __forceinline__ List list_of(const Lists& lists, int64_t head, int which) {
  return list_at(lists, head, place_of_list(lists, head, which));
}

// For how many keys each pooled key of a key head stands, [nk]: bits that nothing waits for until
// mass_of.
__device__ __forceinline__ const int* masses_of(const Problem& p, int b, int hk) {
  if (p.pooled_mass == nullptr) return p.key_count + static_cast<int64_t>(b) * p.nk;
  return reinterpret_cast<const int*>(p.pooled_mass) + (static_cast<int64_t>(b) * p.Hk + hk) * p.nk;
}
__device__ __forceinline__ float mass_of(const Problem& p, int bits) {
  return p.pooled_mass == nullptr ? static_cast<float>(bits) : __int_as_float(bits);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

// Sums over the columns of a warp's 16 rows, added to those of the tiles before, which shared
// memory holds in `sums`; with the last of `tiles` tiles they go `to` the rows that are present.
// Each is written and read by one thread.
template <int kTiles>
__device__ __forceinline__ void sum_columns(const float (&c)[kTiles][4], float* sums, int tile,
                                            int tiles, float* to, int present) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = g + 8 * half;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) sum += c[n][2 * half] + c[n][2 * half + 1];
    sum = quad_sum(sum);
    if (threadIdx.x % 4 != 0) continue;
    if (tile > 0) sum += sums[r];
    sums[r] = sum;
    if (tile + 1 == tiles && r < present) to[r] = sum;
  }
}

template <typename T>
__device__ __forceinline__ void store_pair(T* p, float x, float y) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float2*>(p) = make_float2(x, y);
  } else {
    *reinterpret_cast<uint32_t*>(p) = Mma<T>::pack(x, y);
  }
}

// c times each row's factor, plus `block` [D] (or null) for the rows that are live; zeros for
// others.
template <int kTiles>
__device__ __forceinline__ void finish_rows(float (&c)[kTiles][4], const float (&factor)[2],
                                            const bool (&live)[2], const float* block, int n0,
                                            int D) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int d = n0 + 8 * n + 2 * t;
    float2 u = make_float2(0.f, 0.f);
    if (block != nullptr && d < D) u = *reinterpret_cast<const float2*>(block + d);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c[n][i] = live[i / 2] ? fmaf(c[n][i], factor[i / 2], i % 2 ? u.y : u.x) : 0.f;
    }
  }
}

// Sums of 16 rows x 8 kTiles columns as a warp holds them -> rows of T from `to` on, `present` of
// them, columns n0 .. of D.
template <typename T, int kTiles>
__device__ __forceinline__ void store_rows(const float (&c)[kTiles][4], T* to, int64_t stride,
                                           int present, int n0, int D) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = g + 8 * half;
    if (r >= present) continue;
    T* row = to + r * stride + n0 + 2 * t;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n0 + 8 * n + 2 * t >= D) break;
      store_pair(row + 8 * n, c[n][2 * half], c[n][2 * half + 1]);
    }
  }
}
// Adds to such sums what those rows hold, where they are live.
template <typename T, int kTiles>
__device__ __forceinline__ void add_rows(float (&c)[kTiles][4], const T* from, int64_t stride,
                                         int present, int n0, int D, const bool (&live)[2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = g + 8 * half;
    if (r >= present || !live[half]) continue;
    const T* row = from + r * stride + n0 + 2 * t;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n0 + 8 * n + 2 * t >= D) break;
      const float2 u = load_pair(row + 8 * n);
      c[n][2 * half] += u.x;
      c[n][2 * half + 1] += u.y;
    }
  }
}

// f(integral_constant<int, warps>), warps in 1, 2, 4, 8.
template <class F>
auto with_warps(int warps, F f) {
  switch (warps) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, 8>{});
  }
}

}  // namespace mra::cuda
