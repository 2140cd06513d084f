// Gradients of the keys and values: of one key block from the rows of its column list, or of a
// tile of pooled keys from all rows that have not selected them. Scores are recomputed transposed,
// 16 keys a warp:
//   P = exp(S - lse), dV = P^T dO, dS = P (dO V^T - delta), dK = scale dS^T Q
// One owner a key and a fixed order of rows: deterministic without atomics.
#pragma once

#include "rows.cuh"

namespace mra::cuda {

template <typename T, int DP>
inline constexpr int kBackwardRows = sizeof(T) == 2 ? (DP <= 64 ? 64 : 32) : (DP <= 64 ? 32 : 16);
// Warps that share 16 keys, each with its part of the columns of dK and dV: keeps two accumulators
// of head_dim 256 in registers.
template <int DP>
inline constexpr int kColumnParts = DP <= 128 ? 1 : 2;

template <typename T, int DP, bool kPooled>
__global__ void __launch_bounds__(256) backward_columns_kernel(const BackwardParams p) {
  constexpr int kRows = kBackwardRows<T, DP>, kLdT = kLd<T, DP>;
  constexpr int kParts = kColumnParts<DP>, kWidth = DP / kParts;
  constexpr float kLog2e = 1.4426950408889634f;
  extern __shared__ __align__(16) char smem[];

  const int tile_keys = blockDim.x / 2 / kParts;
  const int all_keys = kPooled ? p.nk : p.M;
  const int key_tiles = (all_keys + tile_keys - 1) / tile_keys;
  int64_t block = blockIdx.x;
  const int first_key = static_cast<int>(block % key_tiles) * tile_keys;
  block /= key_tiles;
  const int hk = block % p.Hk;
  block /= p.Hk;
  const int b = block % p.B, split = block / p.B;
  const int keys = min(tile_keys, all_keys - first_key);
  const int key = threadIdx.x / 32 / kParts * 16, column = threadIdx.x / 32 % kParts * kWidth;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  T* k = reinterpret_cast<T*>(smem);
  T* v = k + tile_keys * kLdT;
  int first_tile = 0, last_tile = 0;
  if (kPooled) {
    const int row_tiles = (p.rows + kRows - 1) / kRows;
    const int share = (row_tiles + p.splits - 1) / p.splits;
    first_tile = min(split * share, row_tiles);
    last_tile = min(first_tile + share, row_tiles);
  }
  RowStream<T, DP, kRows, kPooled> rows(p, smem + sizeof(T) * 2 * tile_keys * kLdT, b, hk,
                                        kPooled ? first_key : first_key >> p.log2_block_k,
                                        tile_keys, first_tile, last_tile);
  auto load = [&](T* to, const void* from, const void* pooled, const Strides& strides) {
    const T* base = kPooled ? static_cast<const T*>(pooled) + (static_cast<int64_t>(b) * p.Hk + hk) * p.nk * p.D
                            : static_cast<const T*>(from) + b * strides.b + hk * strides.h;
    const int64_t stride = kPooled ? p.D : strides.l;
    load_rows<T, DP, 0>(to, p.D, p.q, [&](int r) {
      return r < keys ? base + (first_key + r) * stride : nullptr;
    }, tile_keys);
  };
  load(k, p.k, p.pooled_k, p.k_strides);
  load(v, p.v, p.pooled_v, p.v_strides);
  bool more = rows.more();
  if (more) rows.fetch(0);
  else commit_copies();

  bool live[2];
  float bias[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = key + g + 8 * half;
    live[half] = r < keys;
    bias[half] = 0.f;
    if (kPooled && live[half]) {
      const int c = p.key_count[static_cast<int64_t>(b) * p.nk + first_key + r];
      live[half] = c > 0;
      bias[half] = log2f(static_cast<float>(c));
    } else if (live[half] && p.key_mask != nullptr) {
      live[half] = p.key_mask[static_cast<int64_t>(b) * p.M + first_key + r];
    }
    if (!live[half]) bias[half] = -INFINITY;
  }

  float dk[kWidth / 8][4] = {}, dv[kWidth / 8][4] = {};
  for (int step = 0; more; ++step) {
    wait_for_copies();
    __syncthreads();
    const int buffer = step % 2;
    const int* first = rows.granules + step % 3 * rows.kGranules;
    more = rows.more();
    if (more) rows.fetch(buffer ^ 1);
    rows.find_granules();

    const T* q = rows.q_tiles + buffer * rows.kTile;
    const T* grad_out = rows.grad_tiles + buffer * rows.kTile;
    const float* lse = rows.lses + buffer * kRows;
    const float* delta = rows.deltas + buffer * kRows;
    float s[kRows / 8][4] = {}, ds[kRows / 8][4] = {};
    multiply_nt<T, DP>(s, k, key, q, kLdT, p.tf32);
    multiply_nt<T, DP>(ds, v, key, grad_out, kLdT, p.tf32);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint2 mask = make_uint2(0, 0);
      if (kPooled) mask = rows.masks[buffer * tile_keys + key + g + 8 * half];
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
        const float2 l = *reinterpret_cast<const float2*>(lse + 8 * n + 2 * t);
        const float2 d = *reinterpret_cast<const float2*>(delta + 8 * n + 2 * t);
        bool hidden[2] = {false, false};
        if (kPooled) {
          const uint32_t word = (n < 4 ? mask.x : mask.y) >> (n % 4 * 8 + 2 * t);
          hidden[0] = word & 1;
          hidden[1] = word >> 1 & 1;
        } else if (p.causal) {
          const int i = first[n / 2] + n % 2 * 8 + 2 * t, j = first_key + key + g + 8 * half;
          hidden[0] = j > i;
          hidden[1] = j > i + 1;
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * half + e];
          float w = exp2_approx(fmaf(x, p.scale * kLog2e, bias[half]) - (e ? l.y : l.x));
          if (hidden[e]) w = 0.f;
          x = w;
          ds[n][2 * half + e] = w * (ds[n][2 * half + e] - (e ? d.y : d.x));
        }
      }
    }
    multiply_pn<T>(dv, s, grad_out, kLdT, column, p.tf32);
    multiply_pn<T>(dk, ds, q, kLdT, column, p.tf32);
  }
  wait_for_copies();

#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dk[n][i] *= p.scale;
  }
  const int64_t head = static_cast<int64_t>(b) * p.Hk + hk;
  if (kPooled) {
    auto store = [&](const float (&c)[kWidth / 8][4], float* to) {
      to += ((split * static_cast<int64_t>(p.B) * p.Hk + head) * p.nk + first_key + key) * p.D;
      store_rows<float>(
          c, column, p.D, [&](int r) { return key + r < keys ? to + static_cast<int64_t>(r) * p.D : nullptr; },
          [](int, int) { return make_float2(0.f, 0.f); });
    };
    store(dk, p.pooled_grad_k);
    store(dv, p.pooled_grad_v);
  } else {
    auto store = [&](const float (&c)[kWidth / 8][4], void* grad, const Strides& strides,
                     const float* per_block, const void* extra, const Strides& extra_strides) {
      T* to = static_cast<T*>(grad) + b * strides.b + hk * strides.h;
      const T* more = static_cast<const T*>(extra) + b * extra_strides.b + hk * extra_strides.h;
      const int y = first_key >> p.log2_block_k;
      store_rows<T>(
          c, column, p.D,
          [&](int r) { return key + r < keys ? to + (first_key + key + r) * strides.l : nullptr; },
          [&](int r, int d) {
            float2 sum = make_float2(0.f, 0.f);
            if (!live[r >= 8]) return sum;
            if (per_block != nullptr) {
              sum = *reinterpret_cast<const float2*>(per_block + (head * p.nk + y) * p.D + d);
            }
            if (extra != nullptr) {
              const T* e = more + (first_key + key + r) * extra_strides.l + d;
              sum.x += to_float(e[0]);
              sum.y += to_float(e[1]);
            }
            return sum;
          });
    };
    store(dk, p.grad_k, p.grad_k_strides, p.k_block, p.k_extra, p.k_extra_strides);
    store(dv, p.grad_v, p.grad_v_strides, p.v_block, p.v_extra, p.v_extra_strides);
  }
}

// 16 keys a warp (or kColumnParts warps): those of one key block, or four times 16 pooled keys.
template <typename T, int DP, bool kPooled>
cudaError_t launch_columns(const BackwardParams& p, int smem_limit, cudaStream_t stream) {
  auto needed = [&](int sixteens) {
    return sizeof(T) * 2 * sixteens * 16 * kLd<T, DP> +
           RowStream<T, DP, kBackwardRows<T, DP>, kPooled>::shared_bytes(16 * sixteens);
  };
  int sixteens = kPooled ? 4 : p.block_k / 16;
  while (sixteens > 1 && (sixteens * kColumnParts<DP> > 8 ||
                          needed(sixteens) > static_cast<size_t>(smem_limit))) {
    sixteens /= 2;
  }
  const int64_t tiles = ((kPooled ? p.nk : p.M) + 16 * sixteens - 1) / (16 * sixteens);
  const int64_t blocks = tiles * p.B * p.Hk * (kPooled ? p.splits : 1);
  return launch(backward_columns_kernel<T, DP, kPooled>, p, blocks, sixteens * kColumnParts<DP>,
                needed(sixteens), stream);
}

template <typename T, int DP>
cudaError_t launch_backward_columns(const BackwardParams& p, int smem_limit, cudaStream_t stream) {
  return launch_columns<T, DP, false>(p, smem_limit, stream);
}
template <typename T, int DP>
cudaError_t launch_backward_pooled(const BackwardParams& p, int smem_limit, cudaStream_t stream) {
  return launch_columns<T, DP, true>(p, smem_limit, stream);
}

}  // namespace mra::cuda
