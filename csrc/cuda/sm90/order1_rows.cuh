// Order 1 of the rows in the backward pass: from tiles of 64 queries and their output gradients
//
//   x = dO C^T,  w = q Sigma,  u = s x.q,  t = s^2 w.q,  gamma = 1 / (1 + t / 4)
//   a = P gamma s,  b = -P gamma^2 u s^2 / 4      P: the row's coarse share
//   dq = a x + 2 b w,   sums over rows of  q^T (a dO)  and  q^T (b q)
//
// in one reading, and delta = dO.o - dlse where it isn't there yet. C and Sigma stay in shared
// memory; a block of threads walks a chunk of a head's tiles. Warpgroup w makes columns 64 w to 64
// w + 63 of dq and those rows of both sums.
//
// With weighted means q is q - centre but in dO C^T, a and b are made of what the rows had before,
// and dq but for what comes through the centre is summed up for its gradient.
#pragma once

#include <climits>

#include "moments.h"
#include "order1_rows_tiles.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

// kNarrow: head dims up to 32.
template <int DP, bool kCentred, bool kNarrow>
__global__ void __launch_bounds__(Order1RowsTraits<DP, kCentred>::kThreads,
                                  Order1RowsTraits<DP, kCentred>::kBlocks)
    order1_rows_kernel(const __grid_constant__ Order1RowsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = __nv_bfloat16;
  using Shared = Order1RowsShared<DP, kCentred>;
  using Traits = Order1RowsTraits<DP, kCentred>;
  constexpr int kStages = Shared::kStages, kSets = Shared::kSets, kPanels = DP / 64;
  constexpr int kColumns = kNarrow ? 32 : 64, kTiles = kColumns / 8;  // of a panel that count
  extern __shared__ __align__(1024) char raw[];  // not a byte to round up: two blocks just fit
  Shared& s = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    barrier_init(&s.moments_full, 1);
    barrier_init_ring(s.full, s.empty, 4 * kPanels);
    if constexpr (!kCentred) s.dots.init();
    barrier_init_done();
  }
  const int head = blockIdx.x / p.chunks, chunk = blockIdx.x - head * p.chunks;
  const int b = head / p.H, h = head - b * p.H, first = chunk * p.tiles * 64;
  const int dim = matrix_dim<DP>(p.D);
  if constexpr (kCentred) {
    const int64_t key_head = static_cast<int64_t>(b) * p.Hk + h / (p.H / p.Hk);
    for (int d = threadIdx.x; d < DP; d += blockDim.x) {
      s.vectors[0][d] = d < p.D ? p.centre[key_head * p.D + d] : 0.f;
      s.vectors[1][d] = d < dim ? p.centre_term[(key_head * 2 + 1) * dim + d] : 0.f;
    }
  }
  __syncthreads();
  const int tiles = uniform(min(p.tiles, (p.N - first + 63) / 64));
  if (warp_index() >= 4 * kPanels) {
    give_registers<Traits::kFew>();
    const int role = warp_index() - 4 * kPanels;
    if (role == 0) {
      fetch_rows(p, s, b, h, first, tiles);
    } else if constexpr (!kCentred) {
      if (p.out != nullptr) make_dots<DP, kNarrow>(s, role - 1, tiles);
    }
    return;
  }
  take_registers<Traits::kMany>();

  const int panel = uniform(threadIdx.x / 128), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row = threadIdx.x / 32 % 4 * 16 + g;
  const int64_t first_row = static_cast<int64_t>(head) * p.N + first;
  float dc[8 * kPanels][4], ds[8 * kPanels][4];
  [[maybe_unused]] float row_sum[kTiles][2] = {};  // of dq, of this thread's rows

  const auto add_sums = [&](int tile) {
    const auto& q = s.q[tile % kStages][panel];
    wgmma_fence();
    multiply_tn<T>(dc, q, s.weighted[tile % kSets][0], tile > 0);
    multiply_tn<T>(ds, q, s.weighted[tile % kSets][1], tile > 0);
    wgmma_commit();
  };
  // Of this thread's rows of the next tile, asked for a tile early: share, and delta, -dlse or,
  // with weighted means, variance, slope and coarse_sum.
  float next[kCentred ? 4 : 2][2];
  [[maybe_unused]] const bool makes_delta = p.out != nullptr;
  [[maybe_unused]] const float* const grad_lse =
      p.grad_lse + b * p.lse_strides.b + h * p.lse_strides.h + first * p.lse_strides.l;
  const auto look_up = [&](int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 64 * tile + row + 8 * half;
      const bool there = tile < tiles && first + i < p.N;
      next[0][half] = there ? p.share[first_row + i] : 0.f;
      if constexpr (kCentred) {
        next[1][half] = there ? p.variance[first_row + i] : 0.f;
        next[2][half] = there ? p.slope[first_row + i] : 0.f;
        next[3][half] = there ? p.coarse_sum[first_row + i] : 0.f;
      } else {
        const bool read = there && panel == 0 && t == 0;
        if (makes_delta) {
          next[1][half] = read && p.grad_lse != nullptr ? -grad_lse[i * p.lse_strides.l] : 0.f;
        } else {
          next[1][half] = read ? p.delta[first_row + i] : 0.f;
        }
      }
    }
  };
  // A tile but for its part of the sums, which the tensor cores add beside the tile behind it.
  const auto walk = [&](int tile, auto first_tile) {
    const int stage = tile % kStages;
    float share[2];  // then, with weighted means, a
    [[maybe_unused]] float b_row[2] = {}, delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      share[half] = next[0][half];
      delta[half] = next[1][half];
      if constexpr (kCentred) {
        const bool any = share[half] != 0.f;
        const float t = next[1][half], gamma = reciprocal_approx(1.f + t / 4);
        const float of_bias = 0.75f * reciprocal_approx(1.f + 0.75f * t) - gamma / 4;
        const float slope = share[half] * next[2][half] * gamma * -0.25f + of_bias * next[3][half];
        b_row[half] = any ? p.scale * p.scale * slope : 0.f;
        share[half] = any ? share[half] * gamma * p.scale : 0.f;
      }
    }
    look_up(tile + 1);
    barrier_wait(&s.full[stage], tile / kStages & 1);
    float x[kTiles][4], w[kTiles][4];
    pin(x);
    pin(w);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kColumns / 16 * kPanels; ++i) {
      Wgmma<T, kColumns>::template multiply<false, false>(
          x, descriptor(s.grad_out[stage][i / 4]) + 2 * (i % 4),
          descriptor(s.moments[0][i / 4][64 * panel]) + 2 * (i % 4), i > 0);
      Wgmma<T, kColumns>::template multiply<false, false>(
          w, descriptor(s.q[stage][i / 4]) + 2 * (i % 4),
          descriptor(s.moments[1][i / 4][64 * panel]) + 2 * (i % 4), i > 0);
    }
    wgmma_commit();
    if constexpr (first_tile) {
      wgmma_wait<0>();
    } else {
      add_sums(tile - 1);
      wgmma_wait<1>();
    }
    pin(x);
    pin(w);
    // The sums of that tile are made, its gradient may still be on its way.
    if (kCentred && tile > 1) arrive_behind_stores(&s.empty[(tile - 2) % kStages]);

    const auto place = [&](uint16_t(&to)[kPanels][64][64], int n, int half) {
      return reinterpret_cast<uint32_t*>(&to[panel][row + 8 * half][(n ^ g) * 8 + 2 * t]);
    };
    [[maybe_unused]] float u[2] = {}, v[2] = {};
    if constexpr (!kCentred) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const float2 q = unpack2(*place(s.q[stage], n, half), T{});
          u[half] += q.x * x[n][2 * half] + q.y * x[n][2 * half + 1];
          v[half] += q.x * w[n][2 * half] + q.y * w[n][2 * half + 1];
        }
        u[half] = quad_sum(u[half]);
        v[half] = quad_sum(v[half]);
        if (kPanels > 1 && t == 0) {
          s.vectors[0][64 * panel + row + 8 * half] = u[half];
          s.vectors[1][64 * panel + row + 8 * half] = v[half];
        }
      }
      if constexpr (!first_tile) {
        wgmma_wait<0>();  // the sums
        arrive_behind_stores(&s.empty[(tile - 1) % kStages]);
      }
      if (makes_delta) barrier_wait(&s.dots.full[stage], tile / kStages & 1);
    }
    consumer_sync<DP>();  // no product reads this tile, or the weighted one before, any more
    if constexpr (kCentred) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int d = 64 * panel + 8 * n + 2 * t;
        const float2 centre = load_pair(&s.vectors[0][d]), less = load_pair(&s.vectors[1][d]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float a = share[half], c = b_row[half];
          const bool any = a != 0.f || c != 0.f;
          uint32_t* const q_at = place(s.q[stage], n, half);
          uint32_t* const grad_at = place(s.grad_out[stage], n, half);
          float2 q = unpack2(*q_at, T{});
          const float2 grad = unpack2(*grad_at, T{});
          q.x -= centre.x, q.y -= centre.y;
          // A row without weight may hold anything.
          *place(s.weighted[tile % kSets][0], n, half) =
              any ? Mma<T>::pack(a * grad.x, a * grad.y) : 0;
          *place(s.weighted[tile % kSets][1], n, half) = any ? Mma<T>::pack(c * q.x, c * q.y) : 0;
          *q_at = any ? Mma<T>::pack(q.x, q.y) : 0;
          float2 dq{};
          if (any) {
            dq.x = a * x[n][2 * half] + 2 * c * (w[n][2 * half] - less.x);
            dq.y = a * x[n][2 * half + 1] + 2 * c * (w[n][2 * half + 1] - less.y);
          }
          row_sum[n][0] += dq.x, row_sum[n][1] += dq.y;
          *grad_at = Mma<T>::pack(dq.x, dq.y);
        }
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 8 * half;
        if constexpr (kPanels > 1) {
          u[half] = s.vectors[0][r] + s.vectors[0][64 + r];
          v[half] = s.vectors[1][r] + s.vectors[1][64 + r];
        }
        const bool any = share[half] != 0.f;
        const float gamma = reciprocal_approx(1.f + p.scale * p.scale / 4 * v[half]);
        const float gu = gamma * p.scale * u[half];
        const float a = any ? share[half] * gamma * p.scale : 0.f;
        const float c = any ? share[half] * gamma * gu * (-p.scale * p.scale / 4) : 0.f;
        if (panel == 0 && t == 0 && first + 64 * tile + r < p.N) {
          const int64_t i = static_cast<int64_t>(head) * p.N + first + 64 * tile + r;
          if (makes_delta) p.delta[i] = delta[half] += s.dots.x[stage][r];
          p.coarse_delta[i] = delta[half] - (any ? gu : 0.f);
        }
        if (!any) {  // it may hold anything
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            *place(s.q[stage], n, half) = *place(s.grad_out[stage], n, half) = 0;
            x[n][2 * half] = x[n][2 * half + 1] = w[n][2 * half] = w[n][2 * half + 1] = 0.f;
          }
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          uint32_t* const grad_at = place(s.grad_out[stage], n, half);
          const float2 q = unpack2(*place(s.q[stage], n, half), T{}), grad = unpack2(*grad_at, T{});
          *place(s.weighted[tile % kSets][0], n, half) = Mma<T>::pack(a * grad.x, a * grad.y);
          *place(s.weighted[tile % kSets][1], n, half) = Mma<T>::pack(c * q.x, c * q.y);
          // The gradient leaves through the place of dO.
          *grad_at = Mma<T>::pack(a * x[n][2 * half] + 2 * c * w[n][2 * half],
                                  a * x[n][2 * half + 1] + 2 * c * w[n][2 * half + 1]);
        }
      }
    }
    fence_for_copies();
    consumer_sync<DP>();
    if (threadIdx.x == 0) {
      for (int i = 0; i < kPanels; ++i) {
        give_panel(p.add, p.grad_q_map, s.grad_out[stage][i], 64 * i, first + 64 * tile, h, b);
      }
      store_commit();
    }
    __syncwarp();
  };
  look_up(0);
  barrier_wait(&s.moments_full, 0);
  walk(0, std::true_type{});
#pragma unroll 1
  for (int tile = 1; tile < tiles; ++tile) walk(tile, std::false_type{});
  add_sums(tiles - 1);
  int keys = 0;
  if (p.sums == nullptr) {
    for (int y = threadIdx.x % 32; y < p.nk; y += 32) {
      keys += p.key_count[static_cast<int64_t>(b) * p.nk + y];
    }
    keys = __reduce_add_sync(kFullWarp, keys);
  }
  wgmma_wait<0>();
  pin(dc);
  pin(ds);
  if (threadIdx.x == 0) store_wait();
  if (blockIdx.x == 0) wait_for_previous();

  if constexpr (kCentred) {
    float* const to = p.row_sums +
                      (static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32 % 4) * p.D +
                      64 * panel + 2 * t;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        row_sum[n][0] += __shfl_xor_sync(kFullWarp, row_sum[n][0], step);
        row_sum[n][1] += __shfl_xor_sync(kFullWarp, row_sum[n][1], step);
      }
      if (g == 0 && 64 * panel + 8 * n + 2 * t < p.D) {
        *reinterpret_cast<float2*>(to + 8 * n) = make_float2(-row_sum[n][0], -row_sum[n][1]);
      }
    }
  }
  if (64 * panel + row >= dim) return;
  const auto store = [&](const float(&c)[8 * kPanels][4], int which) {
    const int64_t matrix = static_cast<int64_t>(blockIdx.x) * 2 + which;
    const float factor = (which == 0 ? 1.f : 2.f) / max(keys, 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = (matrix * dim + 64 * panel + row + 8 * half) * dim + 2 * t;
#pragma unroll
      for (int n = 0; n < 8 * kPanels; ++n) {
        if (8 * n >= dim) break;
        const float u = c[n][2 * half], w = c[n][2 * half + 1];
        if (p.sums != nullptr) {
          *reinterpret_cast<float2*>(p.sums + at + 8 * n) = make_float2(u, w);
        } else {
          reinterpret_cast<uint32_t*>(p.moment_grads)[(at + 8 * n) / 2] =
              Mma<T>::pack(factor * u, factor * w);
        }
      }
    }
  };
  store(dc, 0);
  store(ds, 1);
#endif
}

template <int DP>
cudaError_t launch_order1_rows(const Order1Rows& params, const Device& device,
                               cudaStream_t stream) {
  Order1RowsMaps p{params};
  constexpr Dtype bf16 = Dtype::bf16;
  const bool maps =
      tensor_map(&p.q_map, bf16, p.q, p.q_strides, p.B, p.H, p.N, p.D, 64) &&
      tensor_map(&p.grad_out_map, bf16, p.grad_out, p.grad_out_strides, p.B, p.H, p.N, p.D, 64) &&
      tensor_map(&p.grad_q_map, bf16, p.grad_q, p.grad_q_strides, p.B, p.H, p.N, p.D, 64) &&
      (p.out == nullptr ||
       tensor_map(&p.out_map, bf16, p.out, p.out_strides, p.B, p.H, p.N, p.D, 64)) &&
      matrices_map(&p.moments_map, p.moments, p.B, p.Hk, matrix_dim<DP>(p.D));
  const int64_t blocks = static_cast<int64_t>(p.B) * p.H * p.chunks;
  if (!maps || blocks > INT_MAX) return cudaErrorNotSupported;
  p.tiles = chunk_tiles(p.N, p.chunks, 1);
  const auto launch_form = [&](auto centred, auto narrow) {
    constexpr int kBytes = sizeof(Order1RowsShared<DP, centred()>);
    using Traits = Order1RowsTraits<DP, centred()>;
    static_assert(Traits::kBlocks * (kBytes + 1024) <= 228 * 1024);
    if (kBytes > device.max_smem) return cudaErrorNotSupported;
    return launch_grid(order1_rows_kernel<DP, centred(), narrow()>, blocks, Traits::kThreads,
                       kBytes, stream, Together{p.beside}, p);
  };
  const auto launch = [&](auto narrow) {
    return p.centre != nullptr ? launch_form(std::true_type{}, narrow)
                               : launch_form(std::false_type{}, narrow);
  };
  constexpr bool kCanBeNarrow = DP == 64;
  return p.D <= 32 ? launch(std::bool_constant<kCanBeNarrow>{}) : launch(std::false_type{});
}

}  // namespace mra::cuda::sm90
