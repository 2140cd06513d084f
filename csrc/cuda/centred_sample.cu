// Which queries the weights of pool = sampled are made of.
#include "centred.h"
#include "grid.cuh"

namespace mra::cuda {
namespace {

constexpr int kThreads = 1024;

// One block of threads for one batch entry; a thread has a run of its queries.
__global__ void __launch_bounds__(kThreads) sample_kernel(const SampleParams p) {
  __shared__ int counts[kThreads / 32];
  const int b = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool* mask = p.mask == nullptr ? nullptr : p.mask + int64_t{b} * p.N;
  const int run = (p.N + kThreads - 1) / kThreads;
  const int begin = min(p.N, static_cast<int>(threadIdx.x) * run), end = min(p.N, begin + run);
  int own = 0;
  for (int i = begin; i < end; ++i) own += mask == nullptr || mask[i];

  int upto = own;  // valid queries up to the end of this run
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kFullWarp, upto, step);
    if (lane >= step) upto += before;
  }
  if (lane == 31) counts[warp] = upto;
  __syncthreads();
  int n = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) upto += counts[w];
    n += counts[w];
  }
  if (threadIdx.x == 0) p.valid[b] = n;

  const int64_t all = int64_t{p.group} * n;
  const int r = static_cast<int>(min(all, int64_t{kSampledQueries}));
  int64_t* places = p.places + b * kSampledQueries;
  if (threadIdx.x >= r && threadIdx.x < kSampledQueries) places[threadIdx.x] = -1;
  for (int t = 0; t < r; ++t) {
    const int64_t rank = all > r ? (2 * t + 1) * all / (2 * r) : t;
    int left = static_cast<int>(rank % n) - (upto - own);  // valid queries of this run before it
    if (left < 0 || left >= own) continue;
    int i = begin;
    for (; left > 0 || !(mask == nullptr || mask[i]); ++i) left -= mask == nullptr || mask[i];
    places[t] = rank / n * p.N + i;
  }
}

}  // namespace

cudaError_t sample_queries(const SampleParams& p, cudaStream_t stream) {
  return launch_grid(sample_kernel, p.B, kThreads, 0, stream, p);
}

}  // namespace mra::cuda
