// Attention of tiles of rows over a stream of keys: the fine stage (pooled keys under coarse = row,
// then the selected blocks, key by key) and, with list_rows = 1, the block-coarse stage. One warp
// holds 16 rows; online softmax in log2 units, accumulators in registers.
#pragma once

#include "keys.cuh"

namespace mra::cuda {

// Keys a tile: what keeps two stages of keys and values within 99 KB (sm_86, sm_89).
template <typename T, int DP, int kWarps>
inline constexpr int kForwardKeys = sizeof(T) == 2 ? (DP <= 64    ? (kWarps <= 2 ? 32 : 64)
                                                      : DP <= 128 ? 64
                                                                  : 32)
                                                   : (DP <= 64    ? (kWarps <= 2 ? 32 : 64)
                                                      : DP <= 128 ? 32
                                                                  : 16);

// More blocks of threads a multiprocessor are worth a few spilled words outside of the loop.
template <typename T, int DP>
inline constexpr int kForwardRegisters = sizeof(T) == 2 && DP <= 64 ? 128 : 255;

template <typename T, int DP>
struct OnlineSoftmax {
  static constexpr int kTiles = DP / 8;
  float acc[kTiles][4];
  float max[2], sum[2];                // sum: of this thread's columns only
  float pooled_max[2], pooled_sum[2];  // state after the pooled keys

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
    sum[0] *= factor[0];
    sum[1] *= factor[1];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      acc[n][0] *= factor[0];
      acc[n][1] *= factor[0];
      acc[n][2] *= factor[1];
      acc[n][3] *= factor[1];
    }
  }

  // Logits (scores times `scale`) -> weights. The shift follows the maximum only when that has
  // grown by more than 2^8: weights may exceed 1, which costs no accuracy, and most tiles rescale
  // nothing.
  template <int kScores>
  __device__ __forceinline__ void update(float (&s)[kScores][4], float scale) {
    constexpr float kSlack = 8.f;
    float factor[2], shift[2];
    bool grown = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float m = s[0][2 * half];
#pragma unroll
      for (int n = 0; n < kScores; ++n) m = fmaxf(m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      m = quad_max(m) * scale;
      const float old = max[half];
      if (m > old + kSlack) {
        max[half] = m;
        grown = true;
      }
      shift[half] = max[half] == -INFINITY ? 0.f : max[half];
      factor[half] = exp2_approx(old - shift[half]);
    }
    if (__any_sync(0xffffffffu, grown)) rescale(factor);
#pragma unroll
    for (int n = 0; n < kScores; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approx(fmaf(s[n][i], scale, -shift[i / 2]));
        sum[i / 2] += s[n][i];
      }
    }
  }
};

template <typename T, int DP, int kWarps>
__global__ void __maxnreg__((kForwardRegisters<T, DP>)) forward_kernel(const ForwardParams p) {
  constexpr int kKeys = kForwardKeys<T, DP, kWarps>, kLdT = kLd<T, DP>;
  constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
  extern __shared__ __align__(16) char smem[];

  constexpr int tile_rows = 16 * kWarps;
  const unsigned row_tiles = (p.rows + tile_rows - 1) / tile_rows;
  // Under causal the last tiles have most keys: start them first.
  const unsigned bh = blockIdx.x / row_tiles, from_start = blockIdx.x - bh * row_tiles;
  const int first_row = (p.causal ? row_tiles - 1 - from_start : from_start) * tile_rows;
  const int b = bh / static_cast<unsigned>(p.H), h = bh - b * p.H;
  const int rows = min(tile_rows, p.rows - first_row);
  const int64_t head = static_cast<int64_t>(b) * p.H + h;
  const int row = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  T* q = reinterpret_cast<T*>(smem);
  const T* q_head = static_cast<const T*>(p.q) + b * p.q_strides.b + h * p.q_strides.h;
  copy_sixteen<T, DP>(q + row * kLdT, q_head, p.q_strides.l, first_row + row, rows - row, p.D, p.q);
  KeyStream<T, DP, kKeys, kWarps> keys(p, smem + sizeof(T) * tile_rows * kLdT, b, h, first_row,
                                       rows);

  OnlineSoftmax<T, DP> softmax;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    softmax.max[half] = -INFINITY;
    softmax.sum[half] = 0.f;
  }
  const int64_t list = head * p.row_lists.lists + first_row / p.list_rows;
  // The mean is zero where the state is empty: one wait for both.
  if (p.state_lse != nullptr) {
    const float lse = p.state_lse[list];
    if (lse != -INFINITY) {
      softmax.max[0] = softmax.max[1] = lse * kLog2e;
      softmax.sum[0] = softmax.sum[1] = t == 0 ? 1.f : 0.f;
    }
  }
#pragma unroll
  for (int n = 0; n < DP / 8; ++n) {
    const int d = 8 * n + 2 * t;
    float2 u = make_float2(0.f, 0.f);
    if (p.state_lse != nullptr && d < p.D) {
      u = *reinterpret_cast<const float2*>(p.state_mean + list * p.D + d);
    }
    softmax.acc[n][0] = softmax.acc[n][2] = u.x;
    softmax.acc[n][1] = softmax.acc[n][3] = u.y;
  }
  auto keep_pooled = [&] {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.pooled_max[half] = softmax.max[half];
      softmax.pooled_sum[half] = softmax.sum[half];
    }
  };
  keep_pooled();

  constexpr bool kKeepRows = sizeof(T) == 2 && DP <= 128;  // the queries stay in registers
  Fragments<T, kKeepRows ? DP : Mma<T>::kStep> q_rows;
  // Turn -1 only fetches the first tile.
#pragma unroll 1
  for (int tile = -1; tile < keys.tiles; ++tile) {
    if (tile >= 0) {
      wait_for_copies();
      __syncthreads();
    }
    keys.ahead(tile + 1);
    if (tile < 0) continue;
    if (kKeepRows && tile == 0) q_rows.load(q, kLdT, row);

    float s[kKeys / 8][4] = {};
    const int buffer = tile % 2;
    const T* k = keys.k_tiles + buffer * keys.kTile;
    if constexpr (kKeepRows)
      multiply_nt<T, DP>(s, q_rows, k, kLdT, p.tf32);
    else
      multiply_nt<T, DP>(s, q, row, k, kLdT, p.tf32);
    float scale = p.scale * kLog2e;
    if (!keys.plain) {
      keys.to_logits(s, tile, row, scale);
      scale = 1.f;
    }
    softmax.update(s, scale);
    multiply_pn<T>(softmax.acc, s, keys.v_tiles + buffer * keys.kTile, kLdT, 0, p.tf32);
    if (tile + 1 == keys.pooled_tiles) keep_pooled();
  }
  wait_for_copies();

  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + g + 8 * half, i = first_row + r;
    float sum = quad_sum(softmax.sum[half]);
    const float pooled = quad_sum(softmax.pooled_sum[half]);
    if (r < rows && p.row_mask != nullptr && !p.row_mask[static_cast<int64_t>(b) * p.rows + i])
      sum = 0.f;
    const bool weight = !(sum == 0.f);  // NaN in, NaN out
    inverse[half] = weight ? 1.f / sum : 0.f;
    if (t == 0 && r < rows) {
      p.lse[head * p.rows + i] = weight ? (softmax.max[half] + log2f(sum)) * kLn2 : -INFINITY;
      if (p.share != nullptr) {
        const bool any = weight && pooled > 0.f;
        p.share[head * p.rows + i] =
            any ? pooled * exp2_approx(softmax.pooled_max[half] - softmax.max[half]) / sum : 0.f;
      }
    }
  }
#pragma unroll
  for (int n = 0; n < DP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) softmax.acc[n][i] *= inverse[i / 2];
  }
  T* out = static_cast<T*>(p.out) + b * p.out_strides.b + h * p.out_strides.h +
           (first_row + row) * p.out_strides.l;
  store_rows<T>(softmax.acc, out, p.out_strides.l, rows - row, 0, p.D == DP ? DP : p.D);
}

template <typename T, int DP>
cudaError_t launch_forward(const ForwardParams& p, const Device& device, cudaStream_t stream) {
  auto needed = [&](int warps) {
    return with_warps(warps, [&](auto w) {
      return sizeof(T) * w * 16 * kLd<T, DP> +
             KeyStream<T, DP, kForwardKeys<T, DP, w>, w>::shared_bytes(p);
    });
  };
  const int warps = row_warps(p, device, needed);
  return with_warps(warps, [&](auto w) {
    return launch(forward_kernel<T, DP, w>, p, row_blocks(p, w), w, needed(w), stream);
  });
}

}  // namespace mra::cuda
