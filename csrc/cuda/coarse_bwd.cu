// Gradients of the means of query and key blocks, where the pair of blocks is not selected:
//   P_xy = c_y exp(L_xy - M_x), dL_xy = P_xy (g_x . v~_y - e_x)
//   dq~_x = scale sum_y dL_xy k~_y, dk~_y = scale sum_x dL_xy q~_x, dv~_y = sum_x P_xy g_x
//
// One launch for both sides, which are alike: a block of threads owns sixteen blocks of one side
// and multiplies them with all of the other. Sixteen at a time are a warp's turn: it fetches them
// into a place of its own and waits for no other warp, and sums are added up at the end, in order.
// Products are bf16 (mma.sync) of operands split in two, hi hi + hi lo + lo hi: 16 bits.
#include "coarse_pairs.cuh"
#include "sm90/coarse.h"

namespace mra::cuda {
namespace {

using M = Mma<__nv_bfloat16>;

template <int DP>
inline constexpr int kPitch = DP + 8;  // rows of pairs of floats fall in different banks

// What a warp has fetched of the other side.
template <int DP>
struct Others {
  float first[16][kPitch<DP>], second[16][kPitch<DP>];  // q~ and g, or k~ and v~
  float lse[16], delta[16];                             // of query blocks
  int count[16];                                        // of key blocks
};

// Operands of the sixteen blocks, as each lane multiplies them: high parts and low ones.
template <int DP>
struct Own {
  uint4 first[DP / 16][2][32], second[DP / 16][2][32];
};

struct Split {
  uint32_t hi, lo;

  __device__ __forceinline__ Split(float x, float y) {
    hi = M::pack(x, y);
    lo = M::pack(x - __uint_as_float(hi << 16), y - __uint_as_float(hi & 0xffff0000u));
  }
};

// Of the eight columns of a tile of scores the one at place c stands for row
// {0, 2, 1, 3, 6, 4, 7, 5}[c] of the other side: read along or across, rows hit different banks.
__device__ __forceinline__ int even_row(int t) { return t < 2 ? t : t + 4; }
__device__ __forceinline__ int odd_row(int t) { return t + 2; }

__device__ __forceinline__ void product3(float (&c)[4], const M::A& hi, const M::A& lo,
                                         const Split& b0, const Split& b1) {
  M::product(c, lo, b0.hi, b1.hi);
  M::product(c, hi, b0.lo, b1.lo);
  M::product(c, hi, b0.hi, b1.hi);
}

// Rows [16, D] of `from`, of which `present` are there, as operands: by all warps.
template <int DP, int kWarps>
__device__ __forceinline__ void keep_own(uint4 (&to)[DP / 16][2][32], const float* from,
                                         int present, int D) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int step = 0; step < DP / 16; step += kWarps) {
    const int k = step + threadIdx.x / 32;
    const auto pair = [&](int r, int d) {
      d += 16 * k + 2 * t;
      const bool there = r < present && d < D;
      const float2 u = there ? *reinterpret_cast<const float2*>(from + int64_t{r} * D + d)
                             : make_float2(0.f, 0.f);
      return Split(u.x, u.y);
    };
    const Split a = pair(g, 0), b = pair(g + 8, 0), c = pair(g, 8), d = pair(g + 8, 8);
    to[k][0][lane] = make_uint4(a.hi, b.hi, c.hi, d.hi);
    to[k][1][lane] = make_uint4(a.lo, b.lo, c.lo, d.lo);
  }
}

template <int DP>
__device__ __forceinline__ M::A own_operand(const uint4 (&from)[DP / 16][2][32], int k, int part) {
  const uint4 x = from[k][part][threadIdx.x % 32];
  return {{x.x, x.y, x.z, x.w}};
}

// c[16 x 16] += A B^T of rows of the other side, in the order of even_row and odd_row.
template <int DP>
__device__ __forceinline__ void multiply_nt(float (&c)[2][4], const uint4 (&own)[DP / 16][2][32],
                                            const float (&other)[16][kPitch<DP>]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int r = g % 2 ? odd_row(g / 2) : even_row(g / 2);
#pragma unroll 2
  for (int k = 0; k < DP / 16; ++k) {
    const M::A hi = own_operand<DP>(own, k, 0), lo = own_operand<DP>(own, k, 1);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float* row = other[8 * n + r] + 16 * k + 2 * t;
      const float2 u = *reinterpret_cast<const float2*>(row);
      const float2 w = *reinterpret_cast<const float2*>(row + 8);
      product3(c[n], hi, lo, Split(u.x, u.y), Split(w.x, w.y));
    }
  }
}

// acc[16 x DP] += P[16 x 16] B, P's columns in that order.
template <int DP>
__device__ __forceinline__ void multiply_pn(float (&acc)[DP / 8][4], const float (&p)[2][4],
                                            const float (&other)[16][kPitch<DP>]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  M::A hi, lo;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Split x(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
    hi.r[i] = x.hi;
    lo.r[i] = x.lo;
  }
  const float *even = &other[even_row(t)][g], *odd = &other[odd_row(t)][g];
#pragma unroll
  for (int n = 0; n < DP / 8; ++n) {
    constexpr int kNext = 8 * kPitch<DP>;
    product3(acc[n], hi, lo, Split(even[8 * n], odd[8 * n]),
             Split(even[kNext + 8 * n], odd[kNext + 8 * n]));
  }
}

// kKeys: the owned blocks are key blocks, and the other side query blocks of all heads of a group.
template <int DP, int kWarps, bool kKeys>
__device__ void run(const CoarseBackwardParams& p, unsigned tile, char* smem) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = warp_index();
  const int owned = kKeys ? p.nk : p.nq, others = kKeys ? p.nq : p.nk;
  const unsigned heads = kKeys ? p.Hk : p.H, tiles = (owned + 15) / 16;
  const int own0 = tile % tiles * 16, b = tile / tiles / heads, h = tile / tiles % heads;
  const int group = p.H / p.Hk, passes = kKeys ? group : 1;  // heads of the other side
  const int first_head = kKeys ? b * p.H + h * group : b * p.Hk + h / group;
  const int present = min(16, owned - own0);
  const int64_t own_at = int64_t{b * static_cast<int>(heads) + h} * owned + own0;

  Own<DP>& own = *reinterpret_cast<Own<DP>*>(smem);
  auto* stages = reinterpret_cast<Others<DP>*>(&own + 1);
  Others<DP>& s = stages[warp];
  uint32_t* selected = reinterpret_cast<uint32_t*>(stages + kWarps);  // [16][passes * words]
  const int words = (others + 31) / 32, row_words = passes * words;

  const int first_turn = kKeys ? min(start_of(p, own0), others) / 16 : 0;
  const int end = kKeys ? others : min(others, end_of(p, own0 + present - 1));
  const int turns = max(0, (end + 15) / 16 - first_turn);  // of a head of the other side

  const auto fetch = [&](int turn) {
    const int o0 = (first_turn + turn % turns) * 16;
    const int64_t head = first_head + turn / turns, at = head * others + o0;
    const float* first = (kKeys ? p.q_mean : p.k_mean) + at * p.D;
    const float* second = (kKeys ? p.grad_out : p.v_mean) + at * p.D;
    const auto copy = [&](float(&to)[16][kPitch<DP>], const float* from) {
#pragma unroll
      for (int i = 0; i < DP / 8; ++i) {
        const int r = (32 * i + lane) / (DP / 4), d = (32 * i + lane) % (DP / 4) * 4;
        const bool there = o0 + r < others && d < p.D;
        copy_16_bytes(&to[r][d], there ? from + r * p.D + d : from, there);
      }
      commit_copies();
    };
    const bool there = lane < 16 && o0 + lane < others;
    if (lane < 16 && kKeys) {
      copy_4_bytes(&s.lse[lane], p.lse + (there ? at + lane : 0), there);
      copy_4_bytes(&s.delta[lane], p.delta + (there ? at + lane : 0), there);
    } else if (lane < 16) {
      copy_4_bytes(&s.count[lane], p.k_count + (there ? b * p.nk + o0 + lane : 0), there);
    }
    copy(s.first, first);
    copy(s.second, second);
  };
  const int all = passes * turns;
  if (warp < all) fetch(warp);

  // Of rows g and g + 8.
  float own_lse[2], own_delta[2], own_bias[2];
  int limit[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = g + 8 * half, i = own0 + r;
    const bool there = r < present;
    const int count = there && kKeys ? p.k_count[b * owned + i] : 0;
    own_bias[half] = kKeys ? log2_approx(static_cast<float>(count)) : 0.f;
    own_lse[half] = there && !kKeys ? p.lse[own_at + r] : INFINITY;
    own_delta[half] = there && !kKeys ? p.delta[own_at + r] : 0.f;
    limit[half] = kKeys ? start_of(p, i) : min(others, end_of(p, i));
  }

  // The pairs that are selected: some threads for each list.
  for (int i = threadIdx.x; i < 16 * row_words; i += 32 * kWarps) selected[i] = 0;
  keep_own<DP, kWarps>(own.first, (kKeys ? p.k_mean : p.q_mean) + own_at * p.D, present, p.D);
  keep_own<DP, kWarps>(own.second, (kKeys ? p.v_mean : p.grad_out) + own_at * p.D, present, p.D);
  __syncthreads();
  const int r = threadIdx.x / (2 * kWarps);
  for (int pass = 0; r < present && pass < passes; ++pass) {
    const int64_t head = int64_t{b} * p.H + (kKeys ? h * group + pass : h);
    const List list = list_of(kKeys ? p.column_lists : p.row_lists, head, own0 + r);
    mark_list<2 * kWarps, 4>(selected + r * row_words + pass * words, list,
                             threadIdx.x % (2 * kWarps), others);
  }
  __syncthreads();

  float acc[DP / 8][4] = {}, acc_v[kKeys ? DP / 8 : 1][4] = {};
#pragma unroll 1
  for (int turn = warp; turn < all; turn += kWarps) {
    const int o0 = (first_turn + turn % turns) * 16;
    wait_for_copies();
    __syncwarp();
    float c[2][4] = {}, dp[2][4] = {};
    multiply_nt<DP>(c, own.first, s.first);
    multiply_nt<DP>(dp, own.second, s.second);

    const auto from_bit = [](int n) { return n >= 16 ? 0u : n <= 0 ? 0xffffu : 0xffffu << n; };
    uint32_t seen[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word =
          selected[(g + 8 * half) * row_words + turn / turns * words + o0 / 32] >> o0 % 32;
      seen[half] = ~word & (kKeys ? from_bit(limit[half] - o0) & ~from_bit(others - o0)
                                  : ~from_bit(limit[half] - o0));
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int o = 8 * n + (odd ? odd_row(t) : even_row(t));
        const float lse = kKeys ? log2_of_lse(s.lse[o]) : 0.f, delta = kKeys ? s.delta[o] : 0.f;
        const float bias = kKeys ? 0.f : log2_approx(static_cast<float>(s.count[o]));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 2 * half + odd;
          const float shift = kKeys ? own_bias[half] - lse : bias - log2_of_lse(own_lse[half]);
          const float weight = exp2_approx(fmaf(c[n][i], p.scale * kLog2e, shift));
          c[n][i] = seen[half] >> o & 1 ? weight : 0.f;
          dp[n][i] = c[n][i] * (dp[n][i] - (kKeys ? delta : own_delta[half]));
        }
      }
    }
    multiply_pn<DP>(acc, dp, s.first);
    if constexpr (kKeys) multiply_pn<DP>(acc_v, c, s.second);
    __syncwarp();
    if (turn + kWarps < all) fetch(turn + kWarps);
  }

  // Each warp's sums in its own place, then in the order of the warps.
  const auto place = [&](float(&to)[16][kPitch<DP>], const auto& sums) {
#pragma unroll
    for (int n = 0; n < DP / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float2*>(&to[g + 8 * half][8 * n + 2 * t]) =
            make_float2(sums[n][2 * half], sums[n][2 * half + 1]);
      }
    }
  };
  __syncwarp();
  place(s.first, acc);
  if constexpr (kKeys) place(s.second, acc_v);
  __syncthreads();
  for (int i = threadIdx.x; i < (kKeys ? 2 : 1) * 4 * DP; i += 32 * kWarps) {
    const bool values = i >= 4 * DP;
    const int r = i % (4 * DP) / (DP / 4), d = i % (DP / 4) * 4;
    if (r >= present || d >= p.D) continue;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int w = 0; w < min(kWarps, all); ++w) {
      const float4 x = *reinterpret_cast<const float4*>(values ? &stages[w].second[r][d]
                                                               : &stages[w].first[r][d]);
      sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    }
    const int count = (kKeys ? p.k_count : p.q_count)[b * owned + own0 + r];
    const float factor = (values ? 1.f : p.scale) / static_cast<float>(max(1, count));
    float* to = !kKeys ? p.grad_q : values ? p.grad_v : p.grad_k;
    *reinterpret_cast<float4*>(to + (own_at + r) * p.D + d) =
        make_float4(sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor);
  }
}

template <int DP, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, (DP == 64 ? 16 : 8) / kWarps)
    coarse_backward_kernel(const CoarseBackwardParams p, unsigned key_tiles) {
  let_next_start();
  extern __shared__ __align__(16) char smem[];
  if (blockIdx.x < key_tiles) {
    run<DP, kWarps, true>(p, blockIdx.x, smem);
  } else {
    run<DP, kWarps, false>(p, blockIdx.x - key_tiles, smem);
  }
}

template <int DP, int kWarps>
cudaError_t launch(const CoarseBackwardParams& p, const Device& device, cudaStream_t stream) {
  const int64_t key_words = int64_t{p.H / p.Hk} * ((p.nq + 31) / 32), words = (p.nk + 31) / 32;
  const int64_t bytes = sizeof(Own<DP>) + kWarps * sizeof(Others<DP>) +
                        16 * 4 * (key_words > words ? key_words : words);
  if (bytes > device.max_smem) return cudaErrorNotSupported;
  const int64_t keys = int64_t{p.B} * p.Hk * ((p.nk + 15) / 16);
  const int64_t queries = int64_t{p.B} * p.H * ((p.nq + 15) / 16);
  return launch_grid(coarse_backward_kernel<DP, kWarps>, keys + queries, 32 * kWarps, bytes, stream,
                     p, static_cast<unsigned>(keys));
}

template <int DP>
cudaError_t launch(const CoarseBackwardParams& p, const Device& device, cudaStream_t stream) {
  // As many warps as there are turns to share out. At D 128 four blocks of two warps of a
  // multiprocessor, not two of four: C (512 blocks) 30 -> 26 us, B 56 -> 52.6; at D 64 slower.
  if (p.nq <= 32 && p.nk <= 32 && p.H == p.Hk) return launch<DP, 1>(p, device, stream);
  constexpr int kWarps = DP == 64 ? 4 : 2;
  return launch<DP, kWarps>(p, device, stream);
}

}  // namespace

cudaError_t coarse_backward(const CoarseBackwardParams& p, const Device& device,
                            cudaStream_t stream) {
  if (p.D > 128) return cudaErrorNotSupported;
#ifdef MRA_SM90A
  // Fewer blocks fill too little of a tile of 64.
  if (device.major == 9 && (p.nq > 32 || p.nk > 32)) {
    const cudaError_t error = p.D <= 64 ? sm90::launch_coarse_backward<64>(p, device, stream)
                                        : sm90::launch_coarse_backward<128>(p, device, stream);
    if (error != cudaErrorNotSupported) return error;
  }
#endif
  return p.D <= 64 ? launch<64>(p, device, stream) : launch<128>(p, device, stream);
}

}  // namespace mra::cuda
