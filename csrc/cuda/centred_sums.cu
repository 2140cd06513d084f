// Order 1 with weighted means, what is not products of rows with matrices: the weights of each row
// in the gradients of the moments, sums of rows with these weights, and products of such sums and
// of the centre with the matrices.
#include "block_sum.cuh"
#include "centred.cuh"
#include "centred.h"

namespace mra::cuda {
namespace {

constexpr int kWarps = 4;

// A warp for a part of a head's rows.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kWarps * 32) row_weights_kernel(const RowWeightsParams p) {
  const int64_t unit = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (unit >= int64_t{p.B} * p.H * p.parts) return;  // whole warps leave
  const int lane = threadIdx.x % 32;
  const int part = static_cast<int>(unit % p.parts), head = static_cast<int>(unit / p.parts);
  const int b = head / p.H, h = head - b * p.H, first = part * p.part_rows;
  const int64_t row = int64_t{head} * p.N + first + lane;

  float of_grad[kBlockWords], of_q[kBlockWords], sum_b = 0.f;
  uint32_t grads[kBlockWords], queries[kBlockWords];
#pragma unroll
  for (int g = 0; g < kBlockWords; ++g) {
    float a = 0.f, c = 0.f;
    if (32 * g + lane < p.part_rows && first + 32 * g + lane < p.N) {
      const int64_t i = row + 32 * g;
      const float share = p.share[i];
      if (share != 0.f) {
        const float t = p.variance[i], gamma = 1.f / (1.f + t / 4);
        a = share * gamma * p.scale;
        c = share * p.slope[i] * gamma * -0.25f +
            (0.75f / (1.f + 0.75f * t) - gamma / 4) * p.coarse_sum[i];
        c *= p.scale * p.scale;
      }
      p.a[i] = a;
      p.b[i] = c;
    }
    of_grad[g] = a, of_q[g] = c;
    grads[g] = __ballot_sync(kFullWarp, a != 0.f);
    queries[g] = __ballot_sync(kFullWarp, c != 0.f);
    sum_b += c;
  }
  if (p.sums == nullptr) return;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum_b += __shfl_xor_sync(kFullWarp, sum_b, step);

  const T* grad_out = static_cast<const T*>(p.grad_out) + b * p.grad_out_strides.b +
                      h * p.grad_out_strides.h + int64_t{first} * p.grad_out_strides.l;
  const T* q = static_cast<const T*>(p.q) + b * p.q_strides.b + h * p.q_strides.h +
               int64_t{first} * p.q_strides.l;
  const float* centre = nullptr;
  if (p.centre != nullptr) centre = p.centre + (int64_t{b} * p.Hk + h / (p.H / p.Hk)) * p.D;
  float* to = p.sums + unit * 2 * p.D;
  const int chunks = p.D / kVec<T>;
  for (int c = 0; c < chunks; c += kLanes) {
    const int chunk = c + lane % kLanes;
    float x[kVec<T>], y[kVec<T>];
    block_sum<T, kLanes>(
        grad_out, p.grad_out_strides.l, grads, chunk, chunks,
        [&](int g, int r) { return __shfl_sync(kFullWarp, of_grad[g], r); }, x);
    block_sum<T, kLanes>(
        q, p.q_strides.l, queries, chunk, chunks,
        [&](int g, int r) { return __shfl_sync(kFullWarp, of_q[g], r); }, y);
    if (lane >= kLanes || chunk >= chunks) continue;
    if (centre != nullptr) {
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) y[e] -= sum_b * centre[chunk * kVec<T> + e];
    }
    store_values<kVec<T>>(to + chunk * kVec<T>, x);
    store_values<kVec<T>>(to + p.D + chunk * kVec<T>, y);
  }
}

struct LaunchRowWeights {
  const RowWeightsParams& p;
  cudaStream_t stream;

  template <typename T, int kLanes>
  cudaError_t operator()() const {
    const int64_t warps = int64_t{p.B} * p.H * p.parts;
    return launch_grid(row_weights_kernel<T, kLanes>, (warps + kWarps - 1) / kWarps, kWarps * 32, 0,
                       stream, p);
  }
};

constexpr int kMaxDim = 256;

// One block of threads for one key head: the centre times C and times Sigma. A thread has 16 bytes
// of columns of a matrix, rows in turns.
template <typename S, int kThreads>
__global__ void __launch_bounds__(kThreads) centre_term_kernel(const CentreProductsParams p) {
  let_next_start();
  constexpr int kCount = kVec<S>;
  __shared__ float centre[kMaxDim], sums[kThreads * kCount];
  const S* matrices = static_cast<const S*>(p.matrices) + int64_t{blockIdx.x} * 2 * p.dim * p.dim;
  for (int d = threadIdx.x; d < p.dim; d += kThreads) {
    centre[d] = d < p.D ? p.centre[int64_t{blockIdx.x} * p.D + d] : 0.f;
  }
  __syncthreads();
  const int width = 2 * p.dim / kCount, at = threadIdx.x % width * kCount;  // of both matrices
  const int turn = threadIdx.x / width, turns = kThreads / width;
  const S* from = matrices + at / p.dim * p.dim * p.dim + at % p.dim;
  float sum[kCount] = {};
#pragma unroll 8
  for (int e = turn; e < p.dim; e += turns) {
    float x[kCount];
    unpack16<S>(load16(from + e * p.dim), x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = fmaf(centre[e], x[i], sum[i]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[turn * 2 * p.dim + at + i] = sum[i];
  __syncthreads();
  for (int d = threadIdx.x; d < 2 * p.dim; d += kThreads) {
    float total = 0.f;
    for (int i = 0; i < turns; ++i) total += sums[i * 2 * p.dim + d];
    p.result[int64_t{blockIdx.x} * 2 * p.dim + d] = total;
  }
  if (blockIdx.x == 0) wait_for_previous();
}

// One block of threads for one key head: parts' sums to their totals, and these times the matrices.
template <typename S, int kThreads>
__global__ void __launch_bounds__(kThreads) shift_kernel(const CentreProductsParams p) {
  __shared__ float4 sums[kThreads];
  __shared__ int counts[kThreads / 32];
  const int b = blockIdx.x / p.Hk, hk = blockIdx.x % p.Hk, group = p.H / p.Hk;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  int n = 0;
  for (int x = threadIdx.x; x < p.nq; x += kThreads) n += p.count[int64_t{b} * p.nq + x];
  n = __reduce_add_sync(kFullWarp, n);
  if (lane == 0) counts[warp] = n;

  const Turns<kThreads> own(2 * p.D / 4);
  const float4* from = reinterpret_cast<const float4*>(p.sums) +
                       (int64_t{b} * p.H + hk * group) * p.parts * own.quads + own.quad;
  own.sum(sums, group * p.parts, [&](int i) { return from[int64_t{i} * own.quads]; });
  __syncthreads();
  n = 0;
  for (int w = 0; w < kThreads / 32; ++w) n += counts[w];
  const float over_n = -1.f / static_cast<float>(max(int64_t{1}, int64_t{group} * n));

  // A warp for each column of the results: rows of C, and of Sigma, which is symmetric.
  const float *x = reinterpret_cast<const float*>(sums), *y = x + p.D;
  const S* C = static_cast<const S*>(p.matrices) + int64_t{blockIdx.x} * 2 * p.dim * p.dim;
  const S* sigma = C + p.dim * p.dim;
  float* to = p.result + int64_t{blockIdx.x} * p.dim;
  for (int d = warp; d < p.dim; d += kThreads / 32) {
    float every = 0.f;
    for (int e = lane; e < p.D; e += 32) {
      every += x[e] * to_float(C[d * p.dim + e]) + 2 * y[e] * to_float(sigma[d * p.dim + e]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) every += __shfl_xor_sync(kFullWarp, every, step);
    if (lane == 0) to[d] = every * over_n;
  }
}

constexpr int kProductWarps = 8;

// A block of threads for a block of queries of a key head, a warp for each column of the result.
template <typename S>
__global__ void __launch_bounds__(kProductWarps * 32)
    causal_products_kernel(const CausalProductsParams p) {
  __shared__ float sums[2 * kMaxDim];
  const int x = blockIdx.x % p.nq, head = blockIdx.x / p.nq, group = p.H / p.Hk;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* from =
      p.sums + ((int64_t{head / p.Hk} * p.H + head % p.Hk * group) * p.nq + x) * 2 * p.D;
  for (int d = threadIdx.x; d < 2 * p.D; d += kProductWarps * 32) {
    float sum = 0.f;
    for (int h = 0; h < group; ++h) sum += from[int64_t{h} * p.nq * 2 * p.D + d];
    sums[d] = sum;
  }
  __syncthreads();
  const int64_t unit = int64_t{head} * p.units + (x >> p.log2_unit_blocks);
  const S* C = static_cast<const S*>(p.matrices) + unit * 2 * p.dim * p.dim;
  const S* sigma = C + p.dim * p.dim;
  for (int d = warp; d < p.D; d += kProductWarps) {
    float sum = 0.f;
    for (int e = lane; e < p.D; e += 32) {
      sum +=
          sums[e] * to_float(C[d * p.dim + e]) + 2 * sums[p.D + e] * to_float(sigma[d * p.dim + e]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
    if (lane == 0) p.result[int64_t{blockIdx.x} * p.D + d] = -sum;
  }
}

}  // namespace

cudaError_t causal_products(const CausalProductsParams& p, cudaStream_t stream) {
  const auto launch = [&](auto s) {
    return launch_grid(causal_products_kernel<decltype(s)>, int64_t{p.B} * p.Hk * p.nq,
                       kProductWarps * 32, 0, stream, p);
  };
  if (p.dtype == Dtype::f32) return launch(float{});
  return p.dtype == Dtype::f16 ? launch(__half{}) : launch(__nv_bfloat16{});
}

cudaError_t row_weights(const RowWeightsParams& p, cudaStream_t stream) {
  return dispatch_rows(p.dtype, p.D, LaunchRowWeights{p, stream});
}

cudaError_t centre_products(const CentreProductsParams& p, cudaStream_t stream) {
  const auto launch = [&](auto s) {
    using S = decltype(s);
    const int64_t items = p.sums == nullptr ? p.nq : int64_t{p.H / p.Hk} * p.parts;
    return by_length(items, [&](auto threads) {
      if (p.sums == nullptr && 2 * p.dim > threads()) return cudaErrorInvalidValue;
      const auto kernel =
          p.sums == nullptr ? centre_term_kernel<S, threads()> : shift_kernel<S, threads()>;
      return launch_grid(kernel, int64_t{p.B} * p.Hk, threads(), 0, stream, Together{p.beside}, p);
    });
  };
  if (p.dtype == Dtype::f32) return launch(float{});
  return p.dtype == Dtype::f16 ? launch(__half{}) : launch(__nv_bfloat16{});
}

}  // namespace mra::cuda
