// The order-1 term of the queries, and its gradient. From tiles of 64 queries, with C and Sigma the
// sums over the keys of the units before, n of which count:
//
//   forward    out += P gamma s / n q C,    gamma = 1 / (1 + s^2 / (4 n) q Sigma q^T)
//   backward   as order1_rows.cuh, with C / n and Sigma / n; a / n and b / n go to `weights`
//
// Then the keys of the tile are centred and added to C and Sigma.
#pragma once

#include "order1_walk.cuh"

namespace mra::cuda::sm90 {

struct WalkRowsMaps : WalkRows {
  CUtensorMap k_map, v_map, q_map, grad_out_map, to_map;  // to: out or grad_q
  int tiles;                                              // of a chunk
};

template <typename T, int DP, bool kBackward>
struct WalkRowsShared {
  static constexpr int kPanels = DP / 64, kTensors = kBackward ? 2 : 1;
  static constexpr int kStages = kBackward ? 2 : 3;
  uint16_t matrices[2][kPanels][DP][64];              // C, Sigma
  uint16_t rows[kStages][kTensors][kPanels][64][64];  // q, dO
  KeyTiles<DP, 2, false, T> keys;
  float dots[2][kPanels][64];
  float most[2][4 * kPanels];
  uint64_t full[kStages], empty[kStages];
  int keys_before;
};

template <typename T, int DP, int kBlocks, bool kBackward>
__global__ void __launch_bounds__(WalkTraits<DP>::kThreads, WalkTraits<DP>::kBlocks)
    order1_walk_rows_kernel(const __grid_constant__ WalkRowsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Traits = WalkTraits<DP>;
  using Shared = WalkRowsShared<T, DP, kBackward>;
  constexpr int kPanels = DP / 64, kStages = Shared::kStages, kLast = Shared::kTensors - 1;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  if (threadIdx.x == 0) {
    s.keys.init(Traits::kConsumers);
    barrier_init_ring(s.full, s.empty, Traits::kConsumers);
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
      s.keys.fetch(p.k_map, p.v_map, p.mask, nullptr, p.N, at.b, at.hk, 64 * at.first,
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
            if constexpr (kBackward) {
              copy_panel(s.rows[stage][1][i], p.grad_out_map, &s.full[stage], 64 * i, row, h, at.b);
            }
          }
        }
        __syncwarp();
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
    float share[2], delta[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first_row + row + 8 * half;
      share[half] = i < p.N ? p.share[head * p.N + i] : 0.f;
      if (kBackward && i < p.N) delta[half] = p.delta[head * p.N + i];
    }
    barrier_wait(&s.full[stage], turn / kStages & 1);
    float x[8][4], w[8][4];
    pin(x);
    pin(w);
    wgmma_fence();
    multiply_columns<T, kBackward>(x, to, s.matrices[0], panel, false);
    multiply_columns<T, true>(w, q, s.matrices[1], panel, false);  // symmetric
    wgmma_commit();
    wgmma_wait<0>();
    pin(x);
    pin(w);
    if (turn > 0) arrive_behind_stores(&s.empty[(turn - 1) % kStages]);

    const auto place = [&](uint16_t(&in)[kPanels][64][64], int n, int half) {
      return reinterpret_cast<uint32_t*>(&in[panel][row + 8 * half][(n ^ g) * 8 + 2 * t]);
    };
    float u[2] = {}, v[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float2 y = unpack2(*place(q, n, half), T{});
        if (kBackward) u[half] += y.x * x[n][2 * half] + y.y * x[n][2 * half + 1];
        v[half] += y.x * w[n][2 * half] + y.y * w[n][2 * half + 1];
      }
      if (kBackward) u[half] = quad_sum(u[half]);
      v[half] = quad_sum(v[half]);
      if (kPanels > 1 && t == 0) {
        if (kBackward) s.dots[0][panel][row + 8 * half] = u[half];
        s.dots[1][panel][row + 8 * half] = v[half];
      }
    }
    consumer_sync<DP>();  // no product reads this tile any more
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 8 * half;
      if constexpr (kPanels > 1) {
        if (kBackward) u[half] = s.dots[0][0][r] + s.dots[0][1][r];
        v[half] = s.dots[1][0][r] + s.dots[1][1][r];
      }
      const bool any = share[half] != 0.f;
      const float gamma = 1.f / (1.f + p.scale * p.scale / 4 * of_w * v[half]);
      const float a = any ? share[half] * gamma * p.scale * of_x : 0.f;
      float c = 0.f;
      if constexpr (kBackward) {
        const float gu = gamma * p.scale * of_x * u[half];
        c = any ? share[half] * gamma * gu * (-p.scale * p.scale / 4) * of_w : 0.f;
        if (panel == 0 && t == 0) {
          const int i = first_row + r, padded = (p.N + 63) / 64 * 64;
          *reinterpret_cast<float2*>(p.weights + 2 * (head * padded + i)) = make_float2(a, c);
          if (i < p.N) p.coarse_delta[head * p.N + i] = delta[half] - (any ? gu : 0.f);
        }
      }
      // What leaves takes the place of q or dO. A row without weight may hold anything.
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float2 sum = make_float2(a * x[n][2 * half], a * x[n][2 * half + 1]);
        if constexpr (kBackward) {
          sum.x += 2 * c * w[n][2 * half];
          sum.y += 2 * c * w[n][2 * half + 1];
        }
        *place(to, n, half) = any ? Mma<T>::pack(sum.x, sum.y) : 0;
      }
    }
    fence_for_copies();
    consumer_sync<DP>();
    if (threadIdx.x == 0) {
      for (int i = 0; i < kPanels; ++i) {
        give_panel(!kBackward, p.to_map, to[i], 64 * i, first_row, h, at.b);
      }
      store_commit();
    }
    __syncwarp();
    ++turn;
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
    seen += centre<kBlocks, false, false>(s.keys, stage, threadIdx.x / 32);
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

template <typename T, int DP, bool kBackward>
cudaError_t launch_order1_walk_rows_of(WalkRowsMaps& p, const Device& device, cudaStream_t stream) {
  constexpr int kBytes = sizeof(WalkRowsShared<T, DP, kBackward>) + 1024;
  const int64_t blocks = static_cast<int64_t>(p.B) * p.Hk * p.chunks;
  if (kBytes > device.max_smem || blocks > INT_MAX) return cudaErrorNotSupported;
  const auto kernel = p.log2_block_k == 6   ? order1_walk_rows_kernel<T, DP, 1, kBackward>
                      : p.log2_block_k == 5 ? order1_walk_rows_kernel<T, DP, 2, kBackward>
                                            : order1_walk_rows_kernel<T, DP, 4, kBackward>;
  return launch_grid(kernel, blocks, WalkTraits<DP>::kThreads, kBytes, stream, p);
}

template <int DP>
cudaError_t launch_order1_walk_rows(const WalkRows& params, const Device& device,
                                    cudaStream_t stream) {
  WalkRowsMaps p{params};
  const bool backward = p.grad_out != nullptr;
  const auto map = [&](CUtensorMap* to, const void* data, const Strides& strides, int heads) {
    return tensor_map(to, p.dtype, data, strides, p.B, heads, p.N, p.D, 64);
  };
  const bool maps = map(&p.k_map, p.k, p.k_strides, p.Hk) &&
                    map(&p.v_map, p.v, p.v_strides, p.Hk) && map(&p.q_map, p.q, p.q_strides, p.H) &&
                    (backward ? map(&p.grad_out_map, p.grad_out, p.grad_out_strides, p.H) &&
                                    map(&p.to_map, p.grad_q, p.grad_q_strides, p.H)
                              : map(&p.to_map, p.out, p.out_strides, p.H));
  const bool half = p.dtype == Dtype::f16;
  if (!maps || p.dtype == Dtype::f32 || (half && backward)) {
    return cudaErrorNotSupported;
  }
  p.tiles = chunk_tiles(p.N, p.chunks, p.unit_tiles);
  if (half) return launch_order1_walk_rows_of<__half, DP, false>(p, device, stream);
  return backward ? launch_order1_walk_rows_of<__nv_bfloat16, DP, true>(p, device, stream)
                  : launch_order1_walk_rows_of<__nv_bfloat16, DP, false>(p, device, stream);
}

}  // namespace mra::cuda::sm90
