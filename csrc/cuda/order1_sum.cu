// Partial sums of order1_gram.cu -> the matrices of each unit, in a fixed order of additions.
#include "order1.cuh"

namespace mra::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 8;  // loads in flight

template <typename S>
__device__ __forceinline__ void store4(S* to, float4 v, float factor) {
  store_pair(to, v.x * factor, v.y * factor);
  store_pair(to + 2, v.z * factor, v.w * factor);
}

__device__ __forceinline__ void add(float4& sum, const float4& v, float factor = 1.f) {
  sum.x += v.x * factor, sum.y += v.y * factor, sum.z += v.z * factor, sum.w += v.w * factor;
}

// One unit a head: `lanes` threads share the chunks of one float4, lane l sums chunks l, l + lanes,
// ...; then the lanes are summed in order.
template <typename S>
__global__ void __launch_bounds__(kThreads) total_kernel(const Order1Sum p, int lanes) {
  let_next_start();
  __shared__ float4 partial[kThreads];
  __shared__ int scratch[32];
  const int64_t pair = int64_t{2} * p.dim * p.dim;  // a multiple of 4 kThreads
  const int width = kThreads / lanes, columns = static_cast<int>(pair / (4 * width));
  const int head = blockIdx.x / columns, lane = threadIdx.x / width;
  const int64_t at = (int64_t{blockIdx.x % columns} * width + threadIdx.x % width) * 4;

  const float* from = p.sums + int64_t{head} * p.chunks * pair + at;
  float4 sum{};
#pragma unroll kBatch
  for (int c = lane; c < p.chunks; c += lanes) {
    add(sum, __ldg(reinterpret_cast<const float4*>(from + c * pair)));
  }
  const int n = sum_counts(p.key_count + int64_t{head / p.heads} * p.nk, p.nk, scratch);
  if (lanes > 1) {
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (lane != 0) return;
    for (int l = 1; l < lanes; ++l) add(sum, partial[l * width + threadIdx.x]);
  }
  const float factor = at < pair / 2 ? 1.f : p.factor;
  store4(static_cast<S*>(p.matrices) + head * pair + at, sum, factor / max(n, 1));
}

// Causal: a thread walks the units of its float4, forwards or backwards.
template <typename S>
__global__ void __launch_bounds__(128) scan_kernel(const Order1Sum p) {
  __shared__ int scratch[32];
  const int64_t pair = int64_t{2} * p.dim * p.dim;  // a multiple of 4 blockDim
  const int columns = static_cast<int>(pair / (4 * blockDim.x));
  const int head = blockIdx.x / columns;
  const int64_t at = (int64_t{blockIdx.x % columns} * blockDim.x + threadIdx.x) * 4;
  const int* counts = p.key_count + int64_t{head / p.heads} * p.nk;
  const float factor = at < pair / 2 ? 1.f : p.factor;
  const float* from = p.sums + int64_t{head} * p.units * pair + at;
  S* to = static_cast<S*>(p.matrices) + int64_t{head} * p.units * pair + at;
  const auto keys_of = [&](int unit) {
    int n = 0;
    const int end = min(p.nk, (unit + 1) * p.unit_blocks);
    for (int y = unit * p.unit_blocks; y < end; ++y) n += counts[y];
    return n;
  };

  // n: valid keys before the unit.
  int n = p.backward ? sum_counts(counts, p.nk, scratch) : 0;
  float4 sum{};
  for (int first = 0; first < p.units; first += kBatch) {
    float4 v[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int unit = p.backward ? p.units - 1 - first - i : first + i;
      if (first + i < p.units) v[i] = __ldg(reinterpret_cast<const float4*>(from + unit * pair));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= p.units) break;
      const int unit = p.backward ? p.units - 1 - first - i : first + i;
      if (p.backward) {
        n -= keys_of(unit);
        store4(to + unit * pair, sum, factor);
        add(sum, v[i], 1.f / max(n, 1));
      } else {
        store4(to + unit * pair, sum, factor / max(n, 1));
        add(sum, v[i]);
        n += keys_of(unit);
      }
    }
  }
}

// A thread walks the chunks of its float4, forwards or backwards.
__global__ void __launch_bounds__(128) others_kernel(const Order1Sum p) {
  let_next_start();
  const int64_t pair = int64_t{2} * p.dim * p.dim;  // a multiple of 4 blockDim
  const int columns = static_cast<int>(pair / (4 * blockDim.x));
  const int head = blockIdx.x / columns;
  const int64_t at = (int64_t{blockIdx.x % columns} * blockDim.x + threadIdx.x) * 4;
  float* const sums = p.sums + int64_t{head} * p.chunks * pair + at;
  const auto place = [&](int i) {
    return reinterpret_cast<float4*>(sums + (p.backward ? p.chunks - 1 - i : i) * pair);
  };
  float4 sum{};
  for (int first = 0; first < p.chunks; first += kBatch) {
    float4 v[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      v[i] = first + i < p.chunks ? *place(first + i) : float4{};
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < p.chunks) *place(first + i) = sum;
      add(sum, v[i]);
    }
  }
}

// A block of threads a matrix.
__global__ void __launch_bounds__(kThreads)
    round_kernel(const float* matrices, __half* rounded, float* scales, int dim) {
  __shared__ uint32_t highest[kThreads / 32];
  const int values = dim * dim;
  const float* const from = matrices + int64_t{blockIdx.x} * values;
  uint32_t most = 0;
  for (int i = 4 * threadIdx.x; i < values; i += 4 * kThreads) {
    const uint4 x = load16(from + i);
    most = max(max(most, x.x & 0x7fffffff), max(x.y & 0x7fffffff, x.z & 0x7fffffff));
    most = max(most, x.w & 0x7fffffff);
  }
  most = __reduce_max_sync(kFullWarp, most);
  if (threadIdx.x % 32 == 0) highest[threadIdx.x / 32] = most;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) most = max(most, highest[w]);
  // The largest value is less than 2^(bits - 126).
  const int bits = static_cast<int>(most >> 23);
  const int power = most == 0 || bits == 255 ? 0 : min(14 - (bits - 126), 126);
  const float scale = __uint_as_float((127 + power) << 23);
  if (threadIdx.x == 0) scales[blockIdx.x] = __uint_as_float((127 - power) << 23);
  __half* const to = rounded + int64_t{blockIdx.x} * values;
  for (int i = 4 * threadIdx.x; i < values; i += 4 * kThreads) {
    const float4 x = *reinterpret_cast<const float4*>(from + i);
    store4(to + i, x, scale);
  }
}

template <typename S>
cudaError_t launch_sum(const Order1Sum& p, cudaStream_t stream) {
  const int64_t pair = int64_t{2} * p.dim * p.dim;
  int lanes = 1;
  while (lanes < 8 && lanes * 4 <= p.chunks) lanes *= 2;
  const int columns = p.causal ? 4 * 128 : 4 * kThreads / lanes;
  const int64_t blocks = pair / columns * p.B * p.heads;
  return p.causal ? launch_grid(scan_kernel<S>, blocks, 128, 0, stream, p)
                  : launch_grid(total_kernel<S>, blocks, kThreads, 0, stream, p, lanes);
}

}  // namespace

cudaError_t order1_sum(const Order1Sum& p, cudaStream_t stream) {
  return p.dtype == Dtype::bf16 ? launch_sum<__nv_bfloat16>(p, stream)
                                : launch_sum<float>(p, stream);
}

cudaError_t order1_round(const float* matrices, void* rounded, float* scales, int64_t count,
                         int dim, cudaStream_t stream) {
  return launch_grid(round_kernel, count, kThreads, 0, stream, matrices,
                     static_cast<__half*>(rounded), scales, dim);
}

cudaError_t order1_sum_others(float* sums, int64_t heads, int chunks, int dim, bool behind,
                              cudaStream_t stream) {
  Order1Sum p{};
  p.sums = sums;
  p.chunks = chunks;
  p.dim = dim;
  p.backward = behind;
  const int64_t blocks = int64_t{2} * dim * dim / (4 * 128) * heads;
  return launch_grid(others_kernel, blocks, 128, 0, stream, p);
}

}  // namespace mra::cuda
