// Attention of tiles of rows over a stream of keys: the fine stage (pooled keys under coarse = row,
// then the selected blocks, key by key) and, with list_rows = 1, the block-coarse stage. One warp
// holds 16 rows; online softmax in log2 units, accumulators in registers.
#pragma once

#include "keys.cuh"

namespace mra::cuda {

// Keys a tile: what keeps two stages of keys and values within 99 KB (sm_86, sm_89).
template <typename T, int DP>
inline constexpr int kForwardKeys = sizeof(T) == 2 ? (DP <= 128 ? 64 : 32)
                                                   : (DP <= 64 ? 64 : DP <= 128 ? 32 : 16);

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

  // Logits -> weights, against the new maximum.
  template <int kScores>
  __device__ __forceinline__ void update(float (&s)[kScores][4]) {
    float factor[2], shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float m = max[half];
#pragma unroll
      for (int n = 0; n < kScores; ++n) m = fmaxf(m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      m = quad_max(m);
      shift[half] = m == -INFINITY ? 0.f : m;
      factor[half] = exp2_approx(max[half] - shift[half]);
      max[half] = m;
    }
    rescale(factor);
#pragma unroll
    for (int n = 0; n < kScores; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approx(s[n][i] - shift[i / 2]);
        sum[i / 2] += s[n][i];
      }
    }
  }
};

template <typename T, int DP>
__global__ void __launch_bounds__(256) forward_kernel(const ForwardParams p) {
  constexpr int kKeys = kForwardKeys<T, DP>, kLdT = kLd<T, DP>;
  constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
  extern __shared__ __align__(16) char smem[];

  const int tile_rows = blockDim.x / 2;
  const int row_tiles = (p.rows + tile_rows - 1) / tile_rows;
  // Under causal the last tiles have most keys: start them first.
  const int row_tile = p.causal ? row_tiles - 1 - blockIdx.x % row_tiles : blockIdx.x % row_tiles;
  const int first_row = row_tile * tile_rows;
  const int b = blockIdx.x / row_tiles / p.H, h = blockIdx.x / row_tiles % p.H;
  const int rows = min(tile_rows, p.rows - first_row);
  const int64_t head = static_cast<int64_t>(b) * p.H + h;
  const int row = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  T* q = reinterpret_cast<T*>(smem);
  KeyStream<T, DP, kKeys> keys(p, smem + sizeof(T) * tile_rows * kLdT, b, h, first_row, rows);
  const T* q_head = static_cast<const T*>(p.q) + b * p.q_strides.b + h * p.q_strides.h;
  load_rows<T, DP, 0>(q, p.D, p.q, [&](int r) {
    return r < rows ? q_head + (first_row + r) * p.q_strides.l : nullptr;
  }, tile_rows);
  if (keys.tiles > 0) keys.fetch(0);
  else commit_copies();

  OnlineSoftmax<T, DP> softmax;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    softmax.max[half] = -INFINITY;
    softmax.sum[half] = 0.f;
  }
  const int64_t list = head * p.row_lists.lists + first_row / p.list_rows;
  const bool state = p.state_lse != nullptr && p.state_lse[list] != -INFINITY;
  if (state) {
    softmax.max[0] = softmax.max[1] = p.state_lse[list] * kLog2e;
    softmax.sum[0] = softmax.sum[1] = t == 0 ? 1.f : 0.f;
  }
#pragma unroll
  for (int n = 0; n < DP / 8; ++n) {
    const int d = 8 * n + 2 * t;
    float2 u = make_float2(0.f, 0.f);
    if (state && d < p.D) u = *reinterpret_cast<const float2*>(p.state_mean + list * p.D + d);
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

  for (int tile = 0; tile < keys.tiles; ++tile) {
    wait_for_copies();
    __syncthreads();
    if (tile + 1 < keys.tiles) keys.fetch(tile + 1);
    keys.find_granules(tile + 2);

    float s[kKeys / 8][4] = {};
    const int buffer = tile % 2;
    multiply_nt<T, DP>(s, q, row, keys.k_tiles + buffer * keys.kTile, kLdT, p.tf32);
    keys.to_logits(s, tile, row, p.scale * kLog2e);
    softmax.update(s);
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
    if (r < rows && p.row_mask != nullptr && !p.row_mask[static_cast<int64_t>(b) * p.rows + i]) sum = 0.f;
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
  T* out = static_cast<T*>(p.out) + b * p.out_strides.b + h * p.out_strides.h;
  store_rows<T>(
      softmax.acc, 0, p.D,
      [&](int r) { return row + r < rows ? out + (first_row + row + r) * p.out_strides.l : nullptr; },
      [](int, int) { return make_float2(0.f, 0.f); });
}

template <typename T, int DP>
cudaError_t launch_forward(const ForwardParams& p, int smem_limit, cudaStream_t stream) {
  auto needed = [&](int warps) {
    return sizeof(T) * warps * 16 * kLd<T, DP> +
           KeyStream<T, DP, kForwardKeys<T, DP>>::shared_bytes(p, 32 * warps);
  };
  const int warps = row_warps(p, smem_limit, needed);
  return launch(forward_kernel<T, DP>, p, row_blocks(p, warps), warps, needed(warps), stream);
}

}  // namespace mra::cuda
