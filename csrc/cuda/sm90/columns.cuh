// What the kernels of the key gradients share: a tile of 64 keys, or pooled keys, meets tiles of 64
// rows that one warp fetches; a warpgroup multiplies with the scores transposed.
#pragma once

#include "../sm80/tile.cuh"
#include "backward.h"
#include "tma.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

template <int DP>
struct ColumnsShared {
  static constexpr int kStages = DP == 64 ? 3 : 2, kPanels = DP / 64;
  uint16_t k[kPanels][64][64], v[kPanels][64][64];
  uint16_t q[kStages][kPanels][64][64], grad_out[kStages][kPanels][64][64];
  float lse[kStages][64], delta[kStages][64];
  int first[kStages][4];        // first row of each sixteen, under causal
  uint32_t unseen[kStages][2];  // pooled keys that the rows don't see, one bit each
  uint64_t keys_full, full[kStages], empty[kStages];

  // By one thread.
  __device__ void init() {
    barrier_init(&keys_full, 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&full[i], 33);  // its copies, and the lanes that write beside them
      barrier_init(&empty[i], 4);
    }
  }

  // By one thread: the 64 keys and values from `first` on of head h of batch b.
  __device__ void fetch_keys(const CUtensorMap& k_map, const CUtensorMap& v_map, int first, int h,
                             int b) {
    barrier_expect(&keys_full, 2 * 64 * DP * 2);
    for (int i = 0; i < kPanels; ++i) {
      copy_panel(k[i], k_map, &keys_full, 64 * i, first, h, b);
      copy_panel(v[i], v_map, &keys_full, 64 * i, first, h, b);
    }
  }
};

// lse and delta of a lane's two rows of a tile (r = lane, lane + 32), zero weight where there is no
// row. i: the row.
struct RowSums {
  float lse[2], delta[2];

  __device__ __forceinline__ void look_up(int half, const float* lse2, const float* deltas, int i,
                                          int rows) {
    lse[half] = i < rows ? lse2[i] : INFINITY;
    delta[half] = i < rows ? deltas[i] : 0.f;
  }
  template <class Shared>
  __device__ __forceinline__ void store(Shared& s, int stage) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      s.lse[stage][threadIdx.x % 32 + 32 * half] = lse[half];
      s.delta[stage][threadIdx.x % 32 + 32 * half] = delta[half];
    }
  }
};

// Adds `tiles` tiles of rows to the sums of the keys; dk less the factor `scale`. kPooled: keys
// stand for 2^bias keys each, and `unseen` takes away some tile by tile; else `first_key` matters
// under causal.
template <typename T, int DP, bool kPooled>
__device__ __forceinline__ void attend_rows(float (&dk)[DP / 8][4], float (&dv)[DP / 8][4],
                                            ColumnsShared<DP>& s, int tiles, float scale,
                                            bool causal, int first_key, const float (&bias)[2]) {
  constexpr int kStages = ColumnsShared<DP>::kStages;
  const int key = 16 * warp_index(), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages;
    float c[8][4], ds[8][4];
    uint32_t a[4][4], da[4][4];
    barrier_wait(&s.full[stage], tile / kStages & 1);
    pin(c);
    wgmma_fence();
    multiply_nt<T, 64>(c, s.k, s.q[stage]);
    wgmma_commit();
    pin(ds);
    wgmma_fence();
    multiply_nt<T, 64>(ds, s.v, s.grad_out[stage]);
    wgmma_commit();

    float b[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = key + g + 8 * half;
      b[half] = kPooled && s.unseen[stage][r / 32] >> r % 32 & 1 ? -INFINITY : bias[half];
    }
    wgmma_wait<1>();
    pin(c);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 l = *reinterpret_cast<const float2*>(&s.lse[stage][8 * n + 2 * t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float shift = i % 2 ? l.y : l.x;
        c[n][i] = exp2_approx(fmaf(c[n][i], scale * kLog2e, kPooled ? b[i / 2] - shift : -shift));
      }
    }
    if (!kPooled && causal) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int i = s.first[stage][n / 2] + n % 2 * 8 + 2 * t, j = first_key + key + g;
        if (j > i) c[n][0] = 0.f;
        if (j > i + 1) c[n][1] = 0.f;
        if (j + 8 > i) c[n][2] = 0.f;
        if (j + 8 > i + 1) c[n][3] = 0.f;
      }
    }
    pack<T>(a, c);
    pin(dv);
    wgmma_fence();
    multiply_pn<T, 64>(dv, a, s.grad_out[stage]);
    wgmma_commit();

    wgmma_wait<1>();
    pin(ds);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 d = *reinterpret_cast<const float2*>(&s.delta[stage][8 * n + 2 * t]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Rounded weights: keeping the others would take registers that dim 128 does not have.
        const float2 w = unpack2(a[n / 2][n % 2 * 2 + half], T{});
        ds[n][2 * half] = (ds[n][2 * half] - d.x) * w.x;
        ds[n][2 * half + 1] = (ds[n][2 * half + 1] - d.y) * w.y;
      }
    }
    pack<T>(da, ds);
    pin(dk);
    wgmma_fence();
    multiply_pn<T, 64>(dk, da, s.q[stage]);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dv);
    pin(dk);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&s.empty[stage]);
  }
}

}  // namespace mra::cuda::sm90
