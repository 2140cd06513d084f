// Short heads (forward_head.cuh): order 1, and the weights of keys of pool = centred.
#pragma once

#include "head_pool.cuh"

namespace mra::cuda::sm90 {

// Pairs of a half type, element by element, rounded once.
template <typename T>
struct Pairs;
template <>
struct Pairs<__nv_bfloat16> {
  using Two = __nv_bfloat162;
  static __device__ __forceinline__ uint32_t less(uint32_t a, uint32_t b) {
    const Two d = __hsub2(reinterpret_cast<const Two&>(a), reinterpret_cast<const Two&>(b));
    return reinterpret_cast<const uint32_t&>(d);
  }
  static __device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
    const Two d = __hmul2(reinterpret_cast<const Two&>(a), reinterpret_cast<const Two&>(b));
    return reinterpret_cast<const uint32_t&>(d);
  }
};

// The 16 bits of column `column` of row `row`, twice.
template <int DP>
__device__ __forceinline__ uint32_t twice(const uint16_t (&from)[1][16][DP], int row, int column) {
  const uint32_t x = from[0][row][swizzled<DP>(column / 8, row) * 8 + column % 8];
  return x | x << 16;
}

// C and Sigma, by all warps of the head: each makes 16 rows and some columns of one of them, from
// all keys, less the means of their blocks as they are rounded, and times the roots of their
// weights. To shared memory and, unless null, to `out`, [2, DP, DP].
template <typename T, bool kWeighted, int DP, class Shared>
__device__ __forceinline__ void make_matrices(Shared& s, const HeadBlocks& blocks, int runs,
                                              int warp, T* out,
                                              const PanelLane<DP>& panel) {
  constexpr int kWarps = Shared::kRows / kRun, kTiles16 = DP / 16;
  constexpr int kShare = 2 * kTiles16;  // pieces of 16 whole rows
  constexpr int kCut = kWarps > kShare ? kWarps / kShare : 1, kTiles = DP / 8 / kCut;
  constexpr int kRowBytes = PanelLane<DP>::kRowBytes;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int counted = __reduce_add_sync(kFullWarp, lane < runs ? __popc(s.keys_there[lane]) : 0);
  const float over_n = 1.f / static_cast<float>(max(counted, 1));

#pragma unroll 1
  for (int piece = warp; piece < kShare * kCut; piece += kWarps) {
    const int part = piece % kCut, which = piece / kCut / kTiles16;
    const int row = piece / kCut % kTiles16 * 16, column = part * kTiles * 8;
    const bool sigma = which == 1;
    const auto& means = sigma ? s.coarse.k : s.coarse.v;
    const uint32_t left = smem_address(s.in.k) + (panel.key ^ 2 * row);
    const uint32_t right = smem_address(sigma ? s.in.k : s.in.v);
    // Eight columns of all rows of a run at once.
    const auto right_at = [&](int run, int n) {
      const int chunk = column / 8 + n;
      return right + (run * kRun + lane) * kRowBytes + swizzled<DP>(chunk, lane) * 16;
    };
    float c[kTiles][4] = {};
#pragma unroll 1
    for (int run = 0; run < runs; ++run) {
      const uint32_t there = s.keys_there[run];
      const int y = blocks.of_run(run);
      uint32_t less_left[2], less_right[kTiles];
#pragma unroll
      for (int i = 0; i < 2; ++i) less_left[i] = twice(s.coarse.k, y, row + 8 * i + g);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) less_right[n] = twice(means, y, column + 8 * n + g);
      typename Mma<T>::A a[2];
      uint32_t b[kTiles][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        ldmatrix_x4<true>(a[k].r, left + (run * kRun + 16 * k) * kRowBytes);
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) ldmatrix_x4<true>(b[n], right_at(run, n));
      // Registers 2 i and 2 i + 1 of the left operand, i of the right one, have keys 8 i + 2 t on.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t(&u)[4] = a[i / 2].r;
        const int at = i % 2 * 2;
        u[at] = Pairs<T>::less(u[at], less_left[0]);
        u[at + 1] = Pairs<T>::less(u[at + 1], less_left[1]);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) b[n][i] = Pairs<T>::less(b[n][i], less_right[n]);
        if (kWeighted) {
          const uint32_t root = s.coarse.roots[(run * kRun + 8 * i) / 2 + t];
          u[at] = Pairs<T>::times(u[at], root);
          u[at + 1] = Pairs<T>::times(u[at + 1], root);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) b[n][i] = Pairs<T>::times(b[n][i], root);
        }
        if (there != kFullWarp) {
          const uint32_t mask = mask_pair(there, 8 * i + 2 * t);
          u[at] &= mask, u[at + 1] &= mask;
#pragma unroll
          for (int n = 0; n < kTiles; ++n) b[n][i] &= mask;
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        Mma<T>::product(c[n], a[0], b[n][0], b[n][1]);
        Mma<T>::product(c[n], a[1], b[n][2], b[n][3]);
      }
    }
    uint16_t(&matrix)[1][DP][DP] = s.coarse.matrices[which];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + g + 8 * half, chunk = column / 8 + n;
        const uint32_t pair =
            Mma<T>::pack(c[n][2 * half] * over_n, c[n][2 * half + 1] * over_n);
        *reinterpret_cast<uint32_t*>(&matrix[0][r][swizzled<DP>(chunk, r) * 8 + 2 * t]) = pair;
        if (out != nullptr) {
          reinterpret_cast<uint32_t*>(out)[((which * DP + r) * DP + 8 * chunk) / 2 + t] = pair;
        }
      }
    }
  }
}

// c = A times one of the matrices.
template <typename T, int DP, int kSteps>
__device__ __forceinline__ void multiply_matrix(float (&c)[DP / 8][4],
                                                const typename Mma<T>::A (&a)[kSteps],
                                                const uint16_t (&matrix)[1][DP][DP],
                                                const PanelLane<DP>& panel) {
#pragma unroll
  for (int n = 0; n < DP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0.f;
  }
  const uint32_t base = smem_address(matrix);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    typename Mma<T>::B fb[DP / 16];
#pragma unroll
    for (int n = 0; n < DP / 16; ++n) {
      ldmatrix_x4<true>(fb[n].r, base + 16 * k * PanelLane<DP>::kRowBytes + panel.rows(n));
    }
    Mma<T>::mma(c, 0, a[k], fb, false);
  }
}

// x_i Sigma x_i^T of this thread's rows, the left operand's: a left operand's registers hold the
// columns that an accumulator's do.
template <typename T, int DP, int kSteps>
__device__ __forceinline__ void multiply_sigma(float (&t)[2],
                                               const typename Mma<T>::A (&a)[kSteps],
                                               const uint16_t (&sigma)[1][DP][DP],
                                               const PanelLane<DP>& panel) {
  float c[DP / 8][4];
  multiply_matrix<T>(c, a, sigma, panel);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float dot = 0.f;
#pragma unroll
    for (int n = 0; n < DP / 8; ++n) {
      const float2 x = unpack2(a[n / 2].r[n % 2 * 2 + half], T{});
      dot += x.x * c[n][2 * half] + x.y * c[n][2 * half + 1];
    }
    t[half] = quad_sum(dot);
  }
}

// The mean query, columns lane and lane + 32 of this lane; the same for every warp.
template <int DP, class Shared>
__device__ __forceinline__ void mean_query(float (&mean)[DP / 32], const Shared& s,
                                           const HeadBlocks& blocks, int runs) {
  const int lane = threadIdx.x % 32;
  int n = 0;
#pragma unroll
  for (int i = 0; i < DP / 32; ++i) mean[i] = 0.f;
#pragma unroll 1
  for (int run = 0; run < runs; run += 1 << blocks.shift) {
    int count = __popc(s.queries_there[run]);
    if (blocks.shift != 0 && run + 1 < runs) count += __popc(s.queries_there[run + 1]);
    n += count;
#pragma unroll
    for (int i = 0; i < DP / 32; ++i) {
      mean[i] = fmaf(static_cast<float>(count), s.q_mean[run][lane + 32 * i], mean[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < DP / 32; ++i) mean[i] /= static_cast<float>(max(n, 1));
}

// Logit of key `lane` of a run with the mean query, log2 units: rounded to T, and what that lost.
template <typename T, int DP>
__device__ __forceinline__ float logit_of_key(const uint16_t (&keys)[kRun][DP],
                                              const float (&mean)[DP / 32], float scale,
                                              const PanelLane<DP>& panel) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float c[2][4] = {};
  const uint32_t base = smem_address(keys);
#pragma unroll
  for (int k = 0; k < DP / 16; ++k) {
    uint32_t right[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int d = 16 * k + 8 * i + 2 * t;
      float x = __shfl_sync(kFullWarp, mean[d / 32], d % 32);
      float y = __shfl_sync(kFullWarp, mean[d / 32], d % 32 + 1);
      const uint32_t high = Mma<T>::pack(x, y);
      const float2 kept = unpack2(high, T{});
      const uint32_t low = Mma<T>::pack(x - kept.x, y - kept.y);
      right[i] = g == 0 ? high : g == 1 ? low : 0u;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      typename Mma<T>::A a;
      ldmatrix_x4<false>(a.r, base + 16 * half * PanelLane<DP>::kRowBytes + panel.rows(k));
      Mma<T>::product(c[half], a, right[0], right[1]);
    }
  }
  // Columns 0 and 1, which thread 4 g has, of rows g and g + 8.
  float logit = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = __shfl_sync(kFullWarp, c[i / 2][i % 2 * 2] + c[i / 2][i % 2 * 2 + 1],
                                lane % 8 * 4);
    if (lane / 8 == i) logit = x;
  }
  return scale * logit;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

// Weight of key `lane` of a run within its block, from its logit (-inf where it does not count);
// `mass`: the entropy of the block's weights, log2 units, -inf for an empty block. The roots of the
// weights times the block's count go to shared memory.
template <typename T, class Shared>
__device__ __forceinline__ float weight_of_key(Shared& s, const HeadBlocks& blocks, int run,
                                               float logit, float& mass) {
  const int lane = threadIdx.x % 32;
  float top = warp_max(logit);
  float shift = top == -INFINITY ? 0.f : top;
  float weight = exp2_approx(logit - shift), sum = warp_sum(weight);
  int count = __popc(s.keys_there[run]);
  if (blocks.shift != 0) {
    if (lane == 0) {
      s.coarse.of_run[run][0] = top;
      s.coarse.of_run[run][1] = sum;
    }
    blocks.meet(run);
    const float other_top = s.coarse.of_run[run ^ 1][0], other_sum = s.coarse.of_run[run ^ 1][1];
    count += __popc(s.keys_there[run ^ 1]);
    top = fmaxf(top, other_top);
    const float both = top == -INFINITY ? 0.f : top, factor = exp2_approx(shift - both);
    weight *= factor;
    sum = sum * factor + (other_top == -INFINITY ? 0.f : other_sum * exp2_approx(other_top - both));
    shift = both;
  }
  const float inverse = count == 0 ? 0.f : 1.f / sum, log_sum = log2_approx(sum);
  weight *= inverse;
  mass = warp_sum(weight == 0.f ? 0.f : weight * (log_sum - (logit - shift)));
  if (blocks.shift != 0) {
    blocks.meet(run);  // the sums have been read
    if (lane == 0) s.coarse.of_run[run][0] = mass;
    blocks.meet(run);
    mass += s.coarse.of_run[run ^ 1][0];
  }
  if (count == 0) mass = -INFINITY;
  const float root = sqrtf(weight * static_cast<float>(count));
  const float next = __shfl_down_sync(kFullWarp, root, 1);
  if (lane % 2 == 0) s.coarse.roots[(run * kRun + lane) / 2] = Mma<T>::pack(root, next);
  return weight;
}

// Weights of a run's keys, one a lane, as left operands: rounded in rows 0 to 7, what that lost in
// rows 8 on.
template <typename T>
__device__ __forceinline__ void as_operands(typename Mma<T>::A (&a)[2], float weight) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = __shfl_sync(kFullWarp, weight, 8 * i + 2 * t);
    const float y = __shfl_sync(kFullWarp, weight, 8 * i + 2 * t + 1);
    const uint32_t high = Mma<T>::pack(x, y);
    const float2 kept = unpack2(high, T{});
    a[i / 2].r[i % 2 * 2] = high;
    a[i / 2].r[i % 2 * 2 + 1] = Mma<T>::pack(x - kept.x, y - kept.y);
  }
}

// Weighted sums of a run.
template <typename T, int DP>
__device__ __forceinline__ float2 weighted_sum(const uint16_t (&rows)[kRun][DP], uint32_t there,
                                               const typename Mma<T>::A (&weights)[2],
                                               const PanelLane<DP>& panel) {
  float sum[DP / 8][4];
  sum_run<T>(sum, rows, there, weights, panel);
#pragma unroll
  for (int n = 0; n < DP / 8; ++n) {
    sum[n][0] += sum[n][2];
    sum[n][1] += sum[n][3];
  }
  return of_column<DP>(sum);
}

}  // namespace mra::cuda::sm90
