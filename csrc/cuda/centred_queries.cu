// Centres of queries under causal, one before each block of them; the way back, from the gradients
// of the centres to what the queries of each block get; and a vector of its block, or of all, added
// to each query.
#include "block_sum.cuh"
#include "centred.cuh"
#include "centred.h"

namespace mra::cuda {
namespace {

// A block of threads has 32 columns of a key head: eight threads for each of kRuns runs of blocks.
constexpr int kQuads = 8, kRuns = 128;

__device__ __forceinline__ void add(float4& sum, const float4& x, float factor = 1.f) {
  sum.x = fmaf(factor, x.x, sum.x), sum.y = fmaf(factor, x.y, sum.y);
  sum.z = fmaf(factor, x.z, sum.z), sum.w = fmaf(factor, x.w, sum.w);
}
__device__ __forceinline__ void add(int& sum, int x) { sum += x; }

int parts_of_columns(int D) { return (D / 4 + kQuads - 1) / kQuads; }

struct Run {
  int head, run, quad, begin, end;  // of blocks of queries
  bool there;                       // the columns

  __device__ __forceinline__ Run(int nq, int D, int parts)
      : head(blockIdx.x / parts),
        run(threadIdx.x / kQuads),
        quad(blockIdx.x % parts * kQuads + threadIdx.x % kQuads) {
    const int each = (nq + kRuns - 1) / kRuns;
    begin = min(nq, run * each), end = min(nq, begin + each);
    there = quad < D / 4;
  }

  // Of what each run has, the sum over the runs before this one or, kBehind, behind it. By all
  // threads; the columns of a thread lie kEach apart in `room`.
  template <bool kBehind, int kEach, class X>
  __device__ __forceinline__ X of_others(X (&room)[kRuns * kEach], const X& own) const {
    const int place = kBehind ? kRuns - 1 - run : run, column = threadIdx.x % kEach;
    X upto = own;
#pragma unroll 1
    for (int step = 1; step < kRuns; step *= 2) {
      room[place * kEach + column] = upto;
      __syncthreads();
      if (place >= step) add(upto, room[(place - step) * kEach + column]);
      __syncthreads();
    }
    room[place * kEach + column] = upto;
    __syncthreads();
    return place > 0 ? room[(place - 1) * kEach + column] : X{};
  }
  // Valid queries before `begin`, over all heads of a group alike.
  __device__ __forceinline__ int count_before(int (&room)[kRuns], const int* count) const {
    int own = 0;
    for (int x = begin; x < end; ++x) own += count[x];
    return of_others<false, 1>(room, own);
  }
};

__global__ void __launch_bounds__(kQuads* kRuns)
    causal_centres_kernel(const CausalCentresParams p, int parts) {
  __shared__ float4 sums[kRuns * kQuads];
  __shared__ int counts[kRuns];
  const Run own(p.nq, p.D, parts);
  const int b = own.head / p.Hk, hk = own.head % p.Hk, group = p.H / p.Hk;
  const int* count = p.count + int64_t{b} * p.nq;
  const int64_t quads = p.D / 4;
  const float4* mean = reinterpret_cast<const float4*>(p.mean) +
                       (int64_t{b} * p.H + hk * group) * p.nq * quads + own.quad;
  const auto add_block = [&](float4& sum, int x) {
    const float c = static_cast<float>(count[x]);
    for (int h = 0; h < group; ++h) add(sum, mean[(int64_t{h} * p.nq + x) * quads], c);
  };
  int n = own.count_before(counts, count);
  float4 sum{};
  if (own.there) {
#pragma unroll 4
    for (int x = own.begin; x < own.end; ++x) add_block(sum, x);
  }
  sum = own.of_others<false, kQuads>(sums, sum);
  if (!own.there) return;
  float4* to =
      reinterpret_cast<float4*>(p.centre) + int64_t{own.head} * (p.nq + 1) * quads + own.quad;
  const auto place = [&](int x) {
    const float over_n = 1.f / static_cast<float>(max(int64_t{1}, int64_t{group} * n));
    to[x * quads] = make_float4(sum.x * over_n, sum.y * over_n, sum.z * over_n, sum.w * over_n);
  };
#pragma unroll 4
  for (int x = own.begin; x < own.end; ++x) {
    place(x);
    add_block(sum, x);
    n += count[x];
  }
  if (own.begin < own.end && own.end == p.nq) place(p.nq);
}

__global__ void __launch_bounds__(kQuads* kRuns)
    causal_centre_grad_kernel(const CausalCentreGradParams p, int parts) {
  __shared__ float4 sums[kRuns * kQuads];
  __shared__ int counts[kRuns];
  const int nq = p.centres.nq;
  const Run own(nq, p.D, parts);
  const int b = own.head / p.Hk, group = p.H / p.Hk;
  const int* count = p.count + int64_t{b} * nq;
  const int64_t quads = p.D / 4;
  const auto columns = [&](const float* from, int n) {
    return reinterpret_cast<const float4*>(from) + int64_t{own.head} * n * quads + own.quad;
  };
  const float4* of_rows = columns(p.of_rows, p.row_heads * p.row_parts);
  const float4* of_keys = columns(p.of_keys, p.key_parts);
  // The gradient of centre x, over the number n of queries before it.
  const auto add_centre = [&](float4& sum, int x, int n) {
    const float over_n = 1.f / static_cast<float>(max(int64_t{1}, int64_t{group} * n));
    if (p.of_rows != nullptr && x < nq) {
      const int first = x << p.log2_row_parts;
      const int end = min(p.row_parts, first + (1 << p.log2_row_parts));
      for (int h = 0; h < p.row_heads; ++h) {
        const float4* part = of_rows + int64_t{h} * p.row_parts * quads;
#pragma unroll 4
        for (int i = first; i < end; ++i) add(sum, part[i * quads], over_n);
      }
    }
    const auto first_behind = [&](int x) {  // of the parts of keys that centre x has not
      const int64_t end = int64_t{x} << p.centres.log2_block_q >> p.centres.log2_block_k;
      const int y = x == nq ? p.nk : static_cast<int>(min(end, int64_t{p.nk}));
      return y << p.log2_key_parts;
    };
    const int end = first_behind(x);
#pragma unroll 4
    for (int i = first_behind(x - 1); i < end; ++i) add(sum, of_keys[i * quads], over_n);
  };
  int n = own.count_before(counts, count);
  float4 sum{};
  if (own.there) {
    for (int x = own.begin; x < own.end; ++x) {
      n += count[x];
      add_centre(sum, x + 1, n);
    }
  }
  sum = own.of_others<true, kQuads>(sums, sum);
  if (!own.there) return;
  float4* to = reinterpret_cast<float4*>(p.centre_grad) + int64_t{own.head} * nq * quads + own.quad;
  for (int x = own.end - 1; x >= own.begin; --x) {
    add_centre(sum, x + 1, n);
    to[x * quads] = sum;
    n -= count[x];
  }
}

constexpr int kShiftThreads = 256, kShiftRows = 32;  // rows of a tile, which lie in one block

// A thread has 16 bytes of a head in rows of a tile, heads side by side, as the results lie: in all
// of them, or where heads are few, threads share the rows.
template <typename T>
__global__ void __launch_bounds__(kShiftThreads)
    shift_queries_kernel(const ShiftQueriesParams p, int tiles, int parts) {
  const int chunks = p.D / kVec<T>, pieces = p.H * chunks;
  const int width = min(pieces, kShiftThreads), turns = min(kShiftThreads / width, kShiftRows);
  const int part = blockIdx.x % parts, tile = blockIdx.x / parts % tiles;
  const int b = blockIdx.x / parts / tiles, turn = threadIdx.x / width;
  const int piece = part * width + threadIdx.x % width;
  if (turn >= turns || piece >= pieces) return;
  const int h = piece / chunks, d = piece % chunks * kVec<T>, first = tile * kShiftRows;
  const int64_t head = int64_t{b} * p.Hk + h / (p.H / p.Hk);
  const int block = p.shifts == 1 ? 0 : first >> p.log2_block_q;
  const float4* by = reinterpret_cast<const float4*>(p.shift + (head * p.shifts + block) * p.D + d);
  float shift[kVec<T>];
#pragma unroll
  for (int e = 0; e < kVec<T>; e += 4) {
    const float4 u = by[e / 4];
    shift[e] = p.sign * u.x, shift[e + 1] = p.sign * u.y;
    shift[e + 2] = p.sign * u.z, shift[e + 3] = p.sign * u.w;
  }
  const auto at = [&](const Strides& s) { return b * s.b + h * s.h + first * s.l + d; };
  const T* const from = static_cast<const T*>(p.from) + at(p.from_strides);
  T* const to = static_cast<T*>(p.to) + at(p.to_strides);
  const uint8_t* const mask = p.mask == nullptr ? nullptr : p.mask + int64_t{b} * p.N + first;
  const int rows = min(kShiftRows, p.N - first);
#pragma unroll 8
  for (int row = turn; row < rows; row += turns) {
    const bool counts = mask == nullptr || mask[row];
    if (!counts && p.to == p.from) continue;
    float x[kVec<T>] = {};
    if (counts) {
      unpack16<T>(load16(from + row * p.from_strides.l), x);
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) x[e] += shift[e];
    }
    store_values<kVec<T>>(to + row * p.to_strides.l, x);
  }
}

}  // namespace

cudaError_t causal_centres(const CausalCentresParams& p, cudaStream_t stream) {
  const int parts = parts_of_columns(p.D);
  return launch_grid(causal_centres_kernel, int64_t{p.B} * p.Hk * parts, kQuads * kRuns, 0, stream,
                     p, parts);
}

cudaError_t causal_centre_grad(const CausalCentreGradParams& p, cudaStream_t stream) {
  const int parts = parts_of_columns(p.D);
  return launch_grid(causal_centre_grad_kernel, int64_t{p.B} * p.Hk * parts, kQuads * kRuns, 0,
                     stream, p, parts);
}

cudaError_t shift_queries(const ShiftQueriesParams& p, cudaStream_t stream) {
  const auto launch = [&](auto t) {
    using T = decltype(t);
    const int pieces = p.H * (p.D / kVec<T>);
    const int tiles = (p.N + kShiftRows - 1) / kShiftRows;
    const int parts = (pieces + kShiftThreads - 1) / kShiftThreads;
    return launch_grid(shift_queries_kernel<T>, int64_t{p.B} * tiles * parts, kShiftThreads, 0,
                       stream, p, tiles, parts);
  };
  if (p.dtype == Dtype::f32) return launch(float{});
  return p.dtype == Dtype::f16 ? launch(__half{}) : launch(__nv_bfloat16{});
}

}  // namespace mra::cuda
