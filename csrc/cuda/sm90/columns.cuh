// What the kernels of the key gradients share: a tile of 64 keys, or pooled keys, meets tiles of 64
// rows that one warp fetches; a warpgroup multiplies with the scores transposed.
#pragma once

#include "../sm80/tile.cuh"
#include "backward.h"
#include "tma.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

template <int DP, int kKeyPlaces = 1>
struct ColumnsShared {
  static constexpr int kPlaces = kKeyPlaces, kPanels = DP / 64;
  static constexpr int kStages = DP > 64 ? 2 : kPlaces > 1 ? 4 : 3;
  // The only place for keys is given back with the last scores; their gradients then leave through
  // the place of the last rows.
  static constexpr bool kEarly = kPlaces == 1;
  uint16_t k[kPlaces][kPanels][64][64], v[kPlaces][kPanels][64][64];
  uint16_t q[kStages][kPanels][64][64], grad_out[kStages][kPanels][64][64];
  alignas(16) float sums[kStages][2][2][32];   // of each 32 rows lse (log2 units) and delta
  int first[kStages][4];                       // first row of each sixteen, under causal
  alignas(16) uint32_t unseen[kStages][2][2];  // pooled keys that 32 rows don't see, one bit each
  uint64_t keys_full[kPlaces], keys_empty[kPlaces], full[kStages], empty[kStages];

  // By one thread.
  __device__ void init() {
    barrier_init_ring(keys_full, keys_empty, 4);
    barrier_init_ring(full, empty, 4);
  }

  // By one warp: the 64 keys and values from `first` on of head h of batch b, and `more` bytes
  // that it copies itself.
  __device__ void fetch_keys(int place, const CUtensorMap& k_map, const CUtensorMap& v_map,
                             int first, int h, int b, int more = 0) {
    barrier_expect(&keys_full[place], 2 * 64 * DP * 2 + more);
    if (threadIdx.x % 32 != 0) return;
    for (int i = 0; i < kPanels; ++i) {
      copy_panel(k[place][i], k_map, &keys_full[place], 64 * i, first, h, b);
      copy_panel(v[place][i], v_map, &keys_full[place], 64 * i, first, h, b);
    }
  }
};

// By one warp: what belongs to a tile is written, and its copies follow.
template <int DP, int kPlaces>
__device__ __forceinline__ void announce_tile(ColumnsShared<DP, kPlaces>& s, int stage) {
  barrier_expect(&s.full[stage], 2 * 64 * DP * 2 + sizeof(s.sums[0]));
}

// `run` rows from `row` on of head h of batch b, as rows `at` on of the tile at `stage`. `sums`: of
// the head, [sum_chunks][2][32].
template <int DP, int kPlaces>
__device__ __forceinline__ void fetch_run(ColumnsShared<DP, kPlaces>& s, const CUtensorMap& q_map,
                                          const CUtensorMap& grad_out_map, const float* sums,
                                          int stage, int at, int run, int row, int h, int b) {
  for (int i = 0; i < DP / 64; ++i) {
    copy_panel(s.q[stage][i][at], q_map, &s.full[stage], 64 * i, row, h, b);
    copy_panel(s.grad_out[stage][i][at], grad_out_map, &s.full[stage], 64 * i, row, h, b);
  }
  copy_bytes(s.sums[stage][at / 32], sums + row / 32 * 64, run * 8, &s.full[stage]);
}

// Adds tiles of rows `before` to `before` + `tiles` to the sums of the keys at `place`; dk less the
// factor `scale`. Where kEarly holds the last place of rows is kept. kPooled: keys stand for 2^bias
// keys each, and `unseen` takes away some tile by tile; else `first_key` matters under causal.
template <typename T, int DP, bool kPooled, int kPlaces>
__device__ __forceinline__ void attend_rows(float (&dk)[DP / 8][4], float (&dv)[DP / 8][4],
                                            ColumnsShared<DP, kPlaces>& s, int place, int before,
                                            int tiles, float scale, bool causal, int first_key,
                                            const float (&bias)[2]) {
  constexpr int kStages = ColumnsShared<DP, kPlaces>::kStages;
  constexpr bool kEarly = !kPooled && ColumnsShared<DP, kPlaces>::kEarly;
  const int key = 16 * warp_index(), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
  for (int tile = before; tile < before + tiles; ++tile) {
    const bool last = kEarly && tile + 1 == before + tiles;
    const int stage = tile % kStages;
    float c[8][4], ds[8][4];
    uint32_t a[4][4], da[4][4];
    barrier_wait(&s.full[stage], tile / kStages & 1);
    pin(c);
    wgmma_fence();
    multiply_nt<T, 64>(c, s.k[place], s.q[stage]);
    wgmma_commit();
    pin(ds);
    wgmma_fence();
    multiply_nt<T, 64>(ds, s.v[place], s.grad_out[stage]);
    wgmma_commit();

    float b[2][2];  // towards either 32 rows
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = key + g + 8 * (i % 2);
      const bool unseen = kPooled && s.unseen[stage][i / 2][r / 32] >> r % 32 & 1;
      b[i / 2][i % 2] = unseen ? -INFINITY : bias[i % 2];
    }
    wgmma_wait<1>();
    pin(c);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 l =
          *reinterpret_cast<const float2*>(&s.sums[stage][n / 4][0][n % 4 * 8 + 2 * t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float shift = i % 2 ? l.y : l.x;
        c[n][i] =
            exp2_approx(fmaf(c[n][i], scale * kLog2e, kPooled ? b[n / 4][i / 2] - shift : -shift));
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
    if (last) barrier_arrive(&s.keys_empty[place]);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 d =
          *reinterpret_cast<const float2*>(&s.sums[stage][n / 4][1][n % 4 * 8 + 2 * t]);
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
    if (!last) barrier_arrive(&s.empty[stage]);
  }
}

}  // namespace mra::cuda::sm90
