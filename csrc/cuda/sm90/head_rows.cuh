// Short heads (forward_head.cuh): the attention of a warp's rows, from pooled keys or a state over
// the selected runs of keys to the output, with order 1.
#pragma once

#include "../sm80/softmax.cuh"
#include "head_moments.cuh"

namespace mra::cuda::sm90 {

// Whether this warp is the last of `warps` to come here; the counter is then at zero again.
__device__ __forceinline__ bool last_to_leave(int& counter, int warps) {
  __syncwarp();
  int before = 0;
  if (threadIdx.x % 32 == 0) {
    __threadfence_block();
    before = atomicAdd(&counter, 1);
    if (before == warps - 1) counter = 0;
  }
  return __shfl_sync(kFullWarp, before, 0) == warps - 1;
}

// Scores of a run of keys -> logits in log2 units, -inf for keys whose bit is not set.
template <int kTiles>
__device__ __forceinline__ void to_logits(float (&c)[kTiles][4], uint32_t there, float scale) {
  const int t = lane_here() % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c[n][i] = there >> (8 * n + 2 * t + i % 2) & 1 ? c[n][i] * scale : -INFINITY;
    }
  }
}

// Divides by the mass, and writes the lse of the rows whose bit in `there` is set, and -inf for
// others of the `present`, with kShare also their coarse share; `lse` and `share_out` are those of
// the first of 16 rows.
template <bool kShare, class Softmax>
__device__ __forceinline__ void finish_rows(Softmax& s, float* lse, float* share_out, int present,
                                            uint32_t there, float (&share)[2]) {
  const int lane = lane_here(), g = lane / 4, t = lane % 4;
  float inverse[2], total[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = quad_sum(s.sum[half]);
    if (!(there >> (g + 8 * half) & 1)) total[half] = 0.f;
    const bool weight = !(total[half] == 0.f);  // NaN in, NaN out
    inverse[half] = weight ? reciprocal_approx(total[half]) : 0.f;
    if (kShare) {
      const float pooled = quad_sum(s.pooled_sum[half]);
      share[half] = weight && pooled > 0.f
                        ? pooled * exp2_approx(s.pooled_max[half] - s.max[half]) * inverse[half]
                        : 0.f;
    }
  }
  // Of the four threads of both rows the first writes for one, the second for the other.
  const int r = g + 8 * t;
  if (t < 2 && r < present) {
    const float mass = t == 0 ? total[0] : total[1], top = t == 0 ? s.max[0] : s.max[1];
    lse[r] = mass == 0.f ? -INFINITY : (top + log2_approx(mass)) * kLn2;
    if (kShare) share_out[r] = t == 0 ? share[0] : share[1];
  }
  s.rescale(inverse);
  if ((there & 0xffffu) == 0xffffu) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // of a row that doesn't count, which may hold NaN
    if (there >> (g + i / 2 * 8) & 1) continue;
#pragma unroll
    for (int n = 0; n < Softmax::kTiles; ++n) s.acc[n][i] = 0.f;
  }
}

// A warp's 16 rows of accumulators to memory: two lanes that share a row trade columns until each
// has 8 bytes that lie together. `present` of the rows are there.
template <typename T, int kTiles>
__device__ __forceinline__ void store_rows(T* out, int64_t stride, int present, int D,
                                           const float (&acc)[kTiles][4]) {
  const int lane = lane_here(), g = lane / 4, t = lane % 4, odd = t % 2;
  T* at = out + g * stride + 8 * odd + t / 2 * 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      const uint32_t w = Mma<T>::pack(acc[j][2 * half], acc[j][2 * half + 1]);
      const uint32_t next = Mma<T>::pack(acc[j + 1][2 * half], acc[j + 1][2 * half + 1]);
      const uint32_t got = __shfl_xor_sync(kFullWarp, odd ? w : next, 1);
      if (g + 8 * half < present && 8 * (j + odd) < D) {
        *reinterpret_cast<uint2*>(at + 8 * j) = odd ? make_uint2(got, next) : make_uint2(w, got);
      }
    }
    at += 8 * stride;
  }
}

// Columns 16 n on of A times a matrix, or its transpose: as many at a time as registers allow.
template <typename T, bool kTransposed, int DP>
__device__ __forceinline__ void multiply_matrix(float (&c)[2][4],
                                                const typename Mma<T>::A (&a)[DP / 16],
                                                const uint16_t (&matrix)[DP][DP], int n,
                                                const PanelLane<DP>& panel) {
#pragma unroll
  for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = 0.f;
#pragma unroll
  for (int k = 0; k < DP / 16; ++k) {
    typename Mma<T>::B fb[1];
    if constexpr (kTransposed) {
      ldmatrix_x4<false>(fb[0].r, smem_address(matrix[16 * n]) + panel.keys(k));
    } else {
      ldmatrix_x4<true>(fb[0].r, smem_address(matrix[16 * k]) + panel.rows(n));
    }
    Mma<T>::mma(c, 0, a[k], fb, false);
  }
}

// t_i = factor x_i Sigma x_i^T of this thread's rows, the left operand's: a left operand's
// registers hold the columns that an accumulator's do.
template <typename T, int DP>
__device__ __forceinline__ void multiply_sigma(float (&t)[2],
                                               const typename Mma<T>::A (&a)[DP / 16],
                                               const uint16_t (&sigma)[DP][DP], float factor,
                                               const PanelLane<DP>& panel) {
  float dot[2] = {};
#pragma unroll
  for (int n = 0; n < DP / 16; ++n) {
    float c[2][4];
    multiply_matrix<T, true>(c, a, sigma, n, panel);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack2(a[n].r[i], T{});
      dot[i % 2] += x.x * c[i / 2][i % 2 * 2] + x.y * c[i / 2][i % 2 * 2 + 1];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) t[half] = factor * quad_sum(dot[half]);
}

// q -> q less the mean query.
template <typename T, int kSteps>
__device__ __forceinline__ void take_centre(typename Mma<T>::A (&q)[kSteps],
                                            const uint32_t (&centre)[8 * kSteps]) {
#pragma unroll
  for (int i = 0; i < 2 * kSteps; ++i) {
    const uint32_t pair = centre[4 * i + threadIdx.x % 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t& u = q[i / 2].r[i % 2 * 2 + half];
      u = less<T>(u, pair);
    }
  }
}

// Logits of 16 rows, as left(i) gives them, with the pooled keys of blocks that `taken` has not, in
// log2 units; with kBiased each row's bias is added.
template <typename T, bool kBiased, int DP, class Coarse, class Left>
__device__ __forceinline__ void pooled_logits(float (&c)[2][4], const Coarse& coarse,
                                              const Left& left, uint32_t taken, float scale,
                                              const float (&row_bias)[2],
                                              const PanelLane<DP>& panel) {
#pragma unroll
  for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = 0.f;
  multiply_nt<T, DP / 16>(c, left, as_panel(coarse.k), panel);
  const int first = threadIdx.x % 4 * 2;  // of this thread's blocks
  taken >>= first;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float2 mass = *reinterpret_cast<const float2*>(&coarse.log_mass[8 * n + first]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float bias = taken & 1u << (8 * n + e) ? -INFINITY : e == 0 ? mass.x : mass.y;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& logit = c[n][2 * i + e];
        logit = fmaf(logit, scale, kBiased ? bias + row_bias[i] : bias);
      }
    }
  }
}

// Rows 16 `half` on of a run, whose queries `left` gives as left operands, 16 columns each; their
// block takes `taken`.
template <typename T, HeadForm kForm, int DP, class Shared, class Inputs, class Left>
__device__ __forceinline__ void attend_rows(const HeadParams& p, Shared& s, const Inputs& in,
                                            const HeadPlace& at, const HeadBlocks& blocks, int run,
                                            int half, const Left& left, uint32_t taken, int phase) {
  const auto panel = panel_here<DP>();
  constexpr bool kWeighted = is_weighted(kForm), kRow = kForm != HeadForm::state;
  constexpr bool kOrder1 = kWeighted || kForm == HeadForm::order1;
  const ForwardParams& f = p.fine;
  const int row = kRun * run + 16 * half, present = f.rows - row;
  if (present <= 0) return;
  const float scale = f.scale * kLog2e;
  OnlineSoftmax<T, DP, kOrder1> softmax;
  auto& acc = softmax.acc;

  // coarse
  [[maybe_unused]] float variance[2];
  [[maybe_unused]] float of_sigma = f.scale * f.scale, of_c = f.scale;
  if constexpr (kOrder1) {
    const MomentScale<T> moments(s.coarse.most[phase]);
    of_sigma *= moments.back(true);
    of_c *= moments.back(false);
  }
  if constexpr (kRow) {
    softmax.start(nullptr, nullptr, DP);
    if constexpr (!kWeighted) {
      float c[2][4], due[2];  // nothing is there yet to be due
      pooled_logits<T, false>(c, s.coarse, left, taken, scale, {}, panel);
      softmax.weigh(c, 1.f, due);
      softmax.keep_pooled();
      multiply_pn<T>(acc, c, as_panel(s.coarse.v), panel);
    }
  } else {
    softmax.start(p.coarse ? s.coarse.state_mean[run] : nullptr, &s.coarse.state_lse[run], DP);
  }

  // fine
#pragma unroll 1
  for (uint32_t blocks_left = taken; blocks_left != 0; blocks_left &= blocks_left - 1) {
    const int lead = blocks.lead(__ffs(blocks_left) - 1);
#pragma unroll 1
    for (int keys = lead; keys < lead + (1 << blocks.shift); ++keys) {
      const uint32_t there = s.keys_there[keys];
      if (kRow && there == 0) continue;
      float c[kRun / 8][4] = {}, factor = scale;
      multiply_nt<T, DP / 16>(c, left, as_panel(s.run_of(in.k(), keys)), panel);
      if (there != kFullWarp) {
        to_logits(c, there, scale);
        factor = 1.f;
      }
      softmax.update(c, factor);
      multiply_pn<T>(acc, c, as_panel(s.run_of(in.v(), keys)), panel);
    }
  }

  // Under *centred* coarse behind fine: it waits for the moments, which say how much its mass is.
  if constexpr (kWeighted) {
    typename Mma<T>::A q[DP / 16];
#pragma unroll
    for (int i = 0; i < DP / 16; ++i) q[i] = left(i);
    take_centre<T>(q, s.coarse.centre);
    barrier_wait(&s.coarse.made, phase);
    multiply_sigma<T>(variance, q, s.coarse.matrices[1], of_sigma, panel);
    float c[2][4], row_bias[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row_bias[i] = log2_approx(3.f - __fdividef(2.f, 1.f + variance[i] / 4));
    }
    pooled_logits<T, true>(c, s.coarse, left, taken, scale, row_bias, panel);
    softmax.update(c, 1.f);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      softmax.pooled_max[i] = softmax.max[i];
      softmax.pooled_sum[i] = c[0][2 * i] + c[0][2 * i + 1] + c[1][2 * i] + c[1][2 * i + 1];
    }
    multiply_pn<T>(acc, c, as_panel(s.coarse.v), panel);
  }

  const int64_t first = int64_t{at.head} * f.rows + row;
  float share[2];
  finish_rows<kOrder1>(softmax, f.lse + first, f.share + first, present,
                       s.queries_there[run] >> 16 * half, share);
  if constexpr (kOrder1) {
    typename Mma<T>::A q[DP / 16];
#pragma unroll
    for (int i = 0; i < DP / 16; ++i) q[i] = left(i);
    if constexpr (kWeighted) {
      take_centre<T>(q, s.coarse.centre);
    } else {
      barrier_wait(&s.coarse.made, phase);
      multiply_sigma<T>(variance, q, s.coarse.matrices[1], of_sigma, panel);
    }
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = share[i] == 0.f ? 0.f : share[i] * of_c * __fdividef(1.f, 1.f + variance[i] / 4);
    }
#pragma unroll
    for (int n = 0; n < DP / 16; ++n) {
      float u[2][4];
      multiply_matrix<T, DP == 32>(u, q, s.coarse.matrices[0], n, panel);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& x = acc[2 * n + i / 4][i % 4];
        if (factor[i % 4 / 2] != 0.f) x = fmaf(factor[i % 4 / 2], u[i / 4][i % 4], x);
      }
    }
  }
  store_rows<T>(static_cast<T*>(f.out) + at.b * f.out_strides.b + at.h * f.out_strides.h +
                    row * f.out_strides.l,
                f.out_strides.l, present, f.D, acc);
}

}  // namespace mra::cuda::sm90
