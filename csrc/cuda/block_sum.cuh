// Sum over the rows of one block, by one warp: the core of pool and of block_rows.
#pragma once

#include "dtype.cuh"

namespace mra::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxBlock = 128;               // rows in a block
constexpr int kBlockWords = kMaxBlock / 32;  // bit r of word g speaks of row 32 g + r

// sum[e] = sum_r weigh(g, r) rows[32 g + r, chunk * kVec + e] over the rows whose bit in `live` is
// set; the others are not read, so that what they hold (NaN perhaps) cannot leak. kLanes lanes
// share a row, 16 bytes each, and 32 / kLanes rows are read at once; lane l has
// chunk = l % kLanes + a multiple of kLanes. The order of the additions is fixed. Every lane of the
// warp calls this, and every lane of the same chunk gets the sum. `weigh` is called by all lanes.
template <typename T, int kLanes, typename Weigh>
__device__ __forceinline__ void block_sum(const T* rows, int64_t stride,
                                          const uint32_t (&live)[kBlockWords], int chunk,
                                          int chunks, const Weigh& weigh, float (&sum)[kVec<T>]) {
  constexpr int kRows = 32 / kLanes;
  constexpr int kBatch = kLanes < 8 ? kLanes : 8;  // loads in flight for each lane
  const int row_lane = (threadIdx.x % 32) / kLanes;
  const int64_t step = kRows * stride;
  const T* next = rows + row_lane * stride + int64_t{chunk} * kVec<T>;
#pragma unroll
  for (int e = 0; e < kVec<T>; ++e) sum[e] = 0.f;
#pragma unroll
  for (int g = 0; g < kBlockWords; ++g) {
    if (live[g] == 0) {  // the same for the whole warp
      next += 32 * stride;
      continue;
    }
    const uint32_t word = chunk < chunks ? live[g] >> row_lane : 0;
#pragma unroll 1
    for (int k = 0; k < kLanes; k += kBatch) {
      uint4 bits[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        bits[j] = make_uint4(0, 0, 0, 0);
        if (word >> (k + j) * kRows & 1) bits[j] = load16(next);
        next += step;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        float v[kVec<T>];
        unpack16<T>(bits[j], v);
        const float w = weigh(g, (k + j) * kRows + row_lane);
#pragma unroll
        for (int e = 0; e < kVec<T>; ++e) sum[e] += w * v[e];
      }
    }
  }
#pragma unroll
  for (int step = kLanes; step < 32; step *= 2) {
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) sum[e] += __shfl_xor_sync(kFullWarp, sum[e], step);
  }
}

// Writes one chunk of a row of floats; `out` is 16-byte aligned.
template <int kCount>
__device__ __forceinline__ void store_floats(float* out, const float (&v)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; e += 4) {
    *reinterpret_cast<float4*>(out + e) = make_float4(v[e], v[e + 1], v[e + 2], v[e + 3]);
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
