// Gradients through the weights of keys within their blocks. Up to what a block has in common, a
// log weight has the gradient of s centre.k_j (docs/algorithm.md):
//
//   x_j  = kappa_j . dk_y + nu_j . dv_y - log pi_j da_y + what the moments' gradients give
//   dl_j = pi_j (x_j - sum_j pi_j x_j)    dk_j += s dl_j centre    dcentre = s sum_j dl_j k_j
//
// and every valid query of the group gets its share of dcentre (centred_queries.cu).
#include "block_sum.cuh"
#include "centred.cuh"
#include "centred.h"

namespace mra::cuda {
namespace {

constexpr int kWarps = 4, kMostKeys = 128;

template <int kCount>
__device__ __forceinline__ void load_floats(float (&x)[kCount], const float* from) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 u = *reinterpret_cast<const float4*>(from + i);
    x[i] = u.x, x[i + 1] = u.y, x[i + 2] = u.z, x[i + 3] = u.w;
  }
}

// A warp for a block of keys, kLanes lanes a key, 16 bytes of it each.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kWarps * 32)
    key_weights_backward_kernel(const KeyWeightsBackwardParams p) {
  __shared__ float weighed[kWarps][kMostKeys];  // pi_j x_j
  constexpr int kAtOnce = 32 / kLanes, kCount = kVec<T>;
  constexpr int kChunks = kLanes == 32 && sizeof(T) == 4 ? 2 : 1;
  const int64_t block = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t blocks = int64_t{p.B} * p.Hk * p.nk;
  if (block >= blocks) return;  // whole warps leave
  const int lane = threadIdx.x % 32, own = lane / kLanes, part = lane % kLanes;
  const int head = static_cast<int>(block / p.nk), y = static_cast<int>(block % p.nk);
  const int b = head / p.Hk, hk = head - b * p.Hk, first = y << p.log2_block_k;
  const int count = min(1 << p.log2_block_k, p.M - first);
  const float* weights = p.weights + (block << p.log2_block_k);
  float* const mine = weighed[threadIdx.x / 32];
  const auto row = [&](auto* base, const Strides& s, int j) {
    return base + b * s.b + hk * s.h + int64_t{first + j} * s.l;
  };
  const T *k = static_cast<const T*>(p.k), *v = static_cast<const T*>(p.v);
  T *grad_k = static_cast<T*>(p.grad_k), *grad_v = static_cast<T*>(p.grad_v);
  const auto read = [&](float(&x)[kCount], const T* from) {
    unpack16<T>(*reinterpret_cast<const uint4*>(from), x);
  };

  const float mass_grad = p.mass_grad[block];
  float k_mean[kChunks][kCount] = {}, dk[kChunks][kCount] = {}, dv[kChunks][kCount] = {};
  // What key j, of weight w, and its value get beside what comes through the weights.
  const auto read_part = [&](float(&gk)[kCount], float(&gv)[kCount], int j, float w, int c, int d) {
    if (p.part_k != nullptr) {
      load_floats(gk, row(p.part_k, p.part_k_strides, j) + d);
      load_floats(gv, row(p.part_v, p.part_v_strides, j) + d);
      return;
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) gk[e] = w * dk[c][e], gv[e] = w * dv[c][e];
  };
  float total = 0.f;
  {
    float v_mean[kChunks][kCount] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = (part + c * kLanes) * kCount;
      if (d >= p.D) continue;
      load_floats(k_mean[c], p.k_mean + block * p.D + d);
      load_floats(v_mean[c], p.v_mean + block * p.D + d);
      load_floats(dk[c], p.shares + block * p.D + d);
      load_floats(dv[c], p.shares + (blocks + block) * p.D + d);
    }
#pragma unroll 2
    for (int j0 = 0; j0 < count; j0 += kAtOnce) {
      const int j = j0 + own;
      const float w = j < count ? weights[j] : 0.f;
      float x = 0.f;
      if (w != 0.f) {  // what does not count may be NaN
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int d = (part + c * kLanes) * kCount;
          if (d >= p.D) continue;
          float key[kCount], value[kCount], gk[kCount], gv[kCount];
          read(key, row(k, p.k_strides, j) + d);
          read(value, row(v, p.v_strides, j) + d);
          read_part(gk, gv, j, w, c, d);
#pragma unroll
          for (int e = 0; e < kCount; ++e) {
            // Of what moments gave, products of two deviations, a half each.
            const float of_k = 0.5f * (w * dk[c][e] + gk[e]), of_v = 0.5f * (w * dv[c][e] + gv[e]);
            x += (key[e] - k_mean[c][e]) * of_k + (value[e] - v_mean[c][e]) * of_v;
          }
        }
      }
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) x += __shfl_xor_sync(kFullWarp, x, step);
      if (w != 0.f) x -= w * logf(w) * mass_grad;
      total += x;
      if (part == 0 && j < count) mine[j] = x;
    }
  }
#pragma unroll
  for (int step = kLanes; step < 32; step *= 2) total += __shfl_xor_sync(kFullWarp, total, step);
  __syncwarp();

  float sum[kChunks][kCount] = {}, centre[kChunks][kCount] = {};
  const int64_t centre_at =
      p.causal ? int64_t{head} * (p.centres.nq + 1) + p.centres.of_keys(y) : head;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int d = (part + c * kLanes) * kCount;
    if (d < p.D) load_floats(centre[c], p.centre + centre_at * p.D + d);
  }
#pragma unroll 2
  for (int j0 = 0; j0 < count; j0 += kAtOnce) {
    const int j = j0 + own;
    if (j >= count) continue;
    const float w = weights[j], grad = p.scale * (mine[j] - w * total);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = (part + c * kLanes) * kCount;
      if (d >= p.D) continue;
      float key[kCount], gk[kCount] = {}, gv[kCount] = {};
      if (w != 0.f) {
        read(key, row(k, p.k_strides, j) + d);
        read_part(gk, gv, j, w, c, d);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          gk[e] = fmaf(grad, centre[c][e], gk[e]);
          sum[c][e] = fmaf(grad, key[e] - k_mean[c][e], sum[c][e]);  // their gradients add up to 0
        }
      }
      store_values<kCount>(row(grad_k, p.grad_k_strides, j) + d, gk);
      store_values<kCount>(row(grad_v, p.grad_v_strides, j) + d, gv);
    }
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
#pragma unroll
      for (int step = kLanes; step < 32; step *= 2) {
        sum[c][e] += __shfl_xor_sync(kFullWarp, sum[c][e], step);
      }
    }
    const int d = (part + c * kLanes) * kCount;
    if (own == 0 && d < p.D) {
      float* const to = p.sums + block * p.D + d;
#pragma unroll
      for (int e = 0; e < kCount; e += 4) {
        *reinterpret_cast<float4*>(to + e) =
            make_float4(sum[c][e], sum[c][e + 1], sum[c][e + 2], sum[c][e + 3]);
      }
    }
  }
}

struct LaunchKeyWeightsBackward {
  const KeyWeightsBackwardParams& p;
  cudaStream_t stream;

  template <typename T, int kLanes>
  cudaError_t operator()() const {
    const int64_t warps = int64_t{p.B} * p.Hk * p.nk;
    return launch_grid(key_weights_backward_kernel<T, kLanes>, (warps + kWarps - 1) / kWarps,
                       kWarps * 32, 0, stream, p);
  }
};

// One block of threads for one key head: what each of its queries gets.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) centre_grad_kernel(const CentreGradParams p) {
  __shared__ float4 sums[kThreads];
  __shared__ int counts[kThreads / 32];
  int n = 0;
  for (int x = threadIdx.x; x < p.nq; x += kThreads) n += p.count[blockIdx.x / p.Hk * p.nq + x];
  n = __reduce_add_sync(kFullWarp, n);
  if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = n;
  const Turns<kThreads> own(p.D / 4);
  const auto of_head = [&](const float* from, int parts) {
    return reinterpret_cast<const float4*>(from) + int64_t{blockIdx.x} * parts * own.quads +
           own.quad;
  };
  const float4 *from = of_head(p.sums, p.parts), *of_rows = of_head(p.row_sums, p.row_parts);
  const float4 sum = own.sum(sums, p.parts + p.row_parts, [&](int i) {
    return i < p.parts ? from[int64_t{i} * own.quads] : of_rows[int64_t{i - p.parts} * own.quads];
  });
  __syncthreads();
  if (own.turn != 0) return;
  n = 0;
  for (int w = 0; w < kThreads / 32; ++w) n += counts[w];
  const float over_n = 1.f / static_cast<float>(max(int64_t{1}, int64_t{p.H / p.Hk} * n));
  reinterpret_cast<float4*>(p.centre_grad)[int64_t{blockIdx.x} * own.quads + own.quad] =
      make_float4(sum.x * over_n, sum.y * over_n, sum.z * over_n, sum.w * over_n);
}

}  // namespace

cudaError_t key_weights_backward(const KeyWeightsBackwardParams& p, cudaStream_t stream) {
  return dispatch_rows(p.dtype, p.D, LaunchKeyWeightsBackward{p, stream});
}

cudaError_t centre_grad(const CentreGradParams& p, cudaStream_t stream) {
  return by_length(p.parts + p.row_parts, [&](auto threads) {
    return launch_grid(centre_grad_kernel<threads()>, int64_t{p.B} * p.Hk, threads(), 0, stream, p);
  });
}

}  // namespace mra::cuda
