// delta = rowsum(dO * o) - dlse, and the gradient state of whole query blocks.
#include <cmath>

#include "block_sum.cuh"
#include "column_order.cuh"
#include "delta.h"

namespace mra::cuda {
namespace {

constexpr int kWarps = 8;
constexpr float kLog2e = 1.4426950408889634f;

// Readings of 16 bytes that a lane's part of a row takes.
template <typename T, int kLanes>
inline constexpr int kPasses = kLanes == 32 && sizeof(T) == 4 ? 2 : 1;

// rowsum(dO * o) - dlse of row `first` + lane, 0 where there is none. Stored as well. All lanes
// call with_row(r, u) for row `first` + r, u what the lane has read of its dO, pass by pass.
template <typename T, int kLanes, typename WithRow>
__device__ __forceinline__ float row_delta(const DeltaParams& p, int b, int h, int64_t first_row,
                                           const WithRow& with_row) {
  constexpr int kRows = 32 / kLanes;
  constexpr int kBatch = kLanes < 4 ? kLanes : 4;  // rows in flight for each lane
  constexpr int kPasses = mra::cuda::kPasses<T, kLanes>;
  const int lane = threadIdx.x % 32, row_lane = lane / kLanes;
  const int64_t first = first_row + row_lane;
  const int chunks = p.D / kVec<T>;
  const int64_t offset = lane % kLanes * kVec<T>;
  const T* grad = static_cast<const T*>(p.grad_out) + b * p.grad_stride.b + h * p.grad_stride.h +
                  first * p.grad_stride.l + offset;
  const T* out = static_cast<const T*>(p.out) + b * p.out_stride.b + h * p.out_stride.h +
                 first * p.out_stride.l + offset;

  float mine = 0.f;  // of row (lane % kLanes) * kRows + row_lane of the tile
#pragma unroll 1
  for (int k = 0; k < kLanes; k += kBatch) {
    float sum[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) sum[j] = 0.f;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      uint4 x[kBatch], y[kBatch];
      const bool inside = lane % kLanes + pass * kLanes < chunks;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        x[j] = y[j] = make_uint4(0, 0, 0, 0);
        if (inside && first + (k + j) * kRows < p.N) {
          x[j] = load16(grad + j * kRows * p.grad_stride.l + pass * kLanes * kVec<T>);
          y[j] = load16(out + j * kRows * p.out_stride.l + pass * kLanes * kVec<T>);
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        float u[kVec<T>], v[kVec<T>];
        unpack16<T>(x[j], u);
        unpack16<T>(y[j], v);
#pragma unroll
        for (int e = 0; e < kVec<T>; ++e) sum[j] += u[e] * v[e];
        with_row((k + j) * kRows + row_lane, pass, u);
      }
    }
    grad += kBatch * kRows * p.grad_stride.l;
    out += kBatch * kRows * p.out_stride.l;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) {
        sum[j] += __shfl_xor_sync(kFullWarp, sum[j], step);
      }
      if (lane % kLanes == k + j) mine = sum[j];
    }
  }

  mine = __shfl_sync(kFullWarp, mine, lane / kRows + lane % kRows * kLanes);  // of row lane
  const int64_t i = first_row + lane;
  if (i >= p.N) return 0.f;
  if (p.grad_lse != nullptr) {
    mine -= p.grad_lse[b * p.lse_stride.b + h * p.lse_stride.h + i * p.lse_stride.l];
  }
  p.delta[(int64_t{b} * p.H + h) * p.N + i] = mine;
  return mine;
}

// One warp per 32 rows of a head; neighbouring warps take neighbouring heads, which lie side by
// side in memory when the tensors come from a (B, N, H, D) layout.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kWarps * 32, 4) delta_kernel(const DeltaParams p) {
  const int tiles = static_cast<int>((p.N + 31) / 32);
  const int64_t unit = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (unit >= int64_t{p.B} * p.H * tiles) return;  // whole warps leave
  const int h = static_cast<int>(unit) % p.H;
  const int tile = static_cast<int>(unit) / p.H % tiles;
  row_delta<T, kLanes>(p, static_cast<int>(unit) / p.H / tiles, h, int64_t{tile} * 32,
                       [](int, int, const auto&) {});
  if (blockIdx.x == 0) wait_for_previous();
}

// The rows of a query block as a warp has them: row 32 g + lane.
struct BlockWeights {
  float lowest;                // M = min lse over rows that have weight (lse > -inf)
  uint32_t live[kBlockWords];  // those rows, one bit each
  float weight[kBlockWords];   // exp(M - lse), at most 1; 0 for other rows

  // head: of all heads; first: row of it.
  __device__ __forceinline__ BlockWeights(const BlockRowsParams& p, int64_t head, int64_t first) {
    const int lane = threadIdx.x % 32;
    lowest = INFINITY;
#pragma unroll
    for (int g = 0; g < kBlockWords; ++g) {
      const int r = g * 32 + lane;
      const bool inside = r < p.block && first + r < p.N;
      weight[g] = inside ? p.lse[head * p.N + first + r] : -INFINITY;
      live[g] = __ballot_sync(kFullWarp, inside && weight[g] != -INFINITY);
      if (live[g] >> lane & 1) lowest = fminf(lowest, weight[g]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      lowest = fminf(lowest, __shfl_xor_sync(kFullWarp, lowest, step));
    }
#pragma unroll
    for (int g = 0; g < kBlockWords; ++g) {
      weight[g] = live[g] >> lane & 1 ? expf(lowest - weight[g]) : 0.f;
    }
  }

  // M and the weighted sum of delta of block `unit`, of which this lane has a part.
  __device__ __forceinline__ void store(const BlockRowsParams& p, int64_t unit, float delta) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) delta += __shfl_xor_sync(kFullWarp, delta, step);
    if (threadIdx.x % 32 != 0) return;
    p.block_lse[unit] = lowest;
    p.block_delta[unit] = delta;
  }
};

// The sums of dO and delta of one query block, weighted, by one warp.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kWarps * 32, 4) block_rows_kernel(const BlockRowsParams p) {
  const int64_t unit = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (unit >= int64_t{p.B} * p.H * p.nq) return;  // whole warps leave
  const int x = static_cast<int>(unit) % p.nq, head = static_cast<int>(unit) / p.nq;
  const int lane = threadIdx.x % 32;
  const int64_t first = int64_t{x} * p.block;
  const BlockWeights rows(p, head, first);
  float delta = 0.f;
#pragma unroll
  for (int g = 0; g < kBlockWords; ++g) {
    if (rows.live[g] >> lane & 1) {
      delta += rows.weight[g] * p.delta[int64_t{head} * p.N + first + 32 * g + lane];
    }
  }
  rows.store(p, unit, delta);

  const T* from = static_cast<const T*>(p.grad_out) + head / p.H * p.grad_stride.b +
                  head % p.H * p.grad_stride.h + first * p.grad_stride.l;
  const int chunks = p.D / kVec<T>;
  for (int c = 0; c < chunks; c += kLanes) {
    const int chunk = c + lane % kLanes;
    float sum[kVec<T>];
    block_sum<T, kLanes>(
        from, p.grad_stride.l, rows.live, chunk, chunks,
        [&](int g, int r) { return __shfl_sync(kFullWarp, rows.weight[g], r); }, sum);
    if (lane < kLanes && chunk < chunks) {
      store_values<kVec<T>>(p.block_grad + unit * p.D + chunk * kVec<T>, sum);
    }
  }
}

// Both for one query block, from one reading of dO.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kWarps * 32, 3)
    delta_and_block_rows_kernel(const DeltaParams d, const BlockRowsParams p) {
  constexpr int kPasses = mra::cuda::kPasses<T, kLanes>;
  const int64_t unit = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (unit >= int64_t{p.B} * p.H * p.nq) return;  // whole warps leave
  const int x = static_cast<int>(unit) % p.nq, head = static_cast<int>(unit) / p.nq;
  const int lane = threadIdx.x % 32, chunks = p.D / kVec<T>;
  const int64_t first = int64_t{x} * p.block;
  const BlockWeights rows(p, head, first);

  float sum[kPasses][kVec<T>] = {}, delta = 0.f;
#pragma unroll
  for (int g = 0; g < kBlockWords; ++g) {
    if (32 * g >= p.block) break;
    const float mine = row_delta<T, kLanes>(
        d, head / p.H, head % p.H, first + 32 * g, [&](int r, int pass, const auto& u) {
          const float weight = __shfl_sync(kFullWarp, rows.weight[g], r);
          if (weight == 0.f) return;  // what such a row holds (NaN perhaps) stays out
#pragma unroll
          for (int e = 0; e < kVec<T>; ++e) sum[pass][e] += weight * u[e];
        });
    if (rows.live[g] >> lane & 1) delta += rows.weight[g] * mine;
  }
  rows.store(p, unit, delta);
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2) {
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) {
        sum[pass][e] += __shfl_xor_sync(kFullWarp, sum[pass][e], step);
      }
    }
    const int chunk = lane % kLanes + pass * kLanes;
    if (lane < kLanes && chunk < chunks) {
      store_values<kVec<T>>(p.block_grad + unit * p.D + chunk * kVec<T>, sum[pass]);
    }
  }
  if (blockIdx.x == 0) wait_for_previous();
}

// Runs of 32 rows that a warp has, all of them on their way at once.
constexpr int kRuns = 4;

// The sums of block of threads `block`'s rows.
__device__ __forceinline__ void sum_rows(const RowSumsParams& p, int block) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (int64_t{block} * kWarps + threadIdx.x / 32) * kRuns;
  const int64_t runs = p.heads * p.chunks;
  if (first >= runs) return;
  int64_t head = first / p.chunks, chunk = first - head * p.chunks, at[kRuns];
  bool there[kRuns];
  float lse[kRuns], bias[kRuns], delta[kRuns], pooled_delta[kRuns];
  const auto read = [](const float* from, bool there, int64_t at) {
    return there && from != nullptr ? from[at] : 0.f;
  };
#pragma unroll
  for (int i = 0; i < kRuns; ++i) {
    const int64_t row = 32 * chunk + lane;
    there[i] = first + i < runs && row < p.rows;
    at[i] = head * p.rows + row;
    lse[i] = there[i] ? p.lse[at[i]] : -INFINITY;
    bias[i] = read(p.row_bias, there[i], at[i]);
    delta[i] = read(p.sums != nullptr ? p.delta : nullptr, there[i], at[i]);
    pooled_delta[i] = read(p.pooled_sums != nullptr ? p.pooled_delta : nullptr, there[i], at[i]);
    if (++chunk == p.chunks) chunk = 0, ++head;
  }
#pragma unroll
  for (int i = 0; i < kRuns; ++i) {
    if (first + i >= runs) break;
    const bool weight = fabsf(lse[i]) != INFINITY;
    const float lse2 = weight ? lse[i] * kLog2e : INFINITY;
    const float pooled_lse2 = weight ? (lse[i] - bias[i]) * kLog2e : INFINITY;
    if (there[i]) {
      p.lse2[at[i]] = lse2;
      if (p.row_bias != nullptr) p.pooled_lse2[at[i]] = pooled_lse2;
    }
    const auto store = [&](float* sums, float lse2, float delta) {
      if (sums == nullptr) return;
      float* const to = sums + (first + i) * 64 + lane;
      to[0] = lse2;
      to[32] = delta;
    };
    store(p.sums, lse2, delta[i]);
    store(p.pooled_sums, pooled_lse2, pooled_delta[i]);
  }
}

// The first `order_blocks` blocks of threads find the order of the columns, the others the sums.
__global__ void __launch_bounds__(kWarps * 32)
    row_sums_kernel(const RowSumsParams p, int order_blocks) {
  const int block = static_cast<int>(blockIdx.x) - order_blocks;
  if (block < 0) {
    order_columns(p.columns, blockIdx.x);
  } else {
    sum_rows(p, block);
  }
  if (blockIdx.x == 0) wait_for_previous();
}

unsigned grid_of(int64_t units) { return static_cast<unsigned>((units + kWarps - 1) / kWarps); }

struct LaunchDelta {
  const DeltaParams& p;
  cudaStream_t stream;

  template <typename T, int kLanes>
  cudaError_t operator()() const {
    const unsigned grid = grid_of((p.N + 31) / 32 * p.B * p.H);
    return launch_grid(delta_kernel<T, kLanes>, grid, kWarps * 32, 0, stream, Together{p.beside}, p);
  }
};

struct LaunchBlockRows {
  const BlockRowsParams& p;
  cudaStream_t stream;

  template <typename T, int kLanes>
  cudaError_t operator()() const {
    const unsigned grid = grid_of(int64_t{p.B} * p.H * p.nq);
    return launch_grid(block_rows_kernel<T, kLanes>, grid, kWarps * 32, 0, stream, p);
  }
};

struct LaunchDeltaAndBlockRows {
  const DeltaParams& d;
  const BlockRowsParams& p;
  cudaStream_t stream;

  template <typename T, int kLanes>
  cudaError_t operator()() const {
    const unsigned grid = grid_of(int64_t{p.B} * p.H * p.nq);
    return launch_grid(delta_and_block_rows_kernel<T, kLanes>, grid, kWarps * 32, 0, stream,
                       Together{d.beside}, d, p);
  }
};

}  // namespace

cudaError_t row_sums(const RowSumsParams& p, cudaStream_t stream) {
  constexpr int kRunsOfBlock = kWarps * kRuns;
  const int64_t blocks = (p.heads * p.chunks + kRunsOfBlock - 1) / kRunsOfBlock;
  const int64_t first = order_blocks(p.columns);
  return launch_grid(row_sums_kernel, first + blocks, kWarps * 32, 0, stream, Together{p.beside}, p,
                     static_cast<int>(first));
}

cudaError_t delta_backward(const DeltaParams& params, cudaStream_t stream) {
  return dispatch_rows(params.dtype, params.D, LaunchDelta{params, stream});
}

cudaError_t delta_and_block_rows_backward(const DeltaParams& d, const BlockRowsParams& p,
                                          cudaStream_t stream) {
  return dispatch_rows(p.dtype, p.D, LaunchDeltaAndBlockRows{d, p, stream});
}

cudaError_t block_rows_backward(const BlockRowsParams& params, cudaStream_t stream) {
  return dispatch_rows(params.dtype, params.D, LaunchBlockRows{params, stream});
}

}  // namespace mra::cuda
