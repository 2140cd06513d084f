// The mean query of each key head, and which queries the weights of pool = sampled are made of.
#include "block_sum.cuh"
#include "centred.cuh"
#include "centred.h"

namespace mra::cuda {
namespace {

// The valid queries of one batch entry, counted by blocks: a thread has a run of them.
template <int kThreads>
struct Ranks {
  int before[kThreads];  // valid queries before each run
  int totals[kThreads / 32];

  // Returns how many there are. The whole block of threads calls this.
  __device__ __forceinline__ int count(const int* counts, int nq, int run) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int begin = min(nq, static_cast<int>(threadIdx.x) * run), end = min(nq, begin + run);
    int own = 0;
    for (int x = begin; x < end; ++x) own += counts[x];
    int upto = sum_up_to_lane(own, lane);
    if (lane == 31) totals[warp] = upto;
    __syncthreads();
    int n = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) upto += totals[w];
      n += totals[w];
    }
    before[threadIdx.x] = upto - own;
    __syncthreads();
    return n;
  }

  // The valid query with `left` valid ones before it.
  __device__ __forceinline__ int find(int left, const int* counts, int run, int log2_block,
                                      const uint8_t* mask) const {
    int low = 0, high = kThreads - 1;  // the last run that starts with no more before it
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (before[middle] <= left) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    left -= before[low];
    int x = low * run;
    while (left >= counts[x]) left -= counts[x++];
    int i = x << log2_block;
    if (mask == nullptr) return i + left;
    for (;; ++i) {
      if (mask[i] && left-- == 0) return i;
    }
  }
};

// One block of threads for one key head.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) sample_kernel(const SampleParams p) {
  __shared__ Ranks<kThreads> ranks;
  __shared__ float4 sums[kThreads];
  __shared__ int places[kSampledQueries][2];  // head of the group and row; row -1: none
  const int b = blockIdx.x / p.Hk, hk = blockIdx.x % p.Hk, group = p.H / p.Hk;
  const int* counts = p.count + int64_t{b} * p.nq;
  const int run = (p.nq + kThreads - 1) / kThreads;
  const int n = ranks.count(counts, p.nq, run);
  const int64_t all = int64_t{group} * n;
  const int r = static_cast<int>(min(all, int64_t{kSampledQueries}));

  const Turns<kThreads> own(p.D / 4);
  const float4* mean = reinterpret_cast<const float4*>(p.mean) +
                       (int64_t{b} * p.H + hk * group) * p.nq * own.quads + own.quad;
  float4 sum = own.sum(sums, group * p.nq, [&](int x) {
    const float4 u = mean[int64_t{x} * own.quads];
    const float c = static_cast<float>(counts[x % p.nq]);
    return make_float4(c * u.x, c * u.y, c * u.z, c * u.w);
  });
  if (own.turn == 0) {
    const float over_n = 1.f / static_cast<float>(max(all, int64_t{1}));
    sum = make_float4(sum.x * over_n, sum.y * over_n, sum.z * over_n, sum.w * over_n);
    sums[own.quad] = sum;
    reinterpret_cast<float4*>(p.centre)[int64_t{blockIdx.x} * own.quads + own.quad] = sum;
  }

  const int t = threadIdx.x;
  if (t < kSampledQueries) {
    places[t][1] = -1;
    if (t < r) {
      const int64_t rank = all > r ? (2 * t + 1) * all / (2 * r) : t;
      const uint8_t* mask = p.mask == nullptr ? nullptr : p.mask + int64_t{b} * p.N;
      places[t][0] = static_cast<int>(rank / n);
      places[t][1] = ranks.find(static_cast<int>(rank % n), counts, run, p.log2_block_q, mask);
    }
  }
  if (t < kSampleRows) {
    // The mean a quarter of what the others weigh together.
    const float offset = t == 0              ? -log2f(static_cast<float>(max(r, 1)) / 4)
                         : t < kMeanRows + r ? 0.f
                                             : INFINITY;
    p.offsets[int64_t{blockIdx.x} * kSampleRows + t] = offset;
  }
  __syncthreads();

  const int pieces = p.D / kVec<T>;
  const float* centre = reinterpret_cast<const float*>(sums);
  for (int e = t; e < kSampleRows * pieces; e += kThreads) {
    const int row = e / pieces, d = e % pieces * kVec<T>;
    T* to = static_cast<T*>(p.rows) + (int64_t{blockIdx.x} * kSampleRows + row) * p.D + d;
    if (row >= kMeanRows) {
      const int(&place)[2] = places[row - kMeanRows];
      uint4 bits{};
      if (place[1] >= 0) {
        bits = load16(static_cast<const T*>(p.q) + b * p.q_strides.b +
                      (hk * group + place[0]) * p.q_strides.h + place[1] * p.q_strides.l + d);
      }
      *reinterpret_cast<uint4*>(to) = bits;
      continue;
    }
    float x[kVec<T>];
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      const float high = to_float(from_float<T>(centre[d + i]));
      x[i] = row == 0 ? high : centre[d + i] - high;
    }
    store_values<kVec<T>>(to, x);
  }
}

}  // namespace

cudaError_t sample_queries(const SampleParams& p, cudaStream_t stream) {
  const auto launch = [&](auto t) {
    return by_length(int64_t{p.H / p.Hk} * p.nq, [&](auto threads) {
      const auto kernel = sample_kernel<decltype(t), threads()>;
      return launch_grid(kernel, int64_t{p.B} * p.Hk, threads(), 0, stream, p);
    });
  };
  if (p.dtype == Dtype::f32) return launch(float{});
  return p.dtype == Dtype::f16 ? launch(__half{}) : launch(__nv_bfloat16{});
}

}  // namespace mra::cuda
