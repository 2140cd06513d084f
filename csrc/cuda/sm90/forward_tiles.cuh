// What the forward kernels share: tiles of queries, and all that their consumers are told of them,
// on their way into places, and the warp that fetches them together with their keys.
#pragma once

#include "forward.h"
#include "key_producer.cuh"

namespace mra::cuda::sm90 {

// Kernels that add the order-1 term. With a centre they make row_bias too.
template <int DP>
inline constexpr bool kOrder1 = DP <= 128;

struct ForwardMaps : ForwardParams, KeyMaps {
  int items;  // tiles of rows in all
  CUtensorMap q_map, out_map, moments_map;

  // For tiles of `rows` queries whose output leaves by `out_rows`.
  template <int DP>
  cudaError_t set_tiles(Dtype dtype, int rows, int out_rows) {
    const int64_t tiles = (this->rows + rows - 1) / rows * static_cast<int64_t>(B) * H;
    if (tiles > INT_MAX / 2) return cudaErrorInvalidConfiguration;
    items = static_cast<int>(tiles);
    if (DP > 128 && moments != nullptr) return cudaErrorNotSupported;
    const bool maps =
        (moments == nullptr || matrices_map(&moments_map, moments, B, Hk, matrix_dim<DP>(D))) &&
        tensor_map(&q_map, dtype, q, q_strides, B, H, this->rows, D, std::min(rows, 64)) &&
        tensor_map(&out_map, dtype, out, out_strides, B, H, this->rows, D, out_rows) &&
        set(*this, dtype, rows, rows >= 64);
    return maps ? cudaSuccess : cudaErrorNotSupported;
  }
};

// What the consumers are told of a tile of rows; no rows: of the end.
struct ForwardWork {
  int b, h, key_head, first_row, rows, pooled_tiles, tiles,
      few_pooled;  // key_head: of all batch entries
  float state_lse;
};

// What `values`, [B, H, rows] or null, holds for rows from `row` on of a tile.
__device__ __forceinline__ const float* of_rows(const float* values, const ForwardParams& p,
                                                const ForwardWork& at, int row) {
  if (values == nullptr) return nullptr;
  return values + (static_cast<int64_t>(at.b) * p.H + at.h) * p.rows + at.first_row + row;
}

// The centre of weighted means, and its products with C and Sigma, as they come with each tile of
// rows: zeros beyond their columns. Of each this thread's columns of tile `n` of eight.
template <int DP>
struct Centre {
  const float (&rows)[3][DP];

  static __device__ __forceinline__ int bytes(int D) { return 4 * (D + 2 * matrix_dim<DP>(D)); }
  // Those of a key head, of all batch entries; by one thread.
  static __device__ __forceinline__ void fetch(float (&rows)[3][DP], const ForwardParams& p,
                                               int64_t key_head, uint64_t* barrier) {
    const int dim = matrix_dim<DP>(p.D);
    const float* const products = p.centre_term + key_head * 2 * dim;
    copy_bytes(rows[0], p.centre + key_head * p.D, 4 * p.D, barrier);
    copy_bytes(rows[1], products, 4 * dim, barrier);
    copy_bytes(rows[2], products + dim, 4 * dim, barrier);
  }
  __device__ __forceinline__ float2 itself(int n) const { return pair(0, n); }
  __device__ __forceinline__ float2 times_c(int n) const { return pair(1, n); }
  __device__ __forceinline__ float2 times_sigma(int n) const { return pair(2, n); }

 private:
  __device__ __forceinline__ float2 pair(int row, int n) const {
    return *reinterpret_cast<const float2*>(&rows[row][8 * n + threadIdx.x % 4 * 2]);
  }
};

// kWarps attend 16 rows each; kStages tiles of keys.
template <int DP, int kWarps, int kStages, int kPlaces>
struct ForwardTiles {
  static constexpr int kRows = 16 * kWarps, kEach = kRows < 64 ? kRows : 64;
  // By warpgroups, or what there is of one; also the output on its way to memory.
  uint16_t q[kRows / kEach][kPlaces][DP / 64][kEach][64];
  // By head: tiles of 32 rows are short work, and their kernels have no registers for it.
  KeyRing<DP, kStages, kWarps, (kWarps >= 4)> ring;
  // The mean of the block-coarse state or, with kOrder1<DP>, Centre.
  alignas(16) float vectors[kPlaces][kOrder1<DP> ? 3 : 1][DP];
  ForwardWork work[kPlaces];
  float2 gamma[32 * kWarps];  // with weighted means, of each thread's rows: out of its registers
  uint64_t q_full[kPlaces], q_empty[kPlaces];
  uint32_t bitmap[1];

  // By all threads.
  __device__ void init() {
    if constexpr (kOrder1<DP>) {
      // Columns beyond the head dim stay zeros.
      for (int i = threadIdx.x; i < kPlaces * 3 * DP; i += blockDim.x) vectors[0][0][i] = 0.f;
      fence_for_copies();
    }
    if (threadIdx.x == 0) {
      barrier_init_ring(q_full, q_empty, kWarps);
      ring.init();
      barrier_init_done();
    }
    __syncthreads();
  }

  __device__ __forceinline__ Centre<DP> centre(int slot) const { return {vectors[slot]}; }

  // By one warp.
  __device__ void fetch_ahead(const ForwardMaps& p) {
    const bool centred = kOrder1<DP> && p.centre != nullptr;
    const WorkQueue<ForwardMaps> queue(p);
    KeyProducer<DP, decltype(ring)> producer(p, p, ring, bitmap, queue.first());
    const auto fetch_first = [&] {
      if (p.centre != nullptr) producer.fetch_sigma(p.moments_map);
    };
    const auto fetch_last = [&] {
      if (p.centre != nullptr) {
        producer.fetch_c(p.moments_map);
      } else if (p.moments != nullptr) {
        producer.fetch_matrices(p.moments_map);
      }
    };
    const auto fetch_rows = [&](const auto& at, int turn) {
      const int slot = turn % kPlaces;
      if (turn >= kPlaces) barrier_wait(&q_empty[slot], turn / kPlaces - 1 & 1);
      const bool state = p.state_mean != nullptr;
      const int64_t list = at.head * p.row_lists.lists + at.x;
      if (producer.lane == 0) {
        work[slot] = {at.b,
                      at.h,
                      at.b * p.Hk + at.hk,
                      at.first_row,
                      at.rows,
                      at.pooled_tiles,
                      at.tiles,
                      at.few_pooled(),
                      state ? p.state_lse[list] : 0.f};
      }
      int bytes = kRows * DP * 2 + (state ? p.D * 4 : 0);
      if (centred) bytes += Centre<DP>::bytes(p.D);
      barrier_expect(&q_full[slot], bytes);
      if (producer.lane == 0) {
        for (int i = 0; i < DP / 64; ++i) {
          for (int group = 0; group < kRows / kEach; ++group) {
            copy_panel(q[group][slot][i], p.q_map, &q_full[slot], 64 * i,
                       at.first_row + kEach * group, at.h, at.b);
          }
        }
        if (state) {
          copy_bytes(vectors[slot][0], p.state_mean + list * p.D, p.D * 4, &q_full[slot]);
        }
        if constexpr (kOrder1<DP>) {
          if (centred) {
            Centre<DP>::fetch(vectors[slot], p, at.b * p.Hk + at.hk, &q_full[slot]);
          }
        }
      }
      __syncwarp();
    };
    const auto end = [&](int turn) {
      const int slot = turn % kPlaces;
      if (turn >= kPlaces) barrier_wait(&q_empty[slot], turn / kPlaces - 1 & 1);
      if (producer.lane == 0) work[slot].rows = 0;
      barrier_arrive(&q_full[slot]);
    };
    producer.template run_all<kPlaces>(queue, fetch_rows, fetch_first, fetch_last, end);
  }
};

// This thread's columns of tile `n` of eight, of queries in its row of the eight from `row` on.
template <typename T, int kPanels, int kRows>
__device__ __forceinline__ float2 query_pair(const uint16_t (&q)[kPanels][kRows][64], int row,
                                             int n) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint16_t* at = &q[n / 8][row + g][(n % 8 ^ g) * 8 + 2 * t];
  return unpack2(*reinterpret_cast<const uint32_t*>(at), T{});
}

// Scores of a warp's 16 rows, from `row` on of the queries, with a tile of keys, without a product
// of the warpgroup: slow, for what hardly ever happens.
template <typename T, int kTiles, int kPanels, int kRows>
__device__ __forceinline__ void scores_again(float (&c)[kTiles][4],
                                             const uint16_t (&q)[kPanels][kRows][64],
                                             const uint16_t (&k)[kPanels][64][64], int row) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
  const auto pair = [](const auto& panel, int row, int d) {
    return unpack2(*reinterpret_cast<const uint32_t*>(&panel[row][(d / 8 ^ row % 8) * 8 + d % 8]),
                   T{});
  };
#pragma unroll 1
  for (int d = 0; d < 64 * kPanels; d += 2) {
    const auto& q_panel = q[d / 64];
    const auto& k_panel = k[d / 64];
    const float2 u[2] = {pair(q_panel, row + g, d % 64), pair(q_panel, row + g + 8, d % 64)};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 w = pair(k_panel, 8 * n + 2 * t + i % 2, d % 64);
        c[n][i] = fmaf(u[i / 2].x, w.x, fmaf(u[i / 2].y, w.y, c[n][i]));
      }
    }
  }
}

// What products with C (0) or Sigma (1) are to be multiplied by.
template <typename T>
__device__ __forceinline__ float moment_scale(const ForwardParams& p, const ForwardWork& at,
                                              int which) {
  if constexpr (!std::is_same_v<T, __half>) return 1.f;
  return __ldg(p.moment_scales + 2 * static_cast<int64_t>(at.key_head) + which);
}

// gamma of a row, from this thread's part of q Sigma q^T, which is to be multiplied by `scale`.
__device__ __forceinline__ float gamma_of(const ForwardParams& p, float part, float scale) {
  return reciprocal_approx(1.f + p.scale * p.scale / 4 * scale * quad_sum(part));
}

// With weighted means: gamma of this thread's rows, g and g + 8 behind `row` of the queries `q`,
// from Sigma in place `place` of the ring, before the keys of these rows. multiply(x, stage, n): x
// = the rows times Sigma, kTiles tiles of eight columns of it from tile n on.
template <typename T, int kTiles, int kColumns, int kPanels, int kRows, class Centre, class Ring,
          class Multiply>
__device__ __forceinline__ void find_gamma(float2& gamma, const uint16_t (&q)[kPanels][kRows][64],
                                           const Centre& centre, int row, Ring& ring, int place,
                                           const ForwardParams& p, const ForwardWork& at,
                                           const Multiply& multiply) {
  const int stage = place % Ring::kStages, phase = place / Ring::kStages & 1;
  barrier_wait(&ring.k_full[stage], phase);
  barrier_wait(&ring.v_full[stage], phase);
  float dot[2] = {};
#pragma unroll
  for (int first = 0; first < kColumns / 8; first += kTiles) {
    float x[kTiles][4];
    float2 mean[kTiles], less[kTiles];  // on their way beside the product
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      mean[i] = centre.itself(first + i);
      less[i] = centre.times_sigma(first + i);
    }
    multiply(x, stage, first);
    if (first + kTiles == kColumns / 8) {
      barrier_arrive(&ring.k_empty[stage]);
      barrier_arrive(&ring.v_empty[stage]);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 u = query_pair<T>(q, row + 8 * half, first + i);
        dot[half] = fmaf(u.x - mean[i].x, x[i][2 * half] - less[i].x, dot[half]);
        dot[half] = fmaf(u.y - mean[i].y, x[i][2 * half + 1] - less[i].y, dot[half]);
      }
    }
  }
  const float scale = moment_scale<T>(p, at, 1);
  gamma = make_float2(gamma_of(p, dot[0], scale), gamma_of(p, dot[1], scale));
}

// Behind the last pooled keys of a warp's 16 rows, from `row` on: with weighted means their logits
// get log(1 + gamma t / 2) each, made here or given.
template <typename T, int DP, class Softmax>
__device__ __forceinline__ void end_pooled(Softmax& softmax, const float2& gamma,
                                           const ForwardParams& p, const ForwardWork& at, int row) {
  if (kOrder1<DP> && p.centre != nullptr) {
    softmax.end_pooled({log2_approx(3.f - 2.f * gamma.x), log2_approx(3.f - 2.f * gamma.y)});
  } else {
    softmax.end_pooled(of_rows(p.row_bias, p, at, row), at.rows - row);
  }
}

// Adds the order-1 term that was made beforehand to the output of a warp's 16 rows, from `row` on.
template <typename T, int kTiles>
__device__ __forceinline__ void add_term(float (&acc)[kTiles][4], const float (&share)[2],
                                         const ForwardParams& p, const ForwardWork& at, int row) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = row + g + 8 * half;
    if (i >= at.rows || share[half] == 0.f) continue;
    const T* from = static_cast<const T*>(p.term) + at.b * p.term_strides.b +
                    at.h * p.term_strides.h + (at.first_row + i) * p.term_strides.l + 2 * t;
    uint32_t bits[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      bits[n] = 8 * n < p.D ? __ldg(reinterpret_cast<const uint32_t*>(from + 8 * n)) : 0;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 u = unpack2(bits[n], T{});
      acc[n][2 * half] = fmaf(share[half], u.x, acc[n][2 * half]);
      acc[n][2 * half + 1] = fmaf(share[half], u.y, acc[n][2 * half + 1]);
    }
  }
}

// Calls f(stage) on matrices in place `place` of the ring: among its keys, its values or both.
template <class Ring, class F>
__device__ __forceinline__ void with_place(Ring& ring, int place, bool keys, bool values,
                                           const F& f) {
  const int stage = place % Ring::kStages, phase = place / Ring::kStages & 1;
  if (keys) barrier_wait(&ring.k_full[stage], phase);
  if (values) barrier_wait(&ring.v_full[stage], phase);
  f(stage);
  if (keys) barrier_arrive(&ring.k_empty[stage]);
  if (values) barrier_arrive(&ring.v_empty[stage]);
}

// Adds the order-1 term to the output of a warp's 16 rows, from `row` of the queries `q`: Sigma and
// C lie in the ring's next places, as KeyProducer::fetch_matrices has put them; with weighted means
// C alone, and gamma is `known`. `share`: the pooled part of this thread's rows. multiply(x, first,
// second): x = the rows times the matrix whose columns from 0 on start at `first`, those from 64 on
// at `second`.
template <typename T, int kTiles, int kPanels, int kRows, class Centre, class Ring, class Multiply>
__device__ __forceinline__ void add_order1(float (&acc)[kTiles][4], const float (&share)[2],
                                           const uint16_t (&q)[kPanels][kRows][64],
                                           const Centre& centre, int row, Ring& ring, int& place,
                                           const ForwardParams& p, const ForwardWork& at,
                                           const float2& known, const Multiply& multiply) {
  constexpr bool kBoth = kPanels > 1;  // of a matrix's place both halves
  const bool centred = p.centre != nullptr;
  float x[kTiles][4], gamma[2];
  if (centred) {
    gamma[0] = known.x, gamma[1] = known.y;
  } else {
    with_place(ring, place, true, kBoth,
               [&](int stage) { multiply(x, ring.k[stage], ring.v[stage]); });
    if (kBoth) ++place;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float dot = 0.f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float2 u = query_pair<T>(q, row + 8 * half, n);
        dot += u.x * x[n][2 * half] + u.y * x[n][2 * half + 1];
      }
      gamma[half] = gamma_of(p, dot, moment_scale<T>(p, at, 1));
    }
  }
  float factor[2];
  const float scale = p.scale * moment_scale<T>(p, at, 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    factor[half] = share[half] == 0.f ? 0.f : share[half] * gamma[half] * scale;
  }
  with_place(ring, place, kBoth || centred, true,
             [&](int stage) { multiply(x, kBoth ? ring.k[stage] : ring.v[stage], ring.v[stage]); });
  ++place;
  if (centred) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 u = centre.times_c(n);
      x[n][0] -= u.x, x[n][1] -= u.y, x[n][2] -= u.x, x[n][3] -= u.y;
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (factor[i / 2] != 0.f) acc[n][i] = fmaf(factor[i / 2], x[n][i], acc[n][i]);
    }
  }
}

}  // namespace mra::cuda::sm90
