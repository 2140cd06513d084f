// How the keys of a block weigh: softmax within the block of
//
//   l_j = s centre.k_j,  or  log of sum_i p_ij + r / 4 p_mean,j,  p_ij = softmax_j(s q_i.k_j)
//
// over r sampled queries and their mean. Both kernels multiply sixteen keys at a time, read
// straight into registers, with the rows of the sample, which stay in shared memory. Logits in log2
// units. With them comes what a plan adds to the scores of a block, from the first l_j in any case.
#include "block_sum.cuh"
#include "centred_keys.cuh"
#include "centred_logits.cuh"

namespace mra::cuda {
namespace {

constexpr int kWarps = 8;
template <typename T>
inline constexpr int kCtas = sizeof(T) == 4 ? 1 : 2;  // blocks of threads a multiprocessor
// Greatest logit and sum of exponentials of each row of the sample over a chunk of keys.
template <typename T, int DP>
__global__ void __launch_bounds__(kWarps * 32, kCtas<T>) lse_kernel(const WeightsParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float2 found[kWarps][kSampleRows];
  using K = Keys<T, DP, 2>;
  constexpr int kTiles = kSampleRows / 8;
  T* rows = reinterpret_cast<T*>(shared);
  const int head = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const K keys(p, head / p.Hk, head % p.Hk);
  const int begin = (chunk * p.chunk_blocks) << p.log2_block_k;
  const int end = min(p.M, begin + (p.chunk_blocks << p.log2_block_k));
  const float scale = p.scale * kLog2e;

  int first = begin + 16 * warp;
  typename K::Part next = keys.load(first < end ? first : p.M, 0);
  load_sample<T, DP, kSampleRows>(p, rows);
  __syncthreads();

  float top[kTiles][2], sum[kTiles][2];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    top[n][0] = top[n][1] = kLowest;
    sum[n][0] = sum[n][1] = 0.f;
  }
#pragma unroll 1
  for (; first < end; first += 16 * kWarps) {
    const bool valid[2] = {keys.valid(first + g), keys.valid(first + g + 8)};
    const int later = first + 16 * kWarps < end ? first + 16 * kWarps : p.M;
    float c[kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < K::kSteps; ++step) {
      const typename K::Part part = next;
      next = keys.load(step + 1 < K::kSteps ? first : later, (step + 1) % K::kSteps);
      K::multiply(c, part, step, rows, p.tf32);
    }
    to_sample_logits(c, scale, valid);
    bool grown = false;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grown = grown || c[n][i] > top[n][i % 2] + 8;
    }
    if (grown) {  // rarely
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float higher = fmaxf(top[n][e], fmaxf(c[n][e], c[n][e + 2]));
          sum[n][e] *= exp2_approx(top[n][e] - higher);
          top[n][e] = higher;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[n][i % 2] += exp2_approx(c[n][i] - top[n][i % 2]);
    }
  }

  const auto join = [](float2& x, const float2& y) {
    const float higher = fmaxf(x.x, y.x);
    x.y = x.y * exp2_approx(x.x - higher) + y.y * exp2_approx(y.x - higher);
    x.x = higher;
  };
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float2 mine = make_float2(top[n][e], sum[n][e]);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        const float2 other = make_float2(__shfl_xor_sync(kFullWarp, mine.x, step),
                                         __shfl_xor_sync(kFullWarp, mine.y, step));
        join(mine, other);
      }
      if (g == 0) found[warp][8 * n + 2 * t + e] = mine;
    }
  }
  __syncthreads();
  if (threadIdx.x < kSampleRows) {
    float2 mine = found[0][threadIdx.x];
    for (int w = 1; w < kWarps; ++w) join(mine, found[w][threadIdx.x]);
    p.parts[int64_t{blockIdx.x} * kSampleRows + threadIdx.x] = mine;
  }
}

// Log weights of a block of keys -> weights and mass, and what a plan adds from the logits `mean`
// of the mean query, by one warp.
__device__ __forceinline__ void finish_block(const WeightsParams& p, const float* logits,
                                             const float* mean, int head, int y) {
  constexpr int kTurns = 4;  // up to 128 keys
  using Logits = BlockLogits<kTurns, 32>;
  const int lane = threadIdx.x % 32, block = 1 << p.log2_block_k;
  const auto read = [&](const float* from) {
    Logits::Values l;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      l.x[i] = lane + 32 * i < block ? from[lane + 32 * i] : -INFINITY;
    }
    return l;
  };
  Logits x(read(logits));
  const int64_t at = int64_t{head} * p.nk + y;
  if (p.key_bias != nullptr) {
    const float bias = mean == logits ? x.bias() : Logits(read(mean)).bias();
    if (lane == 0) p.key_bias[at] = bias;
  }
  const float mass = x.finish();
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int j = lane + 32 * i;
    if (j < block) p.weights[(at << p.log2_block_k) + j] = x.w[i];
  }
  if (lane != 0) return;
  p.mass[at] = mass;
  if (p.count != nullptr && head % p.Hk == 0) p.count[int64_t{head / p.Hk} * p.nk + y] = x.count;
}

// Of the whole sample, or of the mean query alone.
template <typename T, int DP, bool kSampled>
__global__ void __launch_bounds__(kWarps * 32, kCtas<T>) weights_kernel(const WeightsParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int kRows = kSampled ? kSampleRows : 8, kTiles = kRows / 8;
  __shared__ float lse[kSampleRows], logits[kWarps][128], mean_logits[kSampled ? kWarps : 1][128];
  using K = Keys<T, DP, 2>;
  T* rows = reinterpret_cast<T*>(shared);
  const int head = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const K keys(p, head / p.Hk, head % p.Hk);
  const int end = min(p.nk, (chunk + 1) * p.chunk_blocks), tiles = 1 << (p.log2_block_k - 4);
  const float scale = p.scale * kLog2e;

  int y = chunk * p.chunk_blocks + warp, tile = 0;
  typename K::Part next = keys.load(y < end ? y << p.log2_block_k : p.M, 0);
  load_sample<T, DP, kRows>(p, rows);
  if (kSampled && threadIdx.x < kSampleRows) {
    lse[threadIdx.x] = lse_of_row(p.parts, p.offsets, head, p.chunks, threadIdx.x);
  }
  __syncthreads();
  float* const mean = kSampled ? mean_logits[warp] : logits[warp];
  float less[kTiles][2];  // lse of this thread's columns
  if constexpr (kSampled) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      less[n][0] = lse[8 * n + 2 * t];
      less[n][1] = lse[8 * n + 2 * t + 1];
    }
  }

#pragma unroll 1
  while (y < end) {
    const int first = (y << p.log2_block_k) + 16 * tile;
    const bool valid[2] = {keys.valid(first + g), keys.valid(first + g + 8)};
    const bool last = tile + 1 == tiles;
    const int next_y = last ? y + kWarps : y, next_tile = last ? 0 : tile + 1;
    const int later = next_y < end ? (next_y << p.log2_block_k) + 16 * next_tile : p.M;
    float c[kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < K::kSteps; ++step) {
      const typename K::Part part = next;
      next = keys.load(step + 1 < K::kSteps ? first : later, (step + 1) % K::kSteps);
      K::multiply(c, part, step, rows, p.tf32);
    }
    to_sample_logits(c, scale, valid);
    float l[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kSampled) {
        if (t == 0) mean[16 * tile + g + 8 * half] = c[0][2 * half];
        l[half] = log_weight(c, less, half);
      } else {
        l[half] = c[0][2 * half];
      }
      if (t == 0) logits[warp][16 * tile + g + 8 * half] = l[half];
    }
    if (last) {
      __syncwarp();
      finish_block(p, logits[warp], mean, head, y);
      __syncwarp();
    }
    y = next_y, tile = next_tile;
  }
}

constexpr int kCausalWarps = 4;

// Under causal, where each block of keys has a centre of its own: a warp for a block, kLanes lanes
// a key, 16 bytes of it each.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kCausalWarps * 32) causal_weights_kernel(const WeightsParams p) {
  __shared__ float logits[kCausalWarps][128];
  constexpr int kAtOnce = 32 / kLanes, kCount = kVec<T>;
  constexpr int kChunks = kLanes == 32 && sizeof(T) == 4 ? 2 : 1;
  const int64_t block = int64_t{blockIdx.x} * kCausalWarps + threadIdx.x / 32;
  if (block >= int64_t{p.B} * p.Hk * p.nk) return;  // whole warps leave
  const int lane = threadIdx.x % 32, own = lane / kLanes, part = lane % kLanes;
  const int head = static_cast<int>(block / p.nk), y = static_cast<int>(block % p.nk);
  const int b = head / p.Hk, hk = head - b * p.Hk, first = y << p.log2_block_k;
  const T* k = static_cast<const T*>(p.k) + b * p.k_strides.b + hk * p.k_strides.h;
  const uint8_t* mask = p.mask == nullptr ? nullptr : p.mask + int64_t{b} * p.M;
  const float* from = p.centre + (int64_t{head} * (p.centres.nq + 1) + p.centres.of_keys(y)) * p.D;
  float centre[kChunks][kCount] = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int d = (part + c * kLanes) * kCount;
#pragma unroll
    for (int e = 0; e < kCount; ++e) centre[c][e] = d < p.D ? from[d + e] : 0.f;
  }
  float* const mine = logits[threadIdx.x / 32];
#pragma unroll 4
  for (int j0 = 0; j0 < 1 << p.log2_block_k; j0 += kAtOnce) {
    const int j = first + j0 + own;
    const bool valid = j < p.M && (mask == nullptr || mask[j]);
    float x = 0.f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = (part + c * kLanes) * kCount;
      if (!valid || d >= p.D) continue;
      float key[kCount];
      unpack16<T>(load16(k + j * p.k_strides.l + d), key);
#pragma unroll
      for (int e = 0; e < kCount; ++e) x = fmaf(key[e], centre[c][e], x);
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) x += __shfl_xor_sync(kFullWarp, x, step);
    if (part == 0 && j0 + own < 1 << p.log2_block_k) {
      mine[j0 + own] = valid ? x * p.scale * kLog2e : -INFINITY;
    }
  }
  __syncwarp();
  finish_block(p, mine, mine, head, y);
}

struct LaunchCausalWeights {
  const WeightsParams& p;
  cudaStream_t stream;

  template <typename T, int kLanes>
  cudaError_t operator()() const {
    const int64_t warps = int64_t{p.B} * p.Hk * p.nk;
    return launch_grid(causal_weights_kernel<T, kLanes>, (warps + kCausalWarps - 1) / kCausalWarps,
                       kCausalWarps * 32, 0, stream, p);
  }
};

// f(T{}, integral_constant<int, DP>).
template <class F>
cudaError_t dispatch_weights(Dtype dtype, int head_dim, F f) {
  const auto by_dim = [&](auto t) {
    if (head_dim <= 32) return f(t, std::integral_constant<int, 32>{});
    if (head_dim <= 64) return f(t, std::integral_constant<int, 64>{});
    if (head_dim <= 128) return f(t, std::integral_constant<int, 128>{});
    return f(t, std::integral_constant<int, 256>{});
  };
  if (dtype == Dtype::f32) return by_dim(float{});
  return dtype == Dtype::f16 ? by_dim(__half{}) : by_dim(__nv_bfloat16{});
}

}  // namespace

int key_weights_slots(Dtype dtype, const Device& device) {
  return device.sms * (dtype == Dtype::f32 ? kCtas<float> : kCtas<__half>);
}

cudaError_t sample_lse(const WeightsParams& p, cudaStream_t stream) {
  return dispatch_weights(p.dtype, p.D, [&](auto t, auto dp) {
    using T = decltype(t);
    constexpr size_t kBytes = kSampleRows * kLd<T, dp()> * sizeof(T);
    return launch_grid(lse_kernel<T, dp()>, int64_t{p.B} * p.Hk * p.chunks, kWarps * 32, kBytes,
                       stream, p);
  });
}

cudaError_t key_weights(const WeightsParams& p, cudaStream_t stream) {
  return dispatch_weights(p.dtype, p.D, [&](auto t, auto dp) {
    using T = decltype(t);
    constexpr size_t kRow = kLd<T, dp()> * sizeof(T);
    const int64_t blocks = int64_t{p.B} * p.Hk * p.chunks;
    if (p.parts == nullptr) {
      return launch_grid(weights_kernel<T, dp(), false>, blocks, kWarps * 32, 8 * kRow, stream, p);
    }
    return launch_grid(weights_kernel<T, dp(), true>, blocks, kWarps * 32, kSampleRows * kRow,
                       stream, p);
  });
}

cudaError_t causal_key_weights(const WeightsParams& p, cudaStream_t stream) {
  return dispatch_rows(p.dtype, p.D, LaunchCausalWeights{p, stream});
}

}  // namespace mra::cuda
