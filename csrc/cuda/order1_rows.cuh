// Rows times the D x D matrices of their unit: what the rows and the keys kernel share. A warp
// takes 16 rows at a time through its own tile in shared memory; the CTA shares the matrices, which
// stay there whole where they fit and else come panel by panel.
#pragma once

#include "order1.cuh"

namespace mra::cuda {

template <typename S, int DP>
struct Product {
  static constexpr int kMatrix = DP * kLd<S, DP>;
  static constexpr bool kResident = 2 * kMatrix * sizeof(S) <= 72 * 1024;
  static constexpr int kPanel = kResident ? DP : sizeof(S) == 2 ? 64 : 32;  // columns of a product
  static constexpr int kPanels = DP / kPanel;
  static constexpr int kTiles = kPanel / 8;
  static constexpr int kTile = 16 * kLd<S, DP>;  // rows of a warp
  static constexpr int kRowPanel = kPanel * kLd<S, DP>, kColumnPanel = DP * kLd<S, kPanel>;
  static constexpr int kMatrices = kResident                  ? 2 * kMatrix
                                   : kRowPanel > kColumnPanel ? kRowPanel
                                                              : kColumnPanel;

  // Bytes of shared memory for `warps` with `tiles` tiles each, and the most warps that fit.
  static constexpr size_t bytes(int warps, int tiles) {
    return (kMatrices + size_t{1} * warps * tiles * kTile) * sizeof(S);
  }
  static int warps(int most, int tiles, int max_smem) {
    while (most > 1 && bytes(most, tiles) > static_cast<size_t>(max_smem)) --most;
    return most;
  }
};

// The two matrices of a unit. The whole CTA makes every call in step.
template <typename S, int DP>
struct Matrices {
  using P = Product<S, DP>;
  const S* from;  // [2, DP, DP]
  S* room;

  static __device__ __forceinline__ void copy(S* to, int ld, const S* src, int rows, int cols) {
    constexpr int kPiece = 16 / sizeof(S);
    const int pieces = cols / kPiece;
    for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
      const int r = i / pieces, d = i % pieces * kPiece;
      copy_16_bytes(to + r * ld + d, src + r * DP + d, true);
    }
  }
  __device__ __forceinline__ void prepare() {
    if constexpr (P::kResident) {
      copy(room, kLd<S, DP>, from, 2 * DP, DP);
      commit_copies();
      wait_for_copies();
      __syncthreads();
    }
  }
  // c = A X[:, n0 .. n0 + kPanel), X matrix `which` or, with kTrans, its transpose.
  template <bool kTrans>
  __device__ __forceinline__ void multiply(float (&c)[P::kTiles][4], const S* a, int which,
                                           int panel, bool tf32) {
#pragma unroll
    for (int n = 0; n < P::kTiles; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
    multiply_add<kTrans>(c, a, which, panel, tf32);
  }
  template <bool kTrans>
  __device__ __forceinline__ void multiply_add(float (&c)[P::kTiles][4], const S* a, int which,
                                               int panel, bool tf32) {
    using M = Mma<S>;
    constexpr int kLead = kTrans ? kLd<S, DP> : kLd<S, P::kPanel>;
    const S* x = room + (P::kResident ? which * P::kMatrix : 0);
    if constexpr (!P::kResident) {
      const S* src = from + which * DP * DP + panel * P::kPanel * (kTrans ? DP : 1);
      __syncthreads();
      copy(room, kLead, src, kTrans ? P::kPanel : DP, kTrans ? DP : P::kPanel);
      commit_copies();
      wait_for_copies();
      __syncthreads();
    }
#pragma unroll 8
    for (int k = 0; k < DP; k += M::kStep) {
      const typename M::A fa = M::load_a(a, kLd<S, DP>, 0, k);
#pragma unroll
      for (int n = 0; n < P::kTiles; n += 2) {
        typename M::B fb;
        if constexpr (kTrans) {
          fb = M::load_b(x, kLead, 8 * n, k);
        } else {
          fb = M::load_b_trans(x, kLead, k, 8 * n);
        }
        M::mma(c[n], fa, fb, 0, tf32);
        M::mma(c[n + 1], fa, fb, 1, tf32);
      }
    }
  }
};

// A warp's tile = its 16 rows less their mean, zeros beyond D and where valid(r) is false. The rows
// start at `rows`; `mean` is the one of all of them, or null for none.
template <typename T, int DP, class Valid>
__device__ __forceinline__ void load_tile(Operand<T>* tile, const T* rows, int64_t stride,
                                          const float* mean, int D, Valid valid) {
  constexpr int kPieces = DP / kVec<T>, kWide = kPieces < 32 ? kPieces : 32;
  constexpr int kDown = 32 / kWide, kRounds = 16 / kDown, kPer = kRounds < 8 ? kRounds : 8;
  constexpr int kTurns = kPieces / kWide * (kRounds / kPer);
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int turn = 0; turn < kTurns; ++turn) {
    const int d = (turn / (kRounds / kPer) * kWide + lane % kWide) * kVec<T>;
    const int r0 = lane / kWide + turn % (kRounds / kPer) * kPer * kDown;
    const bool inside = d < D;
    uint4 raw[kPer];
    unsigned live = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int r = r0 + i * kDown;
      const bool load = inside && valid(r);
      live |= unsigned{load} << i;
      raw[i] = load ? load16(rows + r * stride + d) : uint4{};
    }
    float centre[kVec<T>] = {};
    if (mean != nullptr) load_floats<T>(centre, mean + d, inside);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      float x[kVec<T>];
      unpack16<T>(raw[i], x);
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) x[e] = live >> i & 1 ? x[e] - centre[e] : 0.f;
      store_operands<T>(tile + (r0 + i * kDown) * kLd<Operand<T>, DP> + d, x);
    }
  }
}

// w[j] of lane t of each four lanes becomes w[t] of lane j.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? w[i] : w[i + 2], 2);
    (high ? w[i] : w[i + 2]) = got;
  }
}

// Rows of T that a warp writes from its sums, or adds them to: 16 bytes a lane. kAdd: always adds.
// kFetch: what they are added to is fetched ahead, if that takes few enough registers.
template <typename T, int kTiles, bool kAdd, bool kFetch = kAdd>
struct Emit {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr bool kAhead = kFetch && kHalf && kTiles <= 8;
  uint4 old[kAhead ? kTiles / 4 : 1][2];

  // Ahead of the sums, so that what is added to is on its way. row(half): row g or g + 8, or null.
  template <class Row>
  __device__ __forceinline__ void fetch(int n0, int D, Row row) {
    if constexpr (kAhead) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* from = row(half);
#pragma unroll
        for (int q = 0; q < kTiles / 4; ++q) {
          const int d = n0 + (4 * q + threadIdx.x % 4) * 8;
          if (from != nullptr && d < D) old[q][half] = *reinterpret_cast<const uint4*>(from + d);
        }
      }
    }
  }

  // value(n, i): entry i of 8-wide tile n, as the warp's sums lie.
  template <class Row, class Value>
  __device__ __forceinline__ void store(int n0, int D, Row row, Value value, bool add = kAdd) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* to = row(half);
      if constexpr (kHalf) {
#pragma unroll
        for (int q = 0; q < kTiles / 4; ++q) {
          uint32_t w[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            w[j] = Mma<T>::pack(value(4 * q + j, 2 * half), value(4 * q + j, 2 * half + 1));
          }
          transpose_quad(w);
          const int d = n0 + (4 * q + t) * 8;
          const bool inside = to != nullptr && d < D;
          if (add) {
            uint4 o{};
            if constexpr (kAhead) {
              o = old[q][half];
            } else if (inside) {
              o = *reinterpret_cast<const uint4*>(to + d);
            }
            const uint32_t before[4] = {o.x, o.y, o.z, o.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float2 a = unpack2(before[j], T{}), b = unpack2(w[j], T{});
              w[j] = Mma<T>::pack(a.x + b.x, a.y + b.y);
            }
          }
          if (inside) {
            *reinterpret_cast<uint4*>(to + d) = make_uint4(w[0], w[1], w[2], w[3]);
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const int d = n0 + 8 * n + 2 * t;
          if (to == nullptr || d >= D) continue;
          float2 sum = make_float2(value(n, 2 * half), value(n, 2 * half + 1));
          if (add) {
            const float2 before = load_pair(to + d);
            sum.x += before.x, sum.y += before.y;
          }
          *reinterpret_cast<float2*>(to + d) = sum;
        }
      }
    }
  }
};

// Where this CTA works.
struct RowRange {
  int b, head, unit;  // head: of all heads, batch included
  int first, end;

  __device__ __forceinline__ RowRange(const Order1Products& p, int heads) {
    const int64_t id = blockIdx.x / p.parts;
    const int part = blockIdx.x % p.parts;
    unit = id % p.units, head = id / p.units, b = head / heads;
    const int row0 = unit * p.unit, rows = min(p.unit, p.L - row0);
    first = row0 + part * p.part_rows;
    end = row0 + min(rows, (part + 1) * p.part_rows);
  }
};

// Launches `kernel` on every part of every unit of `heads` heads.
template <class Params>
cudaError_t launch_products(void (*kernel)(Params), const Params& p, int heads, size_t bytes,
                            cudaStream_t stream) {
  return launch_grid(kernel, int64_t{p.B} * heads * p.units * p.parts, 32 * p.warps, bytes, stream,
                     p);
}

}  // namespace mra::cuda
