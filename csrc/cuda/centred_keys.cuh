// The keys and the sample of queries that centred_weights.cu multiplies, as mma.sync takes them.
#pragma once

#include "centred.h"
#include "sm80/tile.cuh"

namespace mra::cuda {

// c += the products of sixteen keys with eight rows: `u`, `w` and `r` are the same 16 bytes of keys
// g and g + 8 and of row g.
template <typename T>
__device__ __forceinline__ void multiply_piece(float (&c)[4], uint4 u, uint4 w, uint4 r,
                                               bool tf32) {
  using Mm = Mma<T>;
  const auto word = [](uint32_t x) {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(x);
    } else {
      return x;
    }
  };
  const typename Mm::A first{{word(u.x), word(w.x), word(u.y), word(w.y)}};
  const typename Mm::A second{{word(u.z), word(w.z), word(u.w), word(w.w)}};
  const typename Mm::B right{{word(r.x), word(r.y), word(r.z), word(r.w)}};
  Mm::mma(c, first, right, 0, tf32);
  Mm::mma(c, second, right, 1, tf32);
}

// Sixteen keys as left operands. Lane t of four holds the 16 bytes t of each 64 of rows g and g +
// 8: the inner index of the product is permuted, in both operands alike. They come in steps of
// kMost such 64 bytes.
template <typename T, int DP, int kMost>
struct Keys {
  static constexpr int kPanel = 4 * kVec<T>, kPanels = DP / kPanel;
  static constexpr int kHold = kPanels < kMost ? kPanels : kMost, kSteps = kPanels / kHold;
  struct Part {
    uint4 x[kHold][2];
  };

  const T* base;
  int64_t stride;
  int M, D;
  const uint8_t* mask;

  __device__ __forceinline__ Keys(const WeightsParams& p, int b, int hk)
      : base(static_cast<const T*>(p.k) + b * p.k_strides.b + hk * p.k_strides.h),
        stride(p.k_strides.l),
        M(p.M),
        D(p.D),
        mask(p.mask == nullptr ? nullptr : p.mask + int64_t{b} * p.M) {}

  __device__ __forceinline__ bool valid(int j) const {
    return j < M && (mask == nullptr || mask[j]);
  }
  // Step `step` of keys `first` to first + 15; zeros beyond the end.
  __device__ __forceinline__ Part load(int first, int step) const {
    Part part;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = first + g + 8 * half;
      const T* row = base + j * stride;
#pragma unroll
      for (int h = 0; h < kHold; ++h) {
        const int d = (step * kHold + h) * kPanel + t * kVec<T>;
        part.x[h][half] = j < M && d < D ? load16(row + d) : uint4{};
      }
    }
    return part;
  }
  // c[n] += their products with rows 8 n to 8 n + 7 of those in shared memory.
  template <int kTiles>
  static __device__ __forceinline__ void multiply(float (&c)[kTiles][4], const Part& part, int step,
                                                  const T* rows, bool tf32) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < kHold; ++h) {
      const T* from = rows + g * kLd<T, DP> + (step * kHold + h) * kPanel + t * kVec<T>;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint4 r = *reinterpret_cast<const uint4*>(from + 8 * n * kLd<T, DP>);
        multiply_piece<T>(c[n], part.x[h][0], part.x[h][1], r, tf32);
      }
    }
  }
};

// The first kRows rows of the sample to shared memory.
template <typename T, int DP, int kRows>
__device__ __forceinline__ void load_sample(const WeightsParams& p, T* rows) {
  constexpr int kPieces = DP / kVec<T>;
  const T* from =
      static_cast<const T*>(p.rows) + int64_t{blockIdx.x / p.chunks} * kSampleRows * p.D;
  for (int e = threadIdx.x; e < kRows * kPieces; e += blockDim.x) {
    const int row = e / kPieces, d = e % kPieces * kVec<T>;
    *reinterpret_cast<uint4*>(rows + row * kLd<T, DP> + d) =
        d < p.D ? load16(from + row * p.D + d) : uint4{};
  }
}

}  // namespace mra::cuda
