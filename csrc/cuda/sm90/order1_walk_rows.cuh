// The order-1 term of the queries, and its gradient. From tiles of 64 queries, with C and Sigma the
// sums over the keys of the units before, n of which count:
//
//   forward    out += P gamma s / n q C,    gamma = 1 / (1 + s^2 / (4 n) q Sigma q^T)
//   backward   as order1_rows.cuh, with C / n and Sigma / n; a / n and b / n go to `weights`
//
// Then the keys of the tile are centred and added to C and Sigma. The steps of weighted means: see
// WalkStep.
#pragma once

#include "order1_walk.cuh"

namespace mra::cuda::sm90 {

struct WalkRowsMaps : WalkRows {
  CUtensorMap k_map, v_map, q_map, grad_out_map, to_map;  // to: out or grad_q
  int tiles;                                              // of a chunk
};

// Whether a step reads dO; of weighted means.
constexpr bool reads_grad(WalkStep step) {
  return step == WalkStep::backward || step == WalkStep::slope || step == WalkStep::gradient;
}
constexpr bool is_weighted(WalkStep step) {
  return step == WalkStep::prepare || step == WalkStep::slope || step == WalkStep::gradient;
}

template <typename T, int DP, WalkStep kStep>
struct WalkRowsShared {
  static constexpr int kPanels = DP / 64, kTensors = reads_grad(kStep) ? 2 : 1;
  static constexpr int kStages = reads_grad(kStep) ? 2 : 3;
  uint16_t matrices[2][kPanels][DP][64];              // C, Sigma
  uint16_t rows[kStages][kTensors][kPanels][64][64];  // q, dO
  KeyTiles<DP, 2, is_weighted(kStep), T> keys;
  float dots[2][kPanels][64];
  float most[2][4 * kPanels];
  uint64_t full[kStages], empty[kStages];
  uint64_t centred[is_weighted(kStep) ? kStages : 1];  // q, by two warps
  int keys_before;
};

template <typename T, int DP, int kBlocks, WalkStep kStep>
__global__ void __launch_bounds__(WalkTraits<DP>::kThreads, WalkTraits<DP>::kBlocks)
    order1_walk_rows_kernel(const __grid_constant__ WalkRowsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Traits = WalkTraits<DP>;
  using Shared = WalkRowsShared<T, DP, kStep>;
  constexpr int kPanels = DP / 64, kStages = Shared::kStages, kLast = Shared::kTensors - 1;
  constexpr bool kGrad = reads_grad(kStep), kWeighted = is_weighted(kStep);
  constexpr bool kPrepare = kStep == WalkStep::prepare, kGradient = kStep == WalkStep::gradient;
  constexpr bool kSlope = kStep == WalkStep::slope;  // leaves numbers of rows alone
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  if (threadIdx.x == 0) {
    s.keys.init(Traits::kConsumers);
    barrier_init_ring(s.full, s.empty, Traits::kConsumers);
    for (auto& barrier : s.centred) barrier_init(&barrier, 2);
    barrier_init_done();
    s.keys_before = 0;
  }
  __syncthreads();
  const Walk at(p, p.tiles);
  const int blocks_before = min(at.first * kBlocks, p.nk);
  int seen = count_keys(p.key_count, p.nk, at.b, blocks_before, s.keys_before);
  const int warp = warp_index();
  if (warp >= Traits::kConsumers) {
    give_registers<Traits::kGiven>();
    if (warp == Traits::kConsumers) {
      // Nothing comes behind the last tile's keys.
      const float* weights = nullptr;
      if constexpr (kWeighted) weights = p.key_weights + (at.key_head * p.nk << p.log2_block_k);
      s.keys.fetch(p.k_map, p.v_map, p.mask, weights, p.N, at.b, at.hk, 64 * at.first,
                   at.tiles - 1);
    } else if (warp == Traits::kConsumers + 1) {
#pragma unroll 1
      for (int turn = 0; turn < at.tiles * at.group; ++turn) {
        const int stage = turn % kStages, tile = turn / at.group;
        const int h = at.hk * at.group + turn - tile * at.group, row = 64 * (at.first + tile);
        if (turn >= kStages) barrier_wait(&s.empty[stage], turn / kStages - 1 & 1);
        barrier_expect(&s.full[stage], Shared::kTensors * 64 * DP * 2);
        if (threadIdx.x % 32 == 0) {
          for (int i = 0; i < kPanels; ++i) {
            copy_panel(s.rows[stage][0][i], p.q_map, &s.full[stage], 64 * i, row, h, at.b);
            if constexpr (kGrad) {
              copy_panel(s.rows[stage][1][i], p.grad_out_map, &s.full[stage], 64 * i, row, h, at.b);
            }
          }
        }
        __syncwarp();
      }
    } else if constexpr (kWeighted) {
#pragma unroll 1
      for (int turn = 0; turn < at.tiles * at.group; ++turn) {
        const int stage = turn % kStages, row = 64 * (at.first + turn / at.group);
        barrier_wait(&s.full[stage], turn / kStages & 1);
        centre_queries<T>(s.rows[stage][0], p, at.b, at.key_head, row,
                          warp - Traits::kConsumers - 2);
        fence_for_copies();
        barrier_arrive(&s.centred[stage]);
      }
    }
    return;
  }
  take_registers<Traits::kTaken>();

  const int panel = uniform(threadIdx.x / 128), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row = threadIdx.x / 32 % 4 * 16 + g;
  WalkedPair<DP> sums;
  sums.load(p.start, at.key_head * p.chunks + at.chunk, matrix_dim<DP>(p.D));
  int turn = 0;
  float of_x = 0.f, of_w = 0.f;  // what products with the matrices in shared memory need

  // One tile of queries of head h.
  const auto walk = [&](int tile, int h) {
    const int stage = turn % kStages;
    const int64_t head = static_cast<int64_t>(at.b) * p.H + h;
    const int first_row = 64 * (at.first + tile);
    auto& q = s.rows[stage][0];
    auto& to = s.rows[stage][kLast];
    // Of this thread's rows: the share or, of gradient, a; delta or b.
    float share[2] = {}, delta[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first_row + row + 8 * half;
      if (kPrepare || i >= p.N) continue;
      share[half] = kGradient ? p.a[head * p.N + i] : p.share[head * p.N + i];
      if (kGrad) delta[half] = kGradient ? p.b[head * p.N + i] : p.delta[head * p.N + i];
    }
    barrier_wait(&s.full[stage], turn / kStages & 1);
    if constexpr (kWeighted) barrier_wait(&s.centred[stage], turn / kStages & 1);
    float x[8][4], w[8][4];
    pin(x);
    pin(w);
    wgmma_fence();
    multiply_columns<T, kGrad>(x, to, s.matrices[0], panel, false);
    multiply_columns<T, true>(w, q, s.matrices[1], panel, false);  // symmetric
    wgmma_commit();
    wgmma_wait<0>();
    pin(x);
    pin(w);
    if (!kSlope && turn > 0) arrive_behind_stores(&s.empty[(turn - 1) % kStages]);

    const auto place = [&](uint16_t(&in)[kPanels][64][64], int n, int half) {
      return reinterpret_cast<uint32_t*>(&in[panel][row + 8 * half][(n ^ g) * 8 + 2 * t]);
    };
    float u[2] = {}, v[2] = {};
#pragma unroll
    for (int half = 0; half < (kGradient ? 0 : 2); ++half) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float2 y = unpack2(*place(q, n, half), T{});
        if (kGrad) u[half] += y.x * x[n][2 * half] + y.y * x[n][2 * half + 1];
        v[half] += y.x * w[n][2 * half] + y.y * w[n][2 * half + 1];
      }
      if (kGrad) u[half] = quad_sum(u[half]);
      v[half] = quad_sum(v[half]);
      if (kPanels > 1 && t == 0) {
        if (kGrad) s.dots[0][panel][row + 8 * half] = u[half];
        s.dots[1][panel][row + 8 * half] = v[half];
      }
    }
    if constexpr (kSlope) barrier_arrive(&s.empty[stage]);
    consumer_sync<DP>();  // no product reads this tile any more
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 8 * half;
      const int i = first_row + r;
      if constexpr (kPanels > 1 && !kGradient) {
        if (kGrad) u[half] = s.dots[0][0][r] + s.dots[0][1][r];
        v[half] = s.dots[1][0][r] + s.dots[1][1][r];
      }
      const float variance = p.scale * p.scale * of_w * v[half];
      const float gamma = 1.f / (1.f + variance / 4);
      bool any = share[half] != 0.f;
      float a = any ? share[half] * gamma * p.scale * of_x : 0.f, c = 0.f;
      if constexpr (kPrepare || kSlope) {
        if (panel == 0 && t == 0 && i < p.N) {
          p.variance[head * p.N + i] = variance;
          p.row_bias[head * p.N + i] = kLn2 * log2_approx(3.f - 2.f * gamma);
        }
      }
      if constexpr (kPrepare) {
        any = true;
        a = gamma * p.scale * of_x;
      }
      if constexpr (kGradient) {
        any = any || delta[half] != 0.f;
        a = share[half] * of_x, c = delta[half] * of_w;
      }
      if constexpr (kStep == WalkStep::backward || kSlope) {
        const float gu = any ? gamma * p.scale * of_x * u[half] : 0.f;
        c = any ? share[half] * gamma * gu * (-p.scale * p.scale / 4) * of_w : 0.f;
        if (panel == 0 && t == 0 && i < p.N) {
          if constexpr (kSlope) p.slope[head * p.N + i] = gu;
          p.coarse_delta[head * p.N + i] = delta[half] - gu;
        }
      }
      if constexpr (kSlope) continue;
      if (kGrad && panel == 0 && t == 0) {
        const int padded = (p.N + 63) / 64 * 64;
        *reinterpret_cast<float2*>(p.weights + 2 * (head * padded + i)) = make_float2(a, c);
      }
      // What leaves takes the place of q or dO. A row without weight may hold anything.
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float2 sum = make_float2(a * x[n][2 * half], a * x[n][2 * half + 1]);
        if constexpr (kGrad) {
          sum.x += 2 * c * w[n][2 * half];
          sum.y += 2 * c * w[n][2 * half + 1];
        }
        if (!any) sum = float2{};
        *place(to, n, half) = Mma<T>::pack(sum.x, sum.y);
        if constexpr (kGradient) x[n][2 * half] = sum.x, x[n][2 * half + 1] = sum.y;
      }
    }
    if constexpr (kGradient) {
      // What the centre of these 16 rows gets is less the sum of what they get.
      const int64_t rows_at =
          head * ((p.N + 63) / 64 * 4) + 4 * (at.first + tile) + threadIdx.x / 32 % 4;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float2 sum = make_float2(x[n][0] + x[n][2], x[n][1] + x[n][3]);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          sum.x += __shfl_xor_sync(kFullWarp, sum.x, step);
          sum.y += __shfl_xor_sync(kFullWarp, sum.y, step);
        }
        const int d = 64 * panel + 8 * n + 2 * t;
        if (g == 0 && d < p.D) {
          *reinterpret_cast<float2*>(p.row_sums + rows_at * p.D + d) = make_float2(-sum.x, -sum.y);
        }
      }
    }
    ++turn;
    if constexpr (kSlope) {
      if (kPanels > 1) consumer_sync<DP>();  // every thread has read `dots`
      return;
    }
    fence_for_copies();
    consumer_sync<DP>();
    if (threadIdx.x == 0) {
      for (int i = 0; i < kPanels; ++i) {
        give_panel(kStep == WalkStep::term || p.add, p.to_map, to[i], 64 * i, first_row, h, at.b);
      }
      store_commit();
    }
    __syncwarp();
  };

#pragma unroll 1
  for (int tile = 0;; ++tile) {
    if ((at.first + tile) % p.unit_tiles == 0) {
      float factors[2] = {1.f, 1.f};
      if constexpr (std::is_same_v<T, __half>) sums.fit(s.most, factors);
      sums.template place<T>(s.matrices, factors[0], factors[1]);
      fence_for_copies();  // products read shared memory as copies do
      const float over_n = 1.f / static_cast<float>(max(seen, 1));
      of_x = over_n / factors[0], of_w = over_n / factors[1];
    }
    consumer_sync<DP>();
#pragma unroll 1
    for (int i = 0; i < at.group; ++i) walk(tile, at.hk * at.group + i);
    if (tile == at.tiles - 1) break;

    const int stage = tile % 2;
    barrier_wait(&s.keys.full[stage], tile / 2 & 1);
    seen += centre<kBlocks, kWeighted, false, kWeighted>(s.keys, stage, threadIdx.x / 32);
    fence_for_copies();
    consumer_sync<DP>();
    const auto& x = s.keys.x[stage];
    sums.pin_both();
    wgmma_fence();
    multiply_tn<T>(sums.first, x[0][panel], x[1], true);
    multiply_tn<T>(sums.second, x[0][panel], x[0], true);
    wgmma_commit();
    wgmma_wait<0>();
    sums.pin_both();
    barrier_arrive(&s.keys.empty[stage]);
  }
  if (threadIdx.x == 0) store_wait();
#endif
}

template <typename T, int DP, WalkStep kStep>
cudaError_t launch_order1_walk_rows_of(WalkRowsMaps& p, const Device& device, cudaStream_t stream) {
  constexpr int kBytes = sizeof(WalkRowsShared<T, DP, kStep>) + 1024;
  const int64_t blocks = static_cast<int64_t>(p.B) * p.Hk * p.chunks;
  if (kBytes > device.max_smem || blocks > INT_MAX) return cudaErrorNotSupported;
  const auto kernel = p.log2_block_k == 6   ? order1_walk_rows_kernel<T, DP, 1, kStep>
                      : p.log2_block_k == 5 ? order1_walk_rows_kernel<T, DP, 2, kStep>
                                            : order1_walk_rows_kernel<T, DP, 4, kStep>;
  return launch_grid(kernel, blocks, WalkTraits<DP>::kThreads, kBytes, stream, p);
}

template <int DP>
cudaError_t launch_order1_walk_rows(const WalkRows& params, const Device& device,
                                    cudaStream_t stream) {
  WalkRowsMaps p{params};
  const bool grad = reads_grad(p.step);
  const auto map = [&](CUtensorMap* to, const void* data, const Strides& strides, int heads) {
    return tensor_map(to, p.dtype, data, strides, p.B, heads, p.N, p.D, 64);
  };
  const bool slope = p.step == WalkStep::slope;
  const bool maps = map(&p.k_map, p.k, p.k_strides, p.Hk) &&
                    map(&p.v_map, p.v, p.v_strides, p.Hk) && map(&p.q_map, p.q, p.q_strides, p.H) &&
                    (!grad || map(&p.grad_out_map, p.grad_out, p.grad_out_strides, p.H)) &&
                    (slope || map(&p.to_map, grad ? p.grad_q : p.out,
                                  grad ? p.grad_q_strides : p.out_strides, p.H));
  const bool half = p.dtype == Dtype::f16;
  if (!maps || p.dtype == Dtype::f32 || (half && grad)) return cudaErrorNotSupported;
  p.tiles = chunk_tiles(p.N, p.chunks, p.unit_tiles);
  const auto launch = [&](auto t, auto step) {
    return launch_order1_walk_rows_of<decltype(t), DP, step()>(p, device, stream);
  };
  using Term = std::integral_constant<WalkStep, WalkStep::term>;
  using Backward = std::integral_constant<WalkStep, WalkStep::backward>;
  using Prepare = std::integral_constant<WalkStep, WalkStep::prepare>;
  using Slope = std::integral_constant<WalkStep, WalkStep::slope>;
  using Gradient = std::integral_constant<WalkStep, WalkStep::gradient>;
  switch (p.step) {
    case WalkStep::backward:
      return launch(__nv_bfloat16{}, Backward{});
    case WalkStep::slope:
      return launch(__nv_bfloat16{}, Slope{});
    case WalkStep::gradient:
      return launch(__nv_bfloat16{}, Gradient{});
    case WalkStep::prepare:
      return half ? launch(__half{}, Prepare{}) : launch(__nv_bfloat16{}, Prepare{});
    default:
      return half ? launch(__half{}, Term{}) : launch(__nv_bfloat16{}, Term{});
  }
}

}  // namespace mra::cuda::sm90
