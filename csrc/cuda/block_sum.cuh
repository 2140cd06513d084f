// Sums over the rows of one block, by one warp: the core of pool and of block_rows.
#pragma once

#include <algorithm>

#include "dtype.cuh"

namespace mra::cuda {

constexpr int kMaxBlock = 128;               // rows in a block
constexpr int kBlockWords = kMaxBlock / 32;  // bit r of word g speaks of row 32 g + r

// sum[e] += weigh(r) rows[r, e] over those of 32 rows whose bit in `live` is set; the others are
// not read, so that what they hold (NaN perhaps) cannot leak. kLanes lanes share a row, 16 bytes
// each, and 32 / kLanes rows are read at once: `rows` is this lane's part of the first one it
// reads, l / kLanes for lane l, and `step` is from each to its next. The order of the additions is
// fixed. `halfway` is called behind row 15, unless rows 15 and 16 are read at once (kLanes is 1).
// Every lane of the warp calls this, and all of them call `weigh` and `halfway`.
template <typename T, int kLanes, typename Weigh, typename Halfway>
__device__ __forceinline__ void add_rows(const T* rows, int64_t step, uint32_t live,
                                         const Weigh& weigh, const Halfway& halfway,
                                         float (&sum)[kVec<T>]) {
  constexpr int kRows = 32 / kLanes;
  constexpr int kBatch = kLanes < 8 ? kLanes : 8;  // loads in flight for each lane
  constexpr int kHalf = std::min(kBatch, 16 / kRows);
  const int row_lane = (threadIdx.x % 32) / kLanes;
  live >>= row_lane;
#pragma unroll 1
  for (int k = 0; k < kLanes; k += kBatch) {
    uint4 bits[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      bits[j] = make_uint4(0, 0, 0, 0);
      if (live >> (k + j) * kRows & 1) bits[j] = load16(rows);
      rows += step;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      float v[kVec<T>];
      unpack16<T>(bits[j], v);
      const float w = weigh((k + j) * kRows + row_lane);
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) sum[e] += w * v[e];
      if (j + 1 == kHalf && (k + kHalf) * kRows == 16) halfway();
    }
  }
}

// sum[e] = sum_r weigh(g, r) rows[32 g + r, chunk * kVec + e] over the rows whose bit in `live` is
// set. Lane l has chunk = l % kLanes + a multiple of kLanes; every lane of the same chunk gets the
// sum.
template <typename T, int kLanes, typename Weigh>
__device__ __forceinline__ void block_sum(const T* rows, int64_t stride,
                                          const uint32_t (&live)[kBlockWords], int chunk,
                                          int chunks, const Weigh& weigh, float (&sum)[kVec<T>]) {
  const int64_t step = 32 / kLanes * stride;
  const T* next = rows + (threadIdx.x % 32) / kLanes * stride + int64_t{chunk} * kVec<T>;
#pragma unroll
  for (int e = 0; e < kVec<T>; ++e) sum[e] = 0.f;
#pragma unroll
  for (int g = 0; g < kBlockWords; ++g, next += 32 * stride) {
    if (live[g] == 0) continue;  // the same for the whole warp
    add_rows<T, kLanes>(
        next, step, chunk < chunks ? live[g] : 0, [&](int r) { return weigh(g, r); }, [] {}, sum);
  }
#pragma unroll
  for (int step = kLanes; step < 32; step *= 2) {
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) sum[e] += __shfl_xor_sync(kFullWarp, sum[e], step);
  }
}

// The same sums over the lanes of a chunk, each made by one lane alone: x[e], e < kept, of this
// lane is that of element first_kept + e. Where more lanes share a chunk than it has elements,
// several have the same.
template <int kVec, int kLanes>
inline constexpr int kept = std::max(1, kVec / (32 / kLanes));
template <int kVec, int kLanes>
__device__ __forceinline__ int first_kept() {
  int first = 0;
#pragma unroll
  for (int step = kLanes, half = kVec / 2; step < 32 && half > 0; step *= 2, half /= 2) {
    if (threadIdx.x & step) first += half;
  }
  return first;
}
template <int kLanes, int kVec>
__device__ __forceinline__ void scatter_sums(float (&x)[kVec]) {
#pragma unroll
  for (int step = kLanes, half = kVec / 2; step < 32; step *= 2, half /= 2) {
    if (half == 0) {
      x[0] += __shfl_xor_sync(kFullWarp, x[0], step);
      continue;
    }
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int e = 0; e < half; ++e) {
      const float give = upper ? x[e] : x[e + half], keep = upper ? x[e + half] : x[e];
      x[e] = keep + __shfl_xor_sync(kFullWarp, give, step);
    }
  }
}

// Writes kCount values, rounded to T; `out` is aligned to all of them, or to 16 bytes.
template <int kCount, typename T, int kVec>
__device__ __forceinline__ void store_values(T* out, const float (&v)[kVec]) {
  constexpr int kWords = kCount * sizeof(T) / 4;
  if constexpr (kWords == 0) {
    *out = from_float<T>(v[0]);
  } else {
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      constexpr int kIn = 4 / sizeof(T);
      alignas(4) T word[kIn];
#pragma unroll
      for (int e = 0; e < kIn; ++e) word[e] = from_float<T>(v[kIn * i + e]);
      words[i] = *reinterpret_cast<const uint32_t*>(word);
    }
    if constexpr (kWords == 1) {
      *reinterpret_cast<uint32_t*>(out) = words[0];
    } else if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(out) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        reinterpret_cast<uint4*>(out)[i / 4] =
            make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
      }
    }
  }
}

// Calls f<T, kLanes>() for the element type and for the lanes that a row of `head_dim` takes: the
// smallest power of two that covers its 16-byte chunks, at most 32.
template <typename T, typename F>
cudaError_t dispatch_lanes(int head_dim, const F& f) {
  const int chunks = head_dim / kVec<T>;
  if (chunks <= 1) return f.template operator()<T, 1>();
  if (chunks <= 2) return f.template operator()<T, 2>();
  if (chunks <= 4) return f.template operator()<T, 4>();
  if (chunks <= 8) return f.template operator()<T, 8>();
  if (chunks <= 16) return f.template operator()<T, 16>();
  return f.template operator()<T, 32>();
}

template <typename F>
cudaError_t dispatch_rows(Dtype dtype, int head_dim, const F& f) {
  switch (dtype) {
    case Dtype::f32:
      return dispatch_lanes<float>(head_dim, f);
    case Dtype::f16:
      return dispatch_lanes<__half>(head_dim, f);
    default:
      return dispatch_lanes<__nv_bfloat16>(head_dim, f);
  }
}

}  // namespace mra::cuda
