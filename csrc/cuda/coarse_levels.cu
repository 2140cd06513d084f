// coarse = block with levels, in float32: the softmax of a row of cells over its coarse cells, and
// its gradients. A row holds few cells, so lanes take one each for the scores, then columns.
#include "levels.h"
#include "sm80/levels.cuh"

namespace mra::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

// A row of D floats, 16-byte aligned, in shared memory, times one anywhere.
__device__ __forceinline__ float dot(const float* shared, const float* row, int D) {
  float sum = 0.f;
#pragma unroll 4
  for (int d = 0; d < D; d += 4) {
    const float4 u = *reinterpret_cast<const float4*>(shared + d);
    const float4 w = *reinterpret_cast<const float4*>(row + d);
    sum = fmaf(u.x, w.x, sum);
    sum = fmaf(u.y, w.y, sum);
    sum = fmaf(u.z, w.z, sum);
    sum = fmaf(u.w, w.w, sum);
  }
  return sum;
}

// acc += sum over the lanes' rows of weight times row; lane l has columns 32 j + l.
template <int kPer>
__device__ __forceinline__ void add_rows(float (&acc)[kPer], float weight, const float* rows,
                                         int64_t row, int D) {
  const int lane = threadIdx.x % 32;
#pragma unroll 8
  for (int i = 0; i < 32; ++i) {
    const float w = __shfl_sync(kFullWarp, weight, i);
    const float* from = rows + __shfl_sync(kFullWarp, row, i) * D;
    if (w == 0.f) continue;  // the same for the whole warp
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (32 * j + lane < D) acc[j] = fmaf(w, from[32 * j + lane], acc[j]);
    }
  }
}

template <int kPer>
__device__ __forceinline__ void store(float* to, const float (&acc)[kPer], float factor, int D) {
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const int d = 32 * j + threadIdx.x % 32;
    if (d < D) to[d] = acc[j] * factor;
  }
}

// Where a block among those of all resolutions belongs.
__device__ __forceinline__ int resolution_of_query(const Levels& l, int block) {
  int r = l.count - 1;
  while (block < l.at[r].first_q) --r;
  return r;
}
__device__ __forceinline__ int resolution_of_key(const Levels& l, int block) {
  int r = l.count - 1;
  while (block < l.at[r].first_k) --r;
  return r;
}

// One warp a row of cells.
template <int kPer>
__global__ void __launch_bounds__(kThreads)
    levels_forward_kernel(const __grid_constant__ CoarseLevelsForward p) {
  extern __shared__ __align__(16) float smem[];
  const Levels& l = p.levels;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = p.D;
  const int64_t unit = int64_t{blockIdx.x} * kWarps + warp;
  if (unit >= int64_t{p.B} * p.H * l.query_blocks) return;  // whole warps leave
  const int64_t head = unit / l.query_blocks;
  const int block = static_cast<int>(unit - head * l.query_blocks);
  const int b = static_cast<int>(head / p.H), hk = static_cast<int>(head % p.H) / (p.H / p.Hk);
  const int r = resolution_of_query(l, block);
  float* q = smem + warp * D;
  for (int d = lane; d < D; d += 32) q[d] = p.q_mean[unit * D + d];
  __syncwarp();
  const int64_t keys = ((int64_t{b} * p.Hk + hk) * l.key_blocks + l.at[r].first_k) * D;
  const CoarseCells cells(l, b, head, r, block - l.at[r].first_q);

  float top = -INFINITY, sum = 0.f, acc[kPer] = {};
  for (int t0 = 0; t0 < cells.all.positions; t0 += 32) {
    const int y = cells.at(t0 + lane);
    float w = -INFINITY;
    if (y >= 0) {
      w = fmaf(p.scale, dot(q, p.k_mean + keys + int64_t{y} * D, D),
               logf(static_cast<float>(cells.all.count[y])));
    }
    const float most = fmaxf(top, warp_max(w));
    const float shift = most == -INFINITY ? 0.f : most;
    const float factor = expf(top - shift);
    top = most;
    w = expf(w - shift);
    sum = fmaf(sum, factor, w);  // of this lane's cells
#pragma unroll
    for (int j = 0; j < kPer; ++j) acc[j] *= factor;
    add_rows<kPer>(acc, w, p.v_mean + keys, max(y, 0), D);
  }
  sum = warp_sum(sum);
  const bool weight = !(sum == 0.f);  // NaN in, NaN out
  store<kPer>(p.row_mean + unit * D, acc, weight ? 1.f / sum : 0.f, D);
  if (lane == 0) p.row_lse[unit] = weight ? top + logf(sum) : -INFINITY;
}

// The state of every block of block_q queries, from those of the rows of cells that it lies in.
template <int kPer>
__global__ void __launch_bounds__(kThreads)
    levels_combine_kernel(const __grid_constant__ CoarseLevelsForward p) {
  const Levels& l = p.levels;
  const int lane = threadIdx.x % 32, D = p.D, nq = l.at[0].nq;
  const int64_t unit = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (unit >= int64_t{p.B} * p.H * nq) return;
  const int64_t head = unit / nq;
  const int x = static_cast<int>(unit - head * nq);
  const auto row_of = [&](int r) {
    return head * l.query_blocks + l.at[r].first_q + (x >> (l.at[r].log2_q - l.at[0].log2_q));
  };
  const float own = lane < l.count ? p.row_lse[row_of(lane)] : -INFINITY;
  const float top = warp_max(own), shift = top == -INFINITY ? 0.f : top;
  const float weight = expf(own - shift), sum = warp_sum(weight);
  const float part = sum == 0.f ? 0.f : weight / sum;
  if (lane < l.count) p.parts[unit * l.count + lane] = part;
  if (lane == 0) p.lse[unit] = top + logf(sum == 0.f ? 1.f : sum);
  float acc[kPer] = {};
  for (int r = 0; r < l.count; ++r) {
    const float w = __shfl_sync(kFullWarp, part, r);
    const float* from = p.row_mean + row_of(r) * D;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (32 * j + lane < D) acc[j] = fmaf(w, from[32 * j + lane], acc[j]);
    }
  }
  store<kPer>(p.mean + unit * D, acc, 1.f, D);
}

// The weight of a pair and the gradient of its score: q . k and g . v are `score` and `product`.
struct Pair {
  float weight, grad;

  __device__ __forceinline__ Pair(const CoarseLevelsBackward& p, float score, float product,
                                  int count, float lse, float delta)
      : weight(expf(fmaf(p.scale, score, logf(static_cast<float>(count))) - lse)),
        grad(p.scale * weight * (product - delta)) {}
};

// dq~ of one row of cells, by one warp.
template <int kPer>
__global__ void __launch_bounds__(kThreads)
    levels_rows_kernel(const __grid_constant__ CoarseLevelsBackward p) {
  extern __shared__ __align__(16) float smem[];
  const Levels& l = p.levels;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = p.D;
  const int64_t unit = int64_t{blockIdx.x} * kWarps + warp;
  if (unit >= int64_t{p.B} * p.H * l.query_blocks) return;
  const int64_t head = unit / l.query_blocks;
  const int block = static_cast<int>(unit - head * l.query_blocks);
  const int b = static_cast<int>(head / p.H), hk = static_cast<int>(head % p.H) / (p.H / p.Hk);
  const int r = resolution_of_query(l, block);
  float *q = smem + 2 * warp * D, *g = q + D;
  for (int d = lane; d < D; d += 32) {
    q[d] = p.q_mean[unit * D + d];
    g[d] = p.grad_out[unit * D + d];
  }
  __syncwarp();
  const float lse = p.lse[unit], delta = p.delta[unit];
  const int64_t keys = ((int64_t{b} * p.Hk + hk) * l.key_blocks + l.at[r].first_k) * D;
  const CoarseCells cells(l, b, head, r, block - l.at[r].first_q);
  float acc[kPer] = {};
  for (int t0 = 0; lse < INFINITY && t0 < cells.all.positions; t0 += 32) {
    const int y = cells.at(t0 + lane);
    float grad = 0.f;
    if (y >= 0) {
      const int64_t row = keys + int64_t{y} * D;
      grad = Pair(p, dot(q, p.k_mean + row, D), dot(g, p.v_mean + row, D), cells.all.count[y], lse,
                  delta)
                 .grad;
    }
    add_rows<kPer>(acc, grad, p.k_mean + keys, max(y, 0), D);
  }
  const int count = p.q_count[int64_t{b} * l.query_blocks + block];
  store<kPer>(p.grad_q + unit * D, acc, 1.f / static_cast<float>(max(count, 1)), D);
}

// dk~ and dv~ of one key block: its candidates are the children of the query blocks that have
// chosen its parent. Warps take runs of them in turn; their sums are added in order.
template <int kPer>
__global__ void __launch_bounds__(kThreads)
    levels_columns_kernel(const __grid_constant__ CoarseLevelsBackward p) {
  extern __shared__ __align__(16) float smem[];
  __shared__ float sums[2][kWarps][256];
  const Levels& l = p.levels;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = p.D, group = p.H / p.Hk;
  const int64_t unit = blockIdx.x, key_head = unit / l.key_blocks;
  const int block = static_cast<int>(unit - key_head * l.key_blocks);
  const int b = static_cast<int>(key_head / p.Hk), r = resolution_of_key(l, block);
  const ResolutionBlocks& at = l.at[r];
  const int y = block - at.first_k;
  float *k = smem, *v = smem + D;
  for (int d = threadIdx.x; d < D; d += kThreads) {
    k[d] = p.k_mean[unit * D + d];
    v[d] = p.v_mean[unit * D + d];
  }
  __syncthreads();
  const int count = l.key_count[int64_t{b} * l.key_blocks + block];
  const bool coarsest = r + 1 == l.count;
  const ResolutionBlocks& up = l.at[coarsest ? r : r + 1];
  const int shift_q = up.log2_q - at.log2_q, parent = y >> (up.log2_k - at.log2_k);

  float acc_k[kPer] = {}, acc_v[kPer] = {};
  for (int h = 0; count > 0 && h < group; ++h) {
    const int64_t head = int64_t{b} * p.H + key_head % p.Hk * group + h;
    const List chosen = list_of(p.columns[r], head, y);
    const List parents = coarsest ? List{nullptr, at.nq} : list_of(p.columns[r + 1], head, parent);
    const int64_t positions = int64_t{parents.count} << shift_q;
    const int64_t rows = head * l.query_blocks + at.first_q;
    for (int64_t t = 32 * warp; t < positions; t += 32 * kWarps) {
      int64_t x = t + lane;
      if (x >= positions) {
        x = at.nq;
      } else if (!coarsest) {
        x = (int64_t{parents.entries[x >> shift_q]} << shift_q) + (x & ((1 << shift_q) - 1));
      }
      float weight = 0.f, grad = 0.f;
      const bool there = x >= 0 && x < at.nq;
      const int own = there ? static_cast<int>(x) : 0;
      if (there && y < past_blocks(l, r, own) && !contains(chosen, own)) {
        const float lse = p.lse[rows + own];
        if (lse < INFINITY) {
          const Pair pair(p, dot(k, p.q_mean + (rows + own) * D, D),
                          dot(v, p.grad_out + (rows + own) * D, D), count, lse,
                          p.delta[rows + own]);
          weight = pair.weight;
          grad = pair.grad;
        }
      }
      add_rows<kPer>(acc_k, grad, p.q_mean + rows * D, own, D);
      add_rows<kPer>(acc_v, weight, p.grad_out + rows * D, own, D);
    }
  }
  store<kPer>(sums[0][warp], acc_k, 1.f, D);
  store<kPer>(sums[1][warp], acc_v, 1.f, D);
  __syncthreads();
  const float n = static_cast<float>(max(count, 1));
  for (int i = threadIdx.x; i < 2 * D; i += kThreads) {
    const int which = i / D, d = i - which * D;
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += sums[which][w][d];
    (which == 0 ? p.grad_k : p.grad_v)[unit * D + d] = sum / n;
  }
}

// f(integral_constant<int, columns of a lane>)
template <class F>
cudaError_t by_columns(int D, F f) {
  if (D <= 32) return f(std::integral_constant<int, 1>{});
  if (D <= 64) return f(std::integral_constant<int, 2>{});
  if (D <= 128) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, 8>{});
}

int64_t blocks_of(int64_t units) { return (units + kWarps - 1) / kWarps; }

}  // namespace

cudaError_t coarse_levels(const CoarseLevelsForward& p, cudaStream_t stream) {
  const int64_t heads = int64_t{p.B} * p.H;
  return by_columns(p.D, [&](auto per) {
    const cudaError_t error =
        launch_grid(levels_forward_kernel<per()>, blocks_of(heads * p.levels.query_blocks),
                    kThreads, kWarps * p.D * 4, stream, p);
    if (error != cudaSuccess) return error;
    return launch_grid(levels_combine_kernel<per()>, blocks_of(heads * p.levels.at[0].nq), kThreads,
                       0, stream, p);
  });
}

cudaError_t coarse_levels_backward(const CoarseLevelsBackward& p, cudaStream_t stream) {
  return by_columns(p.D, [&](auto per) {
    const cudaError_t error = launch_grid(levels_rows_kernel<per()>,
                                          blocks_of(int64_t{p.B} * p.H * p.levels.query_blocks),
                                          kThreads, 2 * kWarps * p.D * 4, stream, p);
    if (error != cudaSuccess) return error;
    return launch_grid(levels_columns_kernel<per()>, int64_t{p.B} * p.Hk * p.levels.key_blocks,
                       kThreads, 2 * p.D * 4, stream, p);
  });
}

}  // namespace mra::cuda
