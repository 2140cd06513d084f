// Hopper's warpgroup products: D[64 x N] += A[64 x 16] B[16 x N] by wgmma, for bfloat16 and float16
// with float accumulators, laid out in each warp as mma.sync's (sm80/mma.cuh): warp w of the group
// holds rows 16 w to 16 w + 15.
//
// Operands in shared memory lie in panels of 64 columns, 128 bytes a row, as the bulk tensor copy
// with a swizzle of 128 bytes leaves them; a panel starts on a multiple of 1024 bytes. Or, where it
// says so, of 32 columns with a swizzle of 64 bytes.
#pragma once

#include "../sm80/mma.cuh"

namespace mra::cuda::sm90 {

// Matrix descriptor of a swizzled panel: `leading` is the distance in bytes between panels of
// kColumns columns (read for operands stored with the product's inner dimension in rows only).
template <int kColumns = 64>
__device__ __forceinline__ uint64_t descriptor(const void* panel, int leading = 16,
                                               uint32_t more = 0) {
  constexpr uint64_t kSwizzle = (kColumns == 64 ? 1ull : 2ull) << 62;
  constexpr uint64_t kEightRows = 16 * kColumns >> 4;
  // Put together from two words, so that what is added stays in the first.
  const uint32_t low =
      (smem_address(panel) >> 4) + (static_cast<uint32_t>(leading >> 4) << 16) + more;
  return kSwizzle | kEightRows << 32 | low;
}

// The same value in every lane: tells the compiler so, which keeps what derives from it,
// descriptors above all, out of the lanes' registers.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Moves registers between the warpgroups of a block of threads; every warp of a group takes part.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Keeps the compiler from moving reads and writes of accumulators across a product in flight.
template <int kTiles>
__device__ __forceinline__ void pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
  }
}

// N / 8 tiles of accumulators. `a`, `b`: descriptors; `add`: 0 starts from zero.
// multiply: both from shared memory; multiply_pn adds, A in registers.
// kLeft: A is stored [k][m] (else [m][k]); kRight: B is stored [k][n] (else [n][k]).
template <typename T, int N>
struct Wgmma;

#define MRA_D4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define MRA_D16(d, n) MRA_D4(d, n), MRA_D4(d, n + 1), MRA_D4(d, n + 2), MRA_D4(d, n + 3)
#define MRA_D32(d, n) MRA_D16(d, n), MRA_D16(d, n + 4)
#define MRA_D64(d, n) MRA_D32(d, n), MRA_D32(d, n + 8)
#define MRA_D96(d, n) MRA_D64(d, n), MRA_D32(d, n + 16)
#define MRA_R16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MRA_R32                                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MRA_R64                                                                             \
  MRA_R32                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MRA_R96                                                                        \
  MRA_R64                                                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

#define MRA_WGMMA(T, TYPE, N, REGS, D, i0, i1, i2, i3, i4, i5)                                    \
  template <>                                                                                     \
  struct Wgmma<T, N> {                                                                            \
    template <bool kLeft, bool kRight>                                                            \
    static __device__ __forceinline__ void multiply(float (&d)[N / 8][4], uint64_t a, uint64_t b, \
                                                    int add) {                                    \
      asm volatile("{.reg .pred p; setp.ne.b32 p, " i2                                            \
                   ", 0;"                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " REGS       \
                   "}, " i0 ", " i1 ", p, 1, 1, " i3 ", " i4 ";}"                                 \
                   : D(d, 0)                                                                      \
                   : "l"(a), "l"(b), "r"(add), "n"(kLeft), "n"(kRight));                          \
    }                                                                                             \
    template <bool kRight = true>                                                                 \
    static __device__ __forceinline__ void multiply_pn(float (&d)[N / 8][4],                      \
                                                       const uint32_t (&a)[4], uint64_t b) {      \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " REGS       \
                   "}, {" i0 ", " i1 ", " i2 ", " i3 "}, " i4 ", 1, 1, 1, " i5 ";"                \
                   : D(d, 0)                                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRight));            \
    }                                                                                             \
  };
#define MRA_WGMMA_TYPE(T, TYPE)                                                       \
  MRA_WGMMA(T, TYPE, 32, MRA_R16, MRA_D16, "%16", "%17", "%18", "%19", "%20", "%21")  \
  MRA_WGMMA(T, TYPE, 64, MRA_R32, MRA_D32, "%32", "%33", "%34", "%35", "%36", "%37")  \
  MRA_WGMMA(T, TYPE, 128, MRA_R64, MRA_D64, "%64", "%65", "%66", "%67", "%68", "%69") \
  MRA_WGMMA(T, TYPE, 192, MRA_R96, MRA_D96, "%96", "%97", "%98", "%99", "%100", "%101")

MRA_WGMMA_TYPE(__nv_bfloat16, "bf16")
MRA_WGMMA_TYPE(__half, "f16")

// c = A B^T or, with `add`, c += A B^T over DP columns: A of 64 rows, B of as many as c has columns
// or more, both in panels.
template <typename T, int kTiles, int kPanels, int kRows>
__device__ __forceinline__ void multiply_nt(float (&c)[kTiles][4],
                                            const uint16_t (&a)[kPanels][64][64],
                                            const uint16_t (&b)[kPanels][kRows][64],
                                            bool add = false) {
  static_assert(8 * kTiles <= kRows);
#pragma unroll
  for (int i = 0; i < 4 * kPanels; ++i) {
    Wgmma<T, 8 * kTiles>::template multiply<false, false>(c, descriptor(a[i / 4], 16, 2 * (i % 4)),
                                                          descriptor(b[i / 4], 16, 2 * (i % 4)),
                                                          add || i > 0);
  }
}

// acc += A B: A of 64 rows x 16 kSteps in registers, B of as many rows or more in panels, four of
// them by two products: one would need more registers at once than a thread may start with.
template <typename T, int kSteps, int kPanels, int kRows>
__device__ __forceinline__ void multiply_pn(float (&acc)[8 * kPanels][4],
                                            const uint32_t (&a)[kSteps][4],
                                            const uint16_t (&b)[kPanels][kRows][64]) {
  constexpr int kEach = kPanels <= 3 ? kPanels : 2, kTiles = 8 * kEach;
  static_assert(kPanels % kEach == 0 && 16 * kSteps <= kRows);
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
#pragma unroll
    for (int i = 0; i < kPanels; i += kEach) {
      auto& part = *reinterpret_cast<float(*)[kTiles][4]>(&acc[8 * i]);
      Wgmma<T, 64 * kEach>::multiply_pn(part, a[j], descriptor(b[i], kRows * 128, 128 * j));
    }
  }
}

// acc += A B^T: A of 64 rows x 64 in registers, B of as many rows as acc has columns, one panel.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply_pt(float (&acc)[kTiles][4], const uint32_t (&a)[4][4],
                                            const void* b) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Wgmma<T, 8 * kTiles>::template multiply_pn<false>(acc, a[i], descriptor(b) + 2 * i);
  }
}

// c += A B (kTransposed: A B^T) or, without `add`, c = that: A of 64 rows in panels; B a matrix of
// 64 kPanels rows and columns, whose panels start `apart` bytes from one another.
template <typename T, bool kTransposed, int kPanels>
__device__ __forceinline__ void multiply_matrix(float (&c)[8 * kPanels][4],
                                                const uint16_t (&a)[kPanels][64][64], const void* b,
                                                int apart, bool add) {
#pragma unroll
  for (int i = 0; i < 4 * kPanels; ++i) {
    const uint64_t right =
        kTransposed ? descriptor(static_cast<const char*>(b) + i / 4 * apart) + 2 * (i % 4)
                    : descriptor(b, apart) + 128 * i;
    Wgmma<T, 64 * kPanels>::template multiply<false, !kTransposed>(
        c, descriptor(a[i / 4]) + 2 * (i % 4), right, add || i > 0);
  }
}

// c = A B: B 64 columns of such a matrix, one panel.
template <typename T, int kPanels>
__device__ __forceinline__ void multiply_panel(float (&c)[8][4],
                                               const uint16_t (&a)[kPanels][64][64],
                                               const uint16_t (&b)[kPanels][64][64]) {
#pragma unroll
  for (int i = 0; i < 4 * kPanels; ++i) {
    Wgmma<T, 64>::template multiply<false, true>(c, descriptor(a[i / 4]) + 2 * (i % 4),
                                                 descriptor(b) + 128 * i, i > 0);
  }
}

// c = A^T B or, with `add`, c += A^T B over 64 rows: A one panel of columns, B in panels.
template <typename T, int kPanels>
__device__ __forceinline__ void multiply_tn(float (&c)[8 * kPanels][4], const uint16_t (&a)[64][64],
                                            const uint16_t (&b)[kPanels][64][64], bool add) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    Wgmma<T, 64 * kPanels>::template multiply<true, true>(
        c, descriptor(a) + 128 * j, descriptor(b, 64 * 128) + 128 * j, add || j > 0);
  }
}

// What a product left in a warp's registers, as the left operand of the next.
template <typename T, int kTiles>
__device__ __forceinline__ void pack(uint32_t (&a)[kTiles / 2][4], const float (&c)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles / 2; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[j][i] = Mma<T>::pack(c[2 * j + i / 2][i % 2 * 2], c[2 * j + i / 2][i % 2 * 2 + 1]);
    }
  }
}

__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                            uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
// ... and as 64 rows in panels, a warp's 16 of them.
template <typename T, int kPanels>
__device__ __forceinline__ void place_rows(uint16_t (&to)[kPanels][64][64],
                                           const float (&c)[8 * kPanels][4]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const uint32_t base = smem_address(&to[0][16 * warp][0]);
  const uint32_t at = lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
#pragma unroll
  for (int n = 0; n < 8 * kPanels; n += 2) {
    stmatrix_x4(base + n / 8 * 64 * 128 + (at ^ n % 8 * 16), Mma<T>::pack(c[n][0], c[n][1]),
                Mma<T>::pack(c[n][2], c[n][3]), Mma<T>::pack(c[n + 1][0], c[n + 1][1]),
                Mma<T>::pack(c[n + 1][2], c[n + 1][3]));
  }
}
// The same by pairs: backward_columns at D 64 would lose its uniform descriptors to stmatrix.
template <typename T, int kPanels>
__device__ __forceinline__ void place_rows_by_pairs(uint16_t (&to)[kPanels][64][64],
                                                    const float (&c)[8 * kPanels][4]) {
  const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 8 * kPanels; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint16_t* at = &to[n / 8][16 * warp + g + 8 * half][(n % 8 ^ g) * 8 + 2 * t];
      *reinterpret_cast<uint32_t*>(at) = Mma<T>::pack(c[n][2 * half], c[n][2 * half + 1]);
    }
  }
}

#undef MRA_WGMMA_TYPE
#undef MRA_WGMMA
#undef MRA_R96
#undef MRA_R64
#undef MRA_R32
#undef MRA_R16
#undef MRA_D96
#undef MRA_D64
#undef MRA_D32
#undef MRA_D16
#undef MRA_D4

}  // namespace mra::cuda::sm90
