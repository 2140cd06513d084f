// Warp-level matrix products on tiles in shared memory: D[16 x 8] += A[16 x k] B[k x 8] with
// mma.sync, for bfloat16 and float16 (k = 16) and for float32 as TF32 (k = 8).
//
// Operands by how they lie in shared memory (row-major, leading dimension in elements):
//   load_a         A[m][k]          load_a_trans   A stored as [k][m]
//   load_b         B stored [n][k]  load_b_trans   B[k][n]        (two 8-wide tiles at once)
//
// float32: the k index inside a step is permuted, slot t holds column 2t and slot t + 4 column
// 2t + 1, in A and B alike. The product is the same, and accumulators become A operands in place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace mra::cuda {

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <bool kTrans>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  if constexpr (kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  }
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address));
}

// Sixteen-bit types.
template <typename T>
struct Mma {
  static constexpr int kStep = 16;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[4];  // two 8-wide tiles: r[0], r[1] and r[2], r[3]
  };

  static __device__ __forceinline__ A load_a(const T* s, int ld, int m, int k) {
    const int lane = threadIdx.x % 32;
    A a;
    ldmatrix_x4<false>(a.r, smem_address(s + (m + lane % 16) * ld + k + lane / 16 * 8));
    return a;
  }
  static __device__ __forceinline__ B load_b(const T* s, int ld, int n, int k) {
    const int lane = threadIdx.x % 32;
    B b;
    ldmatrix_x4<false>(
        b.r, smem_address(s + (n + lane % 8 + lane / 16 * 8) * ld + k + lane / 8 % 2 * 8));
    return b;
  }
  static __device__ __forceinline__ B load_b_trans(const T* s, int ld, int k, int n) {
    const int lane = threadIdx.x % 32;
    B b;
    ldmatrix_x4<true>(b.r, smem_address(s + (k + lane % 16) * ld + n + lane / 16 * 8));
    return b;
  }
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      __nv_bfloat162 p = __floats2bfloat162_rn(lo, hi);
      return reinterpret_cast<uint32_t&>(p);
    } else {
      __half2 p = __floats2half2_rn(lo, hi);
      return reinterpret_cast<uint32_t&>(p);
    }
  }
  // Columns 16 i .. 16 i + 15 of an accumulator row of 8-wide tiles.
  template <int kTiles>
  static __device__ __forceinline__ A from_accumulator(const float (&c)[kTiles][4], int i) {
    return {pack(c[2 * i][0], c[2 * i][1]), pack(c[2 * i][2], c[2 * i][3]),
            pack(c[2 * i + 1][0], c[2 * i + 1][1]), pack(c[2 * i + 1][2], c[2 * i + 1][3])};
  }
  static __device__ __forceinline__ void product(float (&c)[4], const A& a, uint32_t b0,
                                                 uint32_t b1) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
    }
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const A& a, const B& b, int tile,
                                             bool /*tf32*/) {
    product(c, a, b.r[2 * tile], b.r[2 * tile + 1]);
  }
  // c[n0 + n] += a b, b holding tiles 2n and 2n + 1.
  template <int kTiles, int kPairs>
  static __device__ __forceinline__ void mma(float (&c)[kTiles][4], int n0, const A& a,
                                             const B (&b)[kPairs], bool tf32) {
#pragma unroll
    for (int n = 0; n < 2 * kPairs; ++n) mma(c[n0 + n], a, b[n / 2], n % 2, tf32);
  }
};

// float32: x = hi + lo with both in TF32, and three products; one with `tf32`.
template <>
struct Mma<float> {
  static constexpr int kStep = 8;
  struct A {
    float r[4];
  };
  struct B {
    float r[4];
  };

  static __device__ __forceinline__ A load_a(const float* s, int ld, int m, int k) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const float2 u = *reinterpret_cast<const float2*>(s + (m + g) * ld + k + 2 * t);
    const float2 w = *reinterpret_cast<const float2*>(s + (m + g + 8) * ld + k + 2 * t);
    return {u.x, w.x, u.y, w.y};
  }
  static __device__ __forceinline__ B load_b(const float* s, int ld, int n, int k) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const float2 u = *reinterpret_cast<const float2*>(s + (n + g) * ld + k + 2 * t);
    const float2 w = *reinterpret_cast<const float2*>(s + (n + g + 8) * ld + k + 2 * t);
    return {u.x, u.y, w.x, w.y};
  }
  static __device__ __forceinline__ B load_b_trans(const float* s, int ld, int k, int n) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const float *even = s + (k + 2 * t) * ld + n + g, *odd = even + ld;
    return {even[0], odd[0], even[8], odd[8]};
  }
  template <int kTiles>
  static __device__ __forceinline__ A from_accumulator(const float (&c)[kTiles][4], int i) {
    return {c[i][0], c[i][2], c[i][1], c[i][3]};
  }
  static __device__ __forceinline__ uint32_t to_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
  }
  static __device__ __forceinline__ void split(float x, uint32_t& hi, uint32_t& lo) {
    hi = to_tf32(x);
    lo = to_tf32(x - __uint_as_float(hi));
  }
  static __device__ __forceinline__ void product(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  // c[n0 + n] += a b, b holding tiles 2n and 2n + 1. All products of one kind, then all of the
  // next: neighbours don't wait for each other.
  template <int kTiles, int kPairs>
  static __device__ __forceinline__ void mma(float (&c)[kTiles][4], int n0, const A& a,
                                             const B (&b)[kPairs], bool tf32) {
    constexpr int kN = 2 * kPairs;
    uint32_t ah[4], al[4], bh[kN][2], bl[kN][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a.r[i], ah[i], al[i]);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) split(b[n / 2].r[n % 2 * 2 + i], bh[n][i], bl[n][i]);
    }
    if (!tf32) {
#pragma unroll
      for (int n = 0; n < kN; ++n) product(c[n0 + n], al, bh[n]);
#pragma unroll
      for (int n = 0; n < kN; ++n) product(c[n0 + n], ah, bl[n]);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) product(c[n0 + n], ah, bh[n]);
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const A& a, const B& b, int tile,
                                             bool tf32) {
    uint32_t ah[4], al[4], bh[2], bl[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a.r[i], ah[i], al[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) split(b.r[2 * tile + i], bh[i], bl[i]);
    if (!tf32) {
      product(c, al, bh);
      product(c, ah, bl);
    }
    product(c, ah, bh);
  }
};

// A's rows m .. m + 15 of a tile [.., DP], in registers.
template <typename T, int DP>
struct Fragments {
  typename Mma<T>::A a[DP / Mma<T>::kStep];
  __device__ __forceinline__ void load(const T* tile, int ld, int m) {
#pragma unroll
    for (int i = 0; i < DP / Mma<T>::kStep; ++i)
      a[i] = Mma<T>::load_a(tile, ld, m, i * Mma<T>::kStep);
  }
};

// Tiles of a product that are worked on together.
template <int kTiles>
inline constexpr int kTogether = kTiles < 8 ? kTiles : 8;

// C[16 x 8 kTiles] += a B^T, columns k .. of all rows of B.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply_step(float (&c)[kTiles][4], const typename Mma<T>::A& a,
                                              const T* b, int ld, int k, bool tf32) {
  using M = Mma<T>;
  constexpr int kN = kTogether<kTiles>;
#pragma unroll
  for (int n0 = 0; n0 < kTiles; n0 += kN) {
    typename M::B fb[kN / 2];
#pragma unroll
    for (int n = 0; n < kN; n += 2) fb[n / 2] = M::load_b(b, ld, (n0 + n) * 8, k);
    M::mma(c, n0, a, fb, tf32);
  }
}

// The tensor cores round every sum towards zero, of float32 operands three times a step, which adds
// up: sums of at most so many columns (or keys, in multiply_pn) are added up as floats.
template <typename T>
inline constexpr int kSpan = std::is_same_v<T, float> ? 64 : 256;

// c[first + n] += part[n].
template <int kTiles, int kPart>
__device__ __forceinline__ void add_part(float (&c)[kTiles][4], int first,
                                         const float (&part)[kPart][4]) {
#pragma unroll
  for (int n = 0; n < kPart; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[first + n][i] += part[n][i];
  }
}

// C[16 x 8 kTiles] += sum of step(C, k) over the columns k of each step.
template <typename T, int DP, int kTiles, class Step>
__device__ __forceinline__ void multiply_spans(float (&c)[kTiles][4], const Step& step) {
  if constexpr (DP <= kSpan<T>) {
#pragma unroll
    for (int k = 0; k < DP; k += Mma<T>::kStep) step(c, k);
  } else {
#pragma unroll
    for (int first = 0; first < DP; first += kSpan<T>) {
      float part[kTiles][4] = {};
#pragma unroll
      for (int k = 0; k < kSpan<T>; k += Mma<T>::kStep) step(part, first + k);
      add_part(c, 0, part);
    }
  }
}

// C[16 x 8 kTiles] += A[16 x DP] B^T, rows m.. of A and all rows of B, tiles [.., DP].
template <typename T, int DP, int kTiles>
__device__ __forceinline__ void multiply_nt(float (&c)[kTiles][4], const T* a, int m, const T* b,
                                            int ld, bool tf32) {
  multiply_spans<T, DP>(c, [&](float(&sum)[kTiles][4], int k) {
    multiply_step<T>(sum, Mma<T>::load_a(a, ld, m, k), b, ld, k, tf32);
  });
}
template <typename T, int DP, int kTiles>
__device__ __forceinline__ void multiply_nt(float (&c)[kTiles][4], const Fragments<T, DP>& a,
                                            const T* b, int ld, bool tf32) {
  multiply_spans<T, DP>(c, [&](float(&sum)[kTiles][4], int k) {
    multiply_step<T>(sum, a.a[k / Mma<T>::kStep], b, ld, k, tf32);
  });
}

// C[16 x 8 kTiles] += P[16 x 8 kInner] B, P in accumulators, B [8 kInner, ..] from column n0.
template <typename T, int kTiles, int kInner>
__device__ __forceinline__ void multiply_pn(float (&c)[kTiles][4], const float (&p)[kInner][4],
                                            const T* b, int ld, int n0, bool tf32) {
  using M = Mma<T>;
  constexpr int kN = kTogether<kTiles>;
  if constexpr (std::is_same_v<T, float>) {
    static_assert(8 * kInner <= kSpan<T>);
#pragma unroll
    for (int m0 = 0; m0 < kTiles; m0 += kN) {
      float part[kN][4] = {};
#pragma unroll
      for (int k = 0; k < kInner * 8; k += M::kStep) {
        typename M::B fb[kN / 2];
#pragma unroll
        for (int n = 0; n < kN; n += 2) fb[n / 2] = M::load_b_trans(b, ld, k, n0 + (m0 + n) * 8);
        M::mma(part, 0, M::from_accumulator(p, k / M::kStep), fb, tf32);
      }
      add_part(c, m0, part);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kInner * 8; k += M::kStep) {
    const typename M::A fa = M::from_accumulator(p, k / M::kStep);
#pragma unroll
    for (int m0 = 0; m0 < kTiles; m0 += kN) {
      typename M::B fb[kN / 2];
#pragma unroll
      for (int n = 0; n < kN; n += 2) fb[n / 2] = M::load_b_trans(b, ld, k, n0 + (m0 + n) * 8);
      M::mma(c, m0, fa, fb, tf32);
    }
  }
}

}  // namespace mra::cuda
