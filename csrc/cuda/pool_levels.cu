// Sums over blocks on their way between resolutions: means and sums of rows upwards, gradients of
// means downwards. One thread for four columns of a block, children in order.
#include "dtype.cuh"
#include "grid.cuh"
#include "levels.h"

namespace mra::cuda {
namespace {

constexpr int kThreads = 256;

int64_t grid_of(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

__device__ __forceinline__ void add_scaled(float4& sum, float4 x, float factor) {
  sum = make_float4(fmaf(x.x, factor, sum.x), fmaf(x.y, factor, sum.y), fmaf(x.z, factor, sum.z),
                    fmaf(x.w, factor, sum.w));
}

__global__ void __launch_bounds__(kThreads) pool_level_kernel(const PoolLevel p) {
  const int quads = p.D / 4;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, block = i / quads;
  if (block >= int64_t{p.B} * p.heads * p.n) return;
  const int64_t head = block / p.n;
  const int y = static_cast<int>(block - head * p.n), quad = static_cast<int>(i % quads);
  const int64_t b = head / p.heads;
  const int first = y * p.children, last = min(p.n_from, first + p.children);
  const int* count = p.from_count + b * p.from_count_stride;
  int all = 0;
  for (int child = first; child < last; ++child) all += count[child];
  const float n = static_cast<float>(max(all, 1));
  const float4* from =
      reinterpret_cast<const float4*>(p.from) + head * p.from_stride * quads + quad;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
  for (int child = first; child < last; ++child) {
    add_scaled(sum, from[int64_t{child} * quads], static_cast<float>(count[child]) / n);
  }
  reinterpret_cast<float4*>(p.to)[(head * p.to_stride + y) * quads + quad] = sum;
  if (p.to_count != nullptr && quad == 0 && head % p.heads == 0) {
    p.to_count[b * p.to_stride + y] = all;
  }
}

__global__ void __launch_bounds__(kThreads) spread_levels_kernel(const SpreadLevels p) {
  const int quads = p.D / 4;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, block = i / quads;
  if (block >= p.heads * p.n) return;
  const int64_t head = block / p.n, quad = i % quads;
  const int y = static_cast<int>(block - head * p.n);
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int r = 0; r < p.count; ++r) {
    const int64_t at = head * p.stride[r] + (y >> p.shift[r]);
    add_scaled(sum, reinterpret_cast<const float4*>(p.part[r])[at * quads + quad], 1.f);
  }
  reinterpret_cast<float4*>(p.to)[block * quads + quad] = sum;
}

// One warp a block. M of a block without a row that has weight is +inf.
__global__ void __launch_bounds__(kThreads) merge_block_rows_kernel(const MergeBlockRows p) {
  const int lane = threadIdx.x % 32;
  const int64_t block = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (block >= p.heads * p.n) return;
  const int64_t head = block / p.n;
  const int first = static_cast<int>(block - head * p.n) * p.children;
  const int count = min(p.children, p.n_from - first);
  const int64_t from = head * p.n_from + first;
  float lowest = INFINITY;
  for (int i = lane; i < count; i += 32) lowest = fminf(lowest, p.from_lse[from + i]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    lowest = fminf(lowest, __shfl_xor_sync(kFullWarp, lowest, step));
  }
  float delta = 0.f, grad[8] = {};
  for (int i = 0; i < count; ++i) {
    const float lse = p.from_lse[from + i];
    if (lse == INFINITY) continue;  // the same for the whole warp
    const float weight = expf(lowest - lse);
    delta = fmaf(weight, p.from_delta[from + i], delta);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int d = 32 * j + lane;
      if (d < p.D) grad[j] = fmaf(weight, p.from_grad[(from + i) * p.D + d], grad[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (32 * j + lane < p.D) p.grad[block * p.D + 32 * j + lane] = grad[j];
  }
  if (lane == 0) {
    p.lse[block] = lowest;
    p.delta[block] = delta;
  }
}

__global__ void __launch_bounds__(kThreads) split_shares_kernel(const SplitShares p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.heads * p.N) return;
  const int64_t head = i / p.N, row = i - head * p.N;
  const float* parts = p.parts + (head * p.nq + row / p.block_q) * p.count;
  for (int r = 0; r < p.count; ++r) {
    p.shares[(head * p.count + r) * p.N + row] = p.share[i] * parts[r];
  }
}

}  // namespace

cudaError_t pool_level(const PoolLevel& p, cudaStream_t stream) {
  const int64_t threads = int64_t{p.B} * p.heads * p.n * (p.D / 4);
  return launch_grid(pool_level_kernel, grid_of(threads), kThreads, 0, stream, p);
}

cudaError_t spread_levels(const SpreadLevels& p, cudaStream_t stream) {
  return launch_grid(spread_levels_kernel, grid_of(p.heads * p.n * (p.D / 4)), kThreads, 0, stream,
                     p);
}

cudaError_t merge_block_rows(const MergeBlockRows& p, cudaStream_t stream) {
  return launch_grid(merge_block_rows_kernel, grid_of(p.heads * p.n * 32), kThreads, 0, stream, p);
}

cudaError_t split_shares(const SplitShares& p, cudaStream_t stream) {
  return launch_grid(split_shares_kernel, grid_of(p.heads * p.N), kThreads, 0, stream, p);
}

}  // namespace mra::cuda
