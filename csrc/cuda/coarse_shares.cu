// Partial gradients of pooled keys and values -> what each row of their blocks gets.
#include "block_sum.cuh"
#include "coarse_shares.h"

namespace mra::cuda {
namespace {

constexpr int kThreads = 256;

// One thread for four columns of one block; parts are added in order.
__global__ void __launch_bounds__(kThreads) share_sums_kernel(const ShareSumsParams p) {
  const int64_t quads = int64_t{2} * p.B * p.Hk * p.nk * (p.D / 4);
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= quads) return;
  const int64_t blocks = int64_t{p.B} * p.Hk * p.nk;
  if (p.mass_parts != nullptr && i < blocks) {
    float sum = p.mass_parts[i];
    for (int s = 1; s < p.splits; ++s) sum += p.mass_parts[s * blocks + i];
    p.mass_grad[i] = sum;
  }
  const int64_t half = quads / 2, part = half * p.splits;  // keys, then values
  const float4* from = reinterpret_cast<const float4*>(p.sums) + i / half * part + i % half;
  float4 sum = from[0];
  for (int s = 1; s < p.splits; ++s) {
    const float4 x = from[s * half];
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  const int64_t block = i % half / (p.D / 4);
  const int count = p.count == nullptr ? 1 : p.count[block / p.nk / p.Hk * p.nk + block % p.nk];
  const float n = static_cast<float>(count > 1 ? count : 1);
  reinterpret_cast<float4*>(p.shares)[i] = make_float4(sum.x / n, sum.y / n, sum.z / n, sum.w / n);
}

// One thread for 16 bytes of one key and of its value; heads side by side, as the gradients lie.
template <typename T>
__global__ void __launch_bounds__(kThreads) spread_shares_kernel(const SpreadSharesParams p) {
  const int chunks = p.D / kVec<T>;
  int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= int64_t{p.B} * p.M * p.Hk * chunks) return;
  const int d = static_cast<int>(i % chunks) * kVec<T>;
  const int hk = static_cast<int>((i /= chunks) % p.Hk);
  const int j = static_cast<int>((i /= p.Hk) % p.M), b = static_cast<int>(i / p.M);
  const int64_t block = (int64_t{b} * p.Hk + hk) * p.nk + j / p.block_k;
  const float weight = p.weights[block * p.block_k + j % p.block_k];
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const float* from = p.shares + (int64_t{which} * p.B * p.Hk * p.nk + block) * p.D + d;
    float x[kVec<T>];
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) x[e] = weight == 0.f ? 0.f : weight * from[e];
    const Strides& s = p.strides[which];
    store_values<kVec<T>>(static_cast<T*>(p.grad[which]) + b * s.b + hk * s.h + j * s.l + d, x);
  }
}

}  // namespace

cudaError_t share_sums(const ShareSumsParams& p, cudaStream_t stream) {
  const int64_t quads = int64_t{2} * p.B * p.Hk * p.nk * (p.D / 4);
  return launch_grid(share_sums_kernel, (quads + kThreads - 1) / kThreads, kThreads, 0, stream, p);
}

cudaError_t spread_shares(const SpreadSharesParams& p, cudaStream_t stream) {
  const auto launch = [&](auto t) {
    using T = decltype(t);
    const int64_t chunks = int64_t{p.B} * p.M * p.Hk * (p.D / kVec<T>);
    return launch_grid(spread_shares_kernel<T>, (chunks + kThreads - 1) / kThreads, kThreads, 0,
                       stream, p);
  };
  if (p.dtype == Dtype::f32) return launch(float{});
  return p.dtype == Dtype::f16 ? launch(__half{}) : launch(__nv_bfloat16{});
}

}  // namespace mra::cuda
