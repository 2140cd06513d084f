// Partial gradients of pooled keys and values -> what each row of their blocks gets.
#include "coarse_shares.h"
#include "grid.cuh"

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

}  // namespace

cudaError_t share_sums(const ShareSumsParams& p, cudaStream_t stream) {
  const int64_t quads = int64_t{2} * p.B * p.Hk * p.nk * (p.D / 4);
  return launch_grid(share_sums_kernel, (quads + kThreads - 1) / kThreads, kThreads, 0, stream, p);
}

}  // namespace mra::cuda
