// Products of one warp's 16 rows by mma.sync, for blocks too short for a warpgroup: its operands
// come from panels as the bulk tensor copies leave them (wgmma.cuh), each warp at its own pace. The
// sizes of fragments and accumulators say how many columns of the panels count.
#pragma once

#include "../sm80/mma.cuh"

namespace mra::cuda::sm90 {

// Where the swizzle of a panel of kColumns has put the 16 bytes `chunk` of a row.
template <int kColumns>
__device__ __forceinline__ int swizzled(int chunk, unsigned row) {
  return chunk ^ static_cast<int>(kColumns == 64 ? row % 8 : row / 2 % 4);
}

// Byte offsets in a panel of the 16 bytes that ldmatrix takes from this lane, for 16 of its
// columns: columns 16 i on lie where the swizzle has put those of i = 0, but for two bits.
template <int kColumns = 64>
struct PanelLane {
  static constexpr int kRowBytes = 2 * kColumns;
  uint32_t row, key;

  __device__ __forceinline__ explicit PanelLane(int lane = threadIdx.x % 32) {
    const int of_pair = lane % 8 + lane / 16 * 8;
    row = lane % 16 * kRowBytes + swizzled<kColumns>(lane / 16, lane) * 16;
    key = of_pair * kRowBytes + swizzled<kColumns>(lane / 8 % 2, lane) * 16;
  }
  // Operands stored [m][k] or, transposed, [k][n]: 16 rows.
  __device__ __forceinline__ uint32_t rows(int i) const { return row ^ 32 * i; }
  // Stored [n][k] or, transposed, [k][m]: 16 rows, in the order of two tiles of eight.
  __device__ __forceinline__ uint32_t keys(int i) const { return key ^ 32 * i; }
};

template <int kRows, int kColumns>
__device__ __forceinline__ auto as_panel(const uint16_t (&rows)[kRows][kColumns]) -> const
    uint16_t (&)[1][kRows][kColumns] {
  return reinterpret_cast<const uint16_t(&)[1][kRows][kColumns]>(rows);
}

// A warp's 16 rows, from row `first` of panels of kRows, as left operands.
template <typename T, int kSteps, int kPanels, int kRows>
__device__ __forceinline__ void load_rows(typename Mma<T>::A (&a)[kSteps],
                                          const uint16_t (&from)[kPanels][kRows][64], int first,
                                          const PanelLane<>& lane) {
  const uint32_t base = smem_address(from) + first * 128;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    ldmatrix_x4<false>(a[i].r, base + i / 4 * kRows * 128 + lane.rows(i % 4));
  }
}

// c += A B^T over 16 kSteps columns, those from 16 i on of A as left(i) gives them: B of as many
// rows as c has columns or more.
template <typename T, int kSteps, int kTiles, int kPanels, int kRows, int kColumns, class Left>
__device__ __forceinline__ void multiply_nt(float (&c)[kTiles][4], const Left& left,
                                            const uint16_t (&b)[kPanels][kRows][kColumns],
                                            const PanelLane<kColumns>& lane) {
  static_assert(8 * kTiles <= kRows);
  constexpr int kEach = kColumns / 16, kRow = 2 * kColumns;
  const uint32_t base = smem_address(b);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const typename Mma<T>::A a = left(i);
    typename Mma<T>::B fb[kTiles / 2];
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      ldmatrix_x4<false>(fb[n].r,
                         base + (i / kEach * kRows + 16 * n) * kRow + lane.keys(i % kEach));
    }
    Mma<T>::mma(c, 0, a, fb, false);
  }
}

// The same with the left rows, from row `first` of panels of kLeft, read again from where they lie.
template <typename T, int kSteps, int kTiles, int kPanels, int kLeft, int kRows>
__device__ __forceinline__ void multiply_nt(float (&c)[kTiles][4],
                                            const uint16_t (&a)[kPanels][kLeft][64], int first,
                                            const uint16_t (&b)[kPanels][kRows][64],
                                            const PanelLane<>& lane) {
  const uint32_t base = smem_address(a) + first * 128;
  const auto left = [&](int i) {
    typename Mma<T>::A rows;
    ldmatrix_x4<false>(rows.r, base + i / 4 * kLeft * 128 + lane.rows(i % 4));
    return rows;
  };
  multiply_nt<T, kSteps>(c, left, b, lane);
}

// acc += P B: P of 8 kInner columns in accumulators, B of as many rows or more.
template <typename T, int kTiles, int kInner, int kPanels, int kRows, int kColumns>
__device__ __forceinline__ void multiply_pn(float (&acc)[kTiles][4], const float (&p)[kInner][4],
                                            const uint16_t (&b)[kPanels][kRows][kColumns],
                                            const PanelLane<kColumns>& lane) {
  static_assert(8 * kInner <= kRows);
  constexpr int kPairs = kTiles / kPanels / 2, kRow = 2 * kColumns;
  const uint32_t base = smem_address(b);
#pragma unroll
  for (int k = 0; k < kInner / 2; ++k) {
    const typename Mma<T>::A a = Mma<T>::from_accumulator(p, k);
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      typename Mma<T>::B fb[kPairs];
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        ldmatrix_x4<true>(fb[n].r, base + (i * kRows + 16 * k) * kRow + lane.rows(n));
      }
      Mma<T>::mma(acc, kColumns / 8 * i, a, fb, false);
    }
  }
}

// x = A times a matrix, whose columns from 0 on are `first`, from 64 on `second`.
template <typename T, int kTiles, int kPanels>
__device__ __forceinline__ void multiply_matrix(float (&x)[kTiles][4],
                                                const typename Mma<T>::A (&a)[kTiles / 2],
                                                const uint16_t (&first)[kPanels][64][64],
                                                const uint16_t (&second)[kPanels][64][64],
                                                const PanelLane<>& lane) {
  constexpr int kPairs = kTiles / kPanels / 2;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = 0.f;
  }
#pragma unroll
  for (int i = 0; i < kPanels; ++i) {
    const uint32_t base = smem_address(i == 0 ? first : second);
#pragma unroll
    for (int k = 0; k < kTiles / 2; ++k) {
      typename Mma<T>::B fb[kPairs];
#pragma unroll
      for (int n = 0; n < kPairs; ++n) ldmatrix_x4<true>(fb[n].r, base + k * 2048 + lane.rows(n));
      Mma<T>::mma(x, 8 * i, a[k], fb, false);
    }
  }
}

// A warp's 16 rows of accumulators as rows `first` on of panels.
template <typename T, int kTiles, int kPanels, int kRows>
__device__ __forceinline__ void place_rows(uint16_t (&to)[kPanels][kRows][64], int first,
                                           const float (&c)[kTiles][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint16_t* at = &to[n / 8][first + g + 8 * half][(n % 8 ^ g) * 8 + 2 * t];
      *reinterpret_cast<uint32_t*>(at) = Mma<T>::pack(c[n][2 * half], c[n][2 * half + 1]);
    }
  }
}

}  // namespace mra::cuda::sm90
