// Gradients of the keys and values: of one key block from the rows of its column list, or of a
// tile of pooled keys from all rows that have not selected them. Scores are recomputed transposed,
// 16 keys a warp:
//   P = exp(S - lse), dV = P^T dO, dS = P (dO V^T - delta), dK = scale dS^T Q
// One owner a key and a fixed order of rows: deterministic without atomics.
#pragma once

#include "rows.cuh"

namespace mra::cuda {

template <typename T, int DP, int kWarps>
inline constexpr int kBackwardRows = sizeof(T) == 2 ? (DP <= 64 ? (kWarps <= 2 ? 32 : 64) : 32)
                                                    : (DP <= 64 ? 32 : 16);
// Warps that share 16 keys, each with its part of the columns of dK and dV: keeps two accumulators
// of head_dim 256 in registers.
template <int DP>
inline constexpr int kColumnParts = DP <= 128 ? 1 : 2;

template <typename T, int DP, int kSixteens>
inline constexpr int kColumnsRegisters = sizeof(T) == 2 && DP <= 64 ? (kSixteens <= 2 ? 144 : 168)
                                                                    : 255;

template <typename T, int DP, bool kPooled, int kSixteens>
__global__ void __maxnreg__((kColumnsRegisters<T, DP, kSixteens>))
    backward_columns_kernel(const BackwardParams p) {
  constexpr int kWarps = kSixteens * kColumnParts<DP>;
  constexpr int kRows = kBackwardRows<T, DP, kWarps>, kLdT = kLd<T, DP>;
  constexpr int kParts = kColumnParts<DP>, kWidth = DP / kParts;
  extern __shared__ __align__(16) char smem[];

  constexpr int tile_keys = 16 * kSixteens;
  const int all_keys = kPooled ? p.nk : p.M;
  const unsigned key_tiles = (all_keys + tile_keys - 1) / tile_keys, heads = p.B * p.Hk;
  const unsigned behind = blockIdx.x / key_tiles;
  const int first_key = (blockIdx.x - behind * key_tiles) * tile_keys;
  const int split = behind / heads, b = behind % heads / p.Hk, hk = behind % heads % p.Hk;
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
  RowStream<T, DP, kRows, kPooled, kWarps> rows(p, smem + sizeof(T) * 2 * tile_keys * kLdT, b, hk,
                                                kPooled ? first_key : first_key >> p.log2_block_k,
                                                tile_keys, first_tile, last_tile);
  {
    const int64_t pooled_head = (static_cast<int64_t>(b) * p.Hk + hk) * p.nk * p.D;
    const T* from_k = kPooled ? static_cast<const T*>(p.pooled_k) + pooled_head
                              : static_cast<const T*>(p.k) + b * p.k_strides.b + hk * p.k_strides.h;
    const T* from_v = kPooled ? static_cast<const T*>(p.pooled_v) + pooled_head
                              : static_cast<const T*>(p.v) + b * p.v_strides.b + hk * p.v_strides.h;
    for (int i = warp_index(); i < 2 * kSixteens; i += kWarps) {
      const bool values = i >= kSixteens;
      const int r = 16 * (i % kSixteens);
      const int stride = static_cast<int>(kPooled ? p.D : values ? p.v_strides.l : p.k_strides.l);
      copy_sixteen<T, DP>((values ? v : k) + r * kLdT, values ? from_v : from_k, stride,
                          first_key + r, keys - r, p.D, p.q);
    }
  }

  bool live[2];
  float bias[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = key + g + 8 * half;
    live[half] = r < keys;
    bias[half] = 0.f;
    if (kPooled && live[half]) {
      const float mass = mass_of(p, masses_of(p, b, hk)[first_key + r]);
      live[half] = mass > 0.f;
      bias[half] = log2f(mass);
    } else if (live[half] && p.key_mask != nullptr) {
      live[half] = p.key_mask[static_cast<int64_t>(b) * p.M + first_key + r];
    }
  }

  float dk[kWidth / 8][4] = {}, dv[kWidth / 8][4] = {}, mass_grad[2] = {};
  // Turn -1 only fetches the first tile.
  bool left = true;
#pragma unroll 1
  for (int step = -1; left; ++step) {
    if (step >= 0) {
      wait_for_copies();
      __syncthreads();
    }
    left = rows.more();
    if (left) rows.fetch((step + 1) % 2);
    commit_copies();
    if (step < 0) continue;
    const int buffer = step % 2;

    const T* q = rows.q_tiles + buffer * rows.kTile;
    const T* grad_out = rows.grad_tiles + buffer * rows.kTile;
    const float* lse = rows.lses + buffer * kRows;
    const float* delta = rows.deltas + buffer * kRows;
    float s[kRows / 8][4] = {}, ds[kRows / 8][4];
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      const float2 d = *reinterpret_cast<const float2*>(delta + 8 * n + 2 * t);
      ds[n][0] = ds[n][2] = -d.x;
      ds[n][1] = ds[n][3] = -d.y;
    }
    multiply_nt<T, DP>(s, k, key, q, kLdT, p.tf32_scores);
    multiply_nt<T, DP>(ds, v, key, grad_out, kLdT, p.tf32);
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      const float2 l = *reinterpret_cast<const float2*>(lse + 8 * n + 2 * t);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x = fmaf(s[n][i], p.scale * kLog2e, i % 2 ? -l.y : -l.x);
        if (kPooled) x += bias[i / 2];
        s[n][i] = exp2_approx(x);
      }
    }
    if (kPooled) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 mask = rows.masks[buffer * tile_keys + key + g + 8 * half];
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n) {
          const uint32_t word = (n < 4 ? mask.x : mask.y) >> (n % 4 * 8 + 2 * t);
          if (word & 1) s[n][2 * half] = 0.f;
          if (word >> 1 & 1) s[n][2 * half + 1] = 0.f;
        }
      }
    } else if (p.causal) {
      const int* first = rows.granules + buffer * rows.kGranules;
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
        const int i = first[n / 2] + n % 2 * 8 + 2 * t, j = first_key + key + g;
        if (j > i) s[n][0] = 0.f;
        if (j > i + 1) s[n][1] = 0.f;
        if (j + 8 > i) s[n][2] = 0.f;
        if (j + 8 > i + 1) s[n][3] = 0.f;
      }
    }
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ds[n][i] *= s[n][i];
        if (kPooled) mass_grad[i / 2] += ds[n][i];
      }
    }
    multiply_pn<T>(dv, s, grad_out, kLdT, column, p.tf32);
    multiply_pn<T>(dk, ds, q, kLdT, column, p.tf32);
  }
  wait_for_copies();

  const int64_t head = static_cast<int64_t>(b) * p.Hk + hk;
  const int own = first_key + key, present = keys - key;
  const int64_t block = (head * p.nk + (first_key >> p.log2_block_k)) * p.D;
  auto store = [&](float(&c)[kWidth / 8][4], float scale, float* pooled, void* grad,
                   const Strides& strides, const float* per_block) {
    const float factor[2] = {scale, scale};
    const bool add = !kPooled && per_block != nullptr;
    finish_rows(c, factor, live, add ? per_block + block : nullptr, column, p.D);
    if (kPooled) {
      const int64_t at = ((split * static_cast<int64_t>(p.B) * p.Hk + head) * p.nk + own) * p.D;
      store_rows<float>(c, pooled + at, p.D, present, column, p.D);
      return;
    }
    T* to = static_cast<T*>(grad) + b * strides.b + hk * strides.h + own * strides.l;
    if (p.add) add_rows<T>(c, to, strides.l, present, column, p.D, live);
    store_rows<T>(c, to, strides.l, present, column, p.D == DP ? DP : p.D);
  };
  if (kPooled && p.pooled_mass_grads != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(mass_grad[half]);
      const int r = g + 8 * half;
      if (t != 0 || column != 0 || r >= present) continue;
      p.pooled_mass_grads[(split * static_cast<int64_t>(p.B) * p.Hk + head) * p.nk + own + r] =
          live[half] ? sum : 0.f;
    }
  }
  store(dk, p.scale, p.pooled_grad_k, p.grad_k, p.grad_k_strides, p.k_block);
  store(dv, 1.f, p.pooled_grad_v, p.grad_v, p.grad_v_strides, p.v_block);
}

// 16 keys a warp (or kColumnParts warps): those of one key block, or up to 64 pooled keys.
template <typename T, int DP, bool kPooled>
cudaError_t launch_columns(const BackwardParams& p, const Device& device, cudaStream_t stream) {
  constexpr int kMost = 8 / kColumnParts<DP>;
  auto with_sixteens = [](int n, auto f) {
    return with_warps(
        n, [&](auto s) { return f(std::integral_constant<int, (s < kMost ? s : kMost)>{}); });
  };
  auto needed = [&](int sixteens) {
    return with_sixteens(sixteens, [&](auto n) {
      constexpr int kWarps = n * kColumnParts<DP>;
      return sizeof(T) * 2 * n * 16 * kLd<T, DP> +
             RowStream<T, DP, kBackwardRows<T, DP, kWarps>, kPooled, kWarps>::shared_bytes(16 * n);
    });
  };
  int sixteens = kPooled ? 4 : p.block_k / 16;
  while (sixteens > 1 && (sixteens > kMost || (kPooled && 8 * sixteens >= p.nk) ||
                          needed(sixteens) > static_cast<size_t>(device.max_smem))) {
    sixteens /= 2;
  }
  const int64_t tiles = ((kPooled ? p.nk : p.M) + 16 * sixteens - 1) / (16 * sixteens);
  const int64_t blocks = tiles * p.B * p.Hk * (kPooled ? p.splits : 1);
  return with_sixteens(sixteens, [&](auto n) {
    return launch_grid(backward_columns_kernel<T, DP, kPooled, n>, blocks,
                       32 * n * kColumnParts<DP>, needed(n), stream, p);
  });
}

template <typename T, int DP>
cudaError_t launch_backward_columns(const BackwardParams& p, const Device& device,
                                    cudaStream_t stream) {
  return launch_columns<T, DP, false>(p, device, stream);
}
template <typename T, int DP>
cudaError_t launch_backward_pooled(const BackwardParams& p, const Device& device,
                                   cudaStream_t stream) {
  return launch_columns<T, DP, true>(p, device, stream);
}

}  // namespace mra::cuda
