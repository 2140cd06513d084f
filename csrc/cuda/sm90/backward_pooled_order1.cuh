// All that the backward pass with weighted means makes of a row but fine's part, from one reading
// of q, dO and o, for up to 64 pooled keys y; kappa the query less the centre:
//
//   delta = dO.o - dlse     x = dO C^T,  w = kappa Sigma
//   u = s x.kappa,  t = s^2 w.kappa,  gamma = 1 / (1 + t / 4)
//   dl_y = p_y (dO.v_y - delta + gamma u),   a, b of gamma, u and the sum of dl (RowWeightsParams)
//   dq = s sum_y dl_y k_y + a x + 2 b w
//   sums over rows of  q dl_y,  dO p_y,  dO^T (a kappa),  kappa^T (b kappa)
//
// Persistent blocks of threads walk chunks of heads. Two warpgroups attend tiles of 64 rows in
// turns, the third adds up what they leave in shared memory; of four warps one fetches, one looks
// up which pooled keys a tile doesn't see and what is known of its rows, and two sum the columns of
// dq and of the logits' gradients.
#pragma once

#include <climits>

#include "backward_pooled_order1_rows.cuh"
#include "moments.h"

namespace mra::cuda::sm90 {

// What the third warpgroup does: sums over the rows of an item.
template <int kKeys>
struct PooledOrder1Sums {
  using T = __nv_bfloat16;
  using Shared = PooledOrder1Shared<kKeys>;

  const PooledOrder1Maps& p;
  Shared& s;
  // Transposed, this warp's sixteen columns of sixteen rows: of a panel the first ones' address.
  const int columns = transposed_columns(threadIdx.x / 32 % 4);
  // dC, dSigma; gradients of pooled keys and values, transposed.
  float dc[8][4], ds[8][4], dk[kKeys / 8][4], dv[kKeys / 8][4];

  __device__ __forceinline__ void start_item() {
#pragma unroll
    for (int i = 0; i < 32; ++i) dc[i / 4][i % 4] = ds[i / 4][i % 4] = 0.f;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) dk[i / 4][i % 4] = dv[i / 4][i % 4] = 0.f;
  }

  // The `count`th tile, sixteen rows after sixteen.
  __device__ __forceinline__ void add(int count) {
    const int stage = uniform(count % Shared::kStages), team = uniform(count % 2);
    const auto& q = s.rows[stage][0];
    const auto& grad_out = s.rows[stage][1];
    const auto& row_weights = s.row_weights[team];
    constexpr int kSteps = kKeys == 32 ? 2 : 1;  // at once, as there are registers
    const int t = threadIdx.x % 4;
    barrier_wait(&s.weights_full[team], count / 2 & 1);
#pragma unroll
    for (int first = 0; first < 4; first += kSteps) {
      uint32_t kappa[kSteps][4], of_c[kSteps][4], of_sigma[kSteps][4];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int k = first + i;
        ldmatrix_x4<true>(kappa[i], smem_address(q) + 2048 * k + columns);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = 16 * k + j / 2 * 8 + 2 * t;
          const float2 a = load_pair(&row_weights[0][row]), b = load_pair(&row_weights[1][row]);
          const float2 own = unpack2(kappa[i][j], T{});
          of_c[i][j] = Mma<T>::pack(a.x * own.x, a.y * own.y);
          of_sigma[i][j] = Mma<T>::pack(b.x * own.x, b.y * own.y);
        }
      }
      pin(dc);
      pin(ds);
      pin(dk);
      pin(dv);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int rows = 128 * (first + i);
        const uint64_t weights =  // in one panel from column 32 on, or in another
            descriptor(s.weights[team][kKeys / 32 - 1], 16, rows + (kKeys == 32 ? 4 : 0));
        const uint64_t grads = descriptor(grad_out, 16, rows);
        Wgmma<T, kKeys>::multiply_pn(dk, kappa[i], descriptor(s.weights[team][0], 16, rows));
        Wgmma<T, kKeys>::template multiply<true, true>(dv, grads, weights, 1);
        Wgmma<T, 64>::multiply_pn(dc, of_c[i], grads);
        Wgmma<T, 64>::multiply_pn(ds, of_sigma[i], descriptor(q, 16, rows));
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin(dc);
      pin(ds);
      pin(dk);
      pin(dv);
    }
    barrier_arrive(&s.weights_empty[team]);
    barrier_arrive(&s.empty[stage]);
  }

  __device__ __forceinline__ void end_item(const PooledOrder1Item& at, int item, int slot,
                                           int turn) {
    const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int thread = threadIdx.x % 128, dim = matrix_dim<64>(p.D), group = p.H / p.Hk;
    int keys = 0;
    if (p.matrix_sums == nullptr) {
      for (int y = threadIdx.x % 32; y < p.nk; y += 32) {
        keys += p.key_count[static_cast<int64_t>(at.b) * p.nk + y];
      }
      keys = __reduce_add_sync(kFullWarp, keys);
    }
    const int64_t key_head = static_cast<int64_t>(at.b) * p.Hk + at.hk;
    const int64_t part = at.h % group * p.chunks + at.chunk;
    const int64_t share = (part * p.B * p.Hk + key_head) * p.nk;
    barrier_wait(&s.summed[slot], turn / 2 & 1);
    const auto& mass_grads = s.mass_grads[slot];
    if (thread < p.D) {
      // dq less what came of the logits.
      float sum = s.dq_sums[slot][thread];
      for (int y = 0; y < p.nk; ++y) {
        const uint16_t key = s.k[slot][0][y][(thread / 8 ^ y % 8) * 8 + thread % 8];
        sum -= p.scale * mass_grads[y] * __uint_as_float(static_cast<uint32_t>(key) << 16);
      }
      p.row_sums[static_cast<int64_t>(item) * p.D + thread] = -sum;
    }
    if (thread < p.nk) p.pooled_mass_grads[share + thread] = mass_grads[thread];
    const float centre[2] = {s.centre[slot][row], s.centre[slot][row + 8]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const to_k = p.pooled_grad_k + share * p.D + row + 8 * half;
      float* const to_v = p.pooled_grad_v + share * p.D + row + 8 * half;
      if (row + 8 * half >= p.D) continue;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int y = 8 * n + 2 * t + e;
          if (y >= p.nk) continue;
          to_k[y * p.D] = p.scale * (dk[n][2 * half + e] + mass_grads[y] * centre[half]);
          to_v[y * p.D] = dv[n][2 * half + e];
        }
      }
    }
    barrier_arrive(&s.item_empty[slot]);
    if (p.matrix_sums != nullptr) {
      store_matrices(
          p.matrix_sums + static_cast<int64_t>(item) * 2 * dim * dim, row, t, dim,
          [](float x, float) { return x; }, 1.f);
    } else {
      store_matrices(
          static_cast<T*>(p.moment_grads) + static_cast<int64_t>(item) * 2 * dim * dim, row, t, dim,
          [](float x, float factor) { return __float2bfloat16(factor * x); }, 1.f / max(keys, 1));
    }
  }

  // dC and dSigma, [2, dim, dim], of which the latter is quadratic.
  template <typename Element, class F>
  __device__ __forceinline__ void store_matrices(Element* to, int row, int t, int dim, F element,
                                                 float factor) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int d = row + 8 * half;
      if (d >= dim) continue;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        if (8 * n >= dim) break;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + 2 * t + e, i = 2 * half + e;
          to[d * dim + column] = element(dc[n][i], factor);
          to[(dim + d) * dim + column] = element(ds[n][i], 2 * factor);
        }
      }
    }
  }
};

template <int kKeys>
__global__ void __launch_bounds__(PooledOrder1Traits<kKeys>::kThreads, 1)
    backward_pooled_order1_kernel(const __grid_constant__ PooledOrder1Maps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Traits = PooledOrder1Traits<kKeys>;
  constexpr int kTeams = Traits::kTeams;
  extern __shared__ char raw[];
  auto& s = aligned<PooledOrder1Shared<kKeys>>(raw);
  if (threadIdx.x == 0) s.init();
  // Beyond the columns that there are.
  for (int d = threadIdx.x; d < 128; d += blockDim.x) {
    s.centre[d / 64][d % 64] = s.centre_sigma[d / 64][d % 64] = 0.f;
  }
  fence_for_copies();
  __syncthreads();
  const int group = uniform(threadIdx.x / 128);
  if (group > kTeams) {
    give_registers<Traits::kFewRegisters>();
    const int role = warp_index() - 4 * (kTeams + 1);
    if (role == 0) {
      fetch_rows(p, s);
    } else if (role == 1) {
      look_up(p, s);
    } else if (role == 2) {
      sum_items<true>(p, s);
    } else {
      sum_items<false>(p, s);
    }
    return;
  }
  int before = 0, turn = 0;
  if (group == kTeams) {
    take_registers<Traits::kSumRegisters>();
    PooledOrder1Sums<kKeys> sums{p, s};
#pragma unroll 1
    for (int item = blockIdx.x; item < p.items; item += gridDim.x, ++turn) {
      const PooledOrder1Item at(p, item);
      const int tiles = uniform(at.tiles), slot = turn % 2;
      barrier_wait(&s.item_full[slot], turn / 2 & 1);
      sums.start_item();
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) sums.add(before + tile);
      sums.end_item(at, item, slot, turn);
      before += tiles;
    }
    return;
  }
  take_registers<Traits::kRowRegisters>();
  PooledOrder1Rows<kKeys> rows{p, s, group};
#pragma unroll 1
  for (int item = blockIdx.x; item < p.items; item += gridDim.x, ++turn) {
    const PooledOrder1Item at(p, item);
    const int tiles = uniform(at.tiles), slot = uniform(turn % 2);
    barrier_wait(&s.item_full[slot], turn / 2 & 1);
#pragma unroll 1
    for (int tile = (group + before) % 2; tile < tiles; tile += 2) {
      rows.attend(at, slot, tile, uniform(before + tile));
    }
    barrier_arrive(&s.item_empty[slot]);
    before += tiles;
  }
  if (threadIdx.x % 32 == 0) store_wait();
#endif
}

template <int DP>
cudaError_t launch_backward_pooled_order1(const PooledOrder1& params, const Device& device,
                                          cudaStream_t stream) {
  static_assert(DP == 64 && kPooledOrder1Keys == 64);
  if (params.nk > kPooledOrder1Keys || params.list_rows % 32 != 0) return cudaErrorNotSupported;
  PooledOrder1Maps p{params};
  constexpr Dtype bf16 = Dtype::bf16;
  const int keys = p.nk <= 32 ? 32 : 64;
  const auto map = [&](CUtensorMap* to, const void* data, const Strides& strides, int rows) {
    return tensor_map(to, bf16, data, strides, p.B, p.H, p.rows, p.D, rows);
  };
  const auto keys_map = [&](CUtensorMap* to, const void* data) {
    return means_map(to, bf16, data, p.B, p.Hk, p.nk, p.D, keys);
  };
  const bool maps = map(&p.q_map, p.q, p.q_strides, 64) &&
                    map(&p.grad_out_map, p.grad_out, p.grad_out_strides, 64) &&
                    map(&p.out_map, p.out, p.out_strides, 64) &&
                    map(&p.grad_q_map, p.grad_q, p.grad_q_strides, 16) &&
                    keys_map(&p.k_map, p.pooled_k) && keys_map(&p.v_map, p.pooled_v) &&
                    matrices_map(&p.moments_map, p.moments, p.B, p.Hk, matrix_dim<DP>(p.D));
  const int64_t items = static_cast<int64_t>(p.B) * p.H * p.chunks;
  if (!maps || items > INT_MAX) return cudaErrorNotSupported;
  p.items = static_cast<int>(items);
  p.tiles = chunk_tiles(p.rows, p.chunks, 1);
  const auto launch = [&](auto count) {
    constexpr int kKeys = count(), kBytes = sizeof(PooledOrder1Shared<kKeys>) + 1024;
    if (kBytes > device.max_smem) return cudaErrorNotSupported;
    return launch_grid(backward_pooled_order1_kernel<kKeys>, std::min(p.items, device.sms),
                       PooledOrder1Traits<kKeys>::kThreads, kBytes, stream, p);
  };
  return keys == 32 ? launch(std::integral_constant<int, 32>{})
                    : launch(std::integral_constant<int, 64>{});
}

}  // namespace mra::cuda::sm90
