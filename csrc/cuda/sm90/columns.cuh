// What the kernels of the key gradients share: a tile of 64 keys, or pooled keys, meets tiles of 64
// rows that one warp fetches; a warpgroup multiplies with the scores transposed. Beyond 128 columns
// two of them do: one makes weights and the gradients of values, the other takes the weights over
// and makes those of keys.
#pragma once

#include "../sm80/tile.cuh"
#include "backward.h"
#include "team.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

// Weights on their way from one warpgroup to the other, each from thread to thread.
template <bool kWide>
struct SharedWeights {
  uint4 weights[4][128];
  uint64_t full, empty;
};
template <>
struct SharedWeights<false> {};

template <int DP, int kKeyPlaces = 1>
struct ColumnsShared {
  static constexpr bool kWide = DP > 128;
  static constexpr int kWarps = kWide ? 8 : 4;  // that multiply
  static constexpr int kPlaces = kKeyPlaces, kPanels = DP / 64;
  static constexpr int kStages = DP == 192 ? 3 : DP > 64 || kPlaces > 1 ? 2 : 3;
  // The only place for keys is given back with the last scores; their gradients then leave through
  // the place of the last rows.
  static constexpr bool kEarly = kPlaces == 1;
  uint16_t k[kPlaces][kPanels][64][64], v[kPlaces][kPanels][64][64];
  uint16_t q[kStages][kPanels][64][64], grad_out[kStages][kPanels][64][64];
  alignas(16) float sums[kStages][2][2][32];   // of each 32 rows lse (log2 units) and delta
  int first[kStages][4];                       // first row of each sixteen, under causal
  alignas(16) uint32_t unseen[kStages][2][2];  // pooled keys that 32 rows don't see, one bit each
  uint64_t keys_full[kPlaces], keys_empty[kPlaces], full[kStages], empty[kStages];
  alignas(16) SharedWeights<kWide> handed;

  // By one thread.
  __device__ void init() {
    barrier_init_ring(keys_full, keys_empty, kWarps);
    barrier_init_ring(full, empty, kWarps);
    if constexpr (kWide) {
      barrier_init(&handed.full, 4);
      barrier_init(&handed.empty, 4);
    }
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

// Bias of this thread's two keys, from row `key` of the tile on, towards either 32 rows.
template <bool kPooled, class Shared>
__device__ __forceinline__ void bias_towards(float (&b)[2][2], const Shared& s, int stage, int key,
                                             const float (&bias)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = key + 8 * (i % 2);
    const bool unseen = kPooled && s.unseen[stage][i / 2][r / 32] >> r % 32 & 1;
    b[i / 2][i % 2] = unseen ? -INFINITY : bias[i % 2];
  }
}

// Scores of a tile -> weights. `key`: this thread's first, of all.
template <bool kPooled, class Shared>
__device__ __forceinline__ void weigh_rows(float (&c)[8][4], const Shared& s, int stage,
                                           float scale, bool causal, int key,
                                           const float (&b)[2][2]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 l = *reinterpret_cast<const float2*>(&s.sums[stage][n / 4][0][n % 4 * 8 + 2 * t]);
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
      const int i = s.first[stage][n / 2] + n % 2 * 8 + 2 * t;
      if (key > i) c[n][0] = 0.f;
      if (key > i + 1) c[n][1] = 0.f;
      if (key + 8 > i) c[n][2] = 0.f;
      if (key + 8 > i + 1) c[n][3] = 0.f;
    }
  }
}

// Products with dO -> gradients of the scores. Rounded weights `a`: keeping the others would take
// registers that dim 128 does not have.
template <typename T, class Shared>
__device__ __forceinline__ void differentiate_rows(float (&ds)[8][4], const uint32_t (&a)[4][4],
                                                   const Shared& s, int stage) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 d = *reinterpret_cast<const float2*>(&s.sums[stage][n / 4][1][n % 4 * 8 + 2 * t]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 w = unpack2(a[n / 2][n % 2 * 2 + half], T{});
      ds[n][2 * half] = (ds[n][2 * half] - d.x) * w.x;
      ds[n][2 * half + 1] = (ds[n][2 * half + 1] - d.y) * w.y;
    }
  }
}

// Adds up what a thread has of two keys.
__device__ __forceinline__ void add_columns(float* sum, const float (&c)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    sum[0] += c[n][0] + c[n][1];
    sum[1] += c[n][2] + c[n][3];
  }
}

struct Nothing {
  template <class... X>
  __device__ __forceinline__ void operator()(const X&...) const {}
};

// Adds tiles of rows `before` to `before` + `tiles` to the sums of the keys at `place`; dk less the
// factor `scale`. Where kEarly holds the last place of rows is kept. kPooled: keys stand for 2^bias
// keys each, `unseen` takes away some tile by tile, and the gradients of the logits of a key are
// added to mass_grad, this thread's part, and those of a thread's two keys towards each row given
// to of_rows(tile, float[8][2]); else `first_key` matters under causal.
template <typename T, int DP, bool kPooled, int kPlaces, class OfRows = Nothing>
__device__ __forceinline__ void attend_rows(float (&dk)[DP / 8][4], float (&dv)[DP / 8][4],
                                            ColumnsShared<DP, kPlaces>& s, int place, int before,
                                            int tiles, float scale, bool causal, int first_key,
                                            const float (&bias)[2], float* mass_grad = nullptr,
                                            const OfRows& of_rows = {}) {
  constexpr int kStages = ColumnsShared<DP, kPlaces>::kStages;
  constexpr bool kEarly = !kPooled && ColumnsShared<DP, kPlaces>::kEarly;
  const int key = 16 * (warp_index() % 4) + threadIdx.x % 32 / 4;
#pragma unroll 1
  for (int tile = before; tile < before + tiles; ++tile) {
    const bool last = kEarly && tile + 1 == before + tiles;
    // It is anyway: the compiler has to be told, or it moves descriptors through vector registers.
    const int stage = uniform(tile % kStages);
    float c[8][4], ds[8][4], b[2][2];
    uint32_t a[4][4], da[4][4];
    barrier_wait(&s.full[stage], tile / kStages & 1);
    pin(c);
    wgmma_fence();
    multiply_nt<T>(c, s.k[place], s.q[stage]);
    wgmma_commit();
    pin(ds);
    wgmma_fence();
    multiply_nt<T>(ds, s.v[place], s.grad_out[stage]);
    wgmma_commit();

    bias_towards<kPooled>(b, s, stage, key, bias);
    wgmma_wait<1>();
    pin(c);
    weigh_rows<kPooled>(c, s, stage, scale, causal, first_key + key, b);
    pack<T>(a, c);
    pin(dv);
    wgmma_fence();
    multiply_pn<T>(dv, a, s.grad_out[stage]);
    wgmma_commit();

    wgmma_wait<1>();
    pin(ds);
    if (last) barrier_arrive(&s.keys_empty[place]);
    differentiate_rows<T>(ds, a, s, stage);
    [[maybe_unused]] float pairs[8][2];  // of this thread's two keys
    if constexpr (kPooled) {
      add_columns(mass_grad, ds);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        pairs[n][0] = ds[n][0] + ds[n][2], pairs[n][1] = ds[n][1] + ds[n][3];
      }
    }
    pack<T>(da, ds);
    constexpr bool kBeside = DP == 64;  // the product; at 128 registers are full
    if constexpr (kPooled && !kBeside) of_rows(tile, pairs);
    pin(dk);
    wgmma_fence();
    multiply_pn<T>(dk, da, s.q[stage]);
    wgmma_commit();
    if constexpr (kPooled && kBeside) of_rows(tile, pairs);
    wgmma_wait<0>();
    pin(dv);
    pin(dk);
    if (!last) barrier_arrive(&s.empty[stage]);
  }
}

// The same by two warpgroups: kValues makes dv and hands the weights over, the other makes dk.
template <typename T, int DP, bool kPooled, bool kValues, int kPlaces>
__device__ __forceinline__ void attend_rows_wide(float (&sums)[DP / 8][4],
                                                 ColumnsShared<DP, kPlaces>& s, int place,
                                                 int before, int tiles, float scale, bool causal,
                                                 int first_key, const float (&bias)[2],
                                                 float* mass_grad = nullptr) {
  constexpr int kStages = ColumnsShared<DP, kPlaces>::kStages;
  constexpr bool kEarly = !kPooled && ColumnsShared<DP, kPlaces>::kEarly;
  const int key = 16 * (warp_index() % 4) + threadIdx.x % 32 / 4, thread = threadIdx.x % 128;
#pragma unroll 1
  for (int tile = before; tile < before + tiles; ++tile) {
    const bool last = kEarly && tile + 1 == before + tiles;
    const int stage = tile % kStages;
    float c[8][4], b[2][2];
    uint32_t a[4][4], weights[4][4];
    barrier_wait(&s.full[stage], tile / kStages & 1);
    pin(c);
    wgmma_fence();
    multiply_nt<T>(c, kValues ? s.k[place] : s.v[place], kValues ? s.q[stage] : s.grad_out[stage]);
    wgmma_commit();
    if constexpr (kValues) {
      bias_towards<kPooled>(b, s, stage, key, bias);
    } else {
      barrier_wait(&s.handed.full, tile & 1);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint4 w = s.handed.weights[j][thread];
        weights[j][0] = w.x, weights[j][1] = w.y, weights[j][2] = w.z, weights[j][3] = w.w;
      }
      barrier_arrive(&s.handed.empty);
    }
    wgmma_wait<0>();
    pin(c);
    if (last) barrier_arrive(&s.keys_empty[place]);
    if constexpr (kValues) {
      weigh_rows<kPooled>(c, s, stage, scale, causal, first_key + key, b);
      pack<T>(a, c);
      if (tile > 0) barrier_wait(&s.handed.empty, tile - 1 & 1);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s.handed.weights[j][thread] = make_uint4(a[j][0], a[j][1], a[j][2], a[j][3]);
      }
      barrier_arrive(&s.handed.full);
    } else {
      differentiate_rows<T>(c, weights, s, stage);
      if constexpr (kPooled) add_columns(mass_grad, c);
      pack<T>(a, c);
    }
    pin(sums);
    wgmma_fence();
    multiply_pn<T>(sums, a, kValues ? s.grad_out[stage] : s.q[stage]);
    wgmma_commit();
    wgmma_wait<0>();
    pin(sums);
    if (!last) barrier_arrive(&s.empty[stage]);
  }
}

}  // namespace mra::cuda::sm90
