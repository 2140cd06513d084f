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
// turns, the third adds up what they leave in shared memory, one warp fetches, and one looks up
// which pooled keys a tile doesn't see.
#pragma once

#include <climits>

#include "backward_pooled_order1_tiles.cuh"

namespace mra::cuda::sm90 {

// What one warpgroup does with its tiles.
template <int kKeys>
struct PooledOrder1Rows {
  using T = __nv_bfloat16;
  using Shared = PooledOrder1Shared<kKeys>;
  static constexpr int kHalves = kKeys / 32;  // 32 pooled keys are attended at once

  const PooledOrder1Maps& p;
  Shared& s;
  const int team, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row = threadIdx.x / 32 % 4 * 16 + g;
  const WarpRows warp_rows{};
  float row_sum[8][2], mass_grad[4 * kHalves][2];  // of this thread's rows

  __device__ __forceinline__ void start_item() {
#pragma unroll
    for (auto& x : row_sum) x[0] = x[1] = 0.f;
#pragma unroll
    for (auto& x : mass_grad) x[0] = x[1] = 0.f;
  }

  // The `count`th tile of this block of threads, of the item at `slot`; before it this team had the
  // one two before, if there was one.
  __device__ __forceinline__ void attend(const PooledOrder1Item& at, int slot, int tile,
                                         int count) {
    const int stage = count % Shared::kStages, first = at.first + 64 * tile + row;
    const int64_t i = static_cast<int64_t>(at.head) * p.rows + first;
    auto& q = s.rows[stage][0];
    auto& grad_out = s.rows[stage][1];
    auto& out = s.rows[stage][2];
    auto& to = s.weighted[team];
    float share[2], lse[2], delta[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool there = first + 8 * half < p.rows;
      share[half] = there ? p.share[i + 8 * half] : 0.f;
      lse[half] = there ? p.lse[i + 8 * half] : 0.f;
      if (there && p.grad_lse != nullptr && t == 0) {
        delta[half] = -p.grad_lse[at.b * p.lse_strides.b + at.h * p.lse_strides.h +
                                  (first + 8 * half) * p.lse_strides.l];
      }
    }
    barrier_wait(&s.full[stage], count / Shared::kStages & 1);
    float x[8][4], w[8][4], c[4][4], dl[4][4];
    pin(x);
    pin(w);
    wgmma_fence();
    multiply_matrix<T, true>(x, grad_out, s.moments[slot][0], 0, false);
    multiply_matrix<T, true>(w, q, s.moments[slot][1], 0, false);
    wgmma_commit();
    const auto start_logits = [&](int half) {
      using Keys = const uint16_t(&)[1][32][64];
      pin(c);
      pin(dl);
      wgmma_fence();
      multiply_nt<T>(c, q, reinterpret_cast<Keys>(s.k[slot][0][32 * half]));
      multiply_nt<T>(dl, grad_out, reinterpret_cast<Keys>(s.v[slot][0][32 * half]));
      wgmma_commit();
    };
    start_logits(0);
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      uint32_t grads[4], outs[4];
      warp_rows.load(grads, grad_out, 8 * n);
      warp_rows.load(outs, out, 8 * n);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 grad = unpack2(grads[j], T{}), o = unpack2(outs[j], T{});
        delta[j % 2] += grad.x * o.x + grad.y * o.y;
      }
    }
    wgmma_wait<1>();
    pin(x);
    pin(w);
    if (count >= 2) {  // the gradient of this team's tile before has left its place
      if (threadIdx.x % 32 == 0) store_wait();
      barrier_arrive(&s.empty[(count - 2) % Shared::kStages]);
    }

    uint32_t kappa[4][4];
    float u[2] = {}, v[2] = {};
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      warp_rows.load(kappa[n / 2], q, 8 * n);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int m = n + j / 2, half = j % 2, d = 8 * m + 2 * t;
        const float2 centre = load_pair(&s.centre[slot][d]);
        const float2 less = load_pair(&s.centre_sigma[slot][d]);
        float2 own = unpack2(kappa[n / 2][j], T{});
        own.x -= centre.x, own.y -= centre.y;
        w[m][2 * half] -= less.x, w[m][2 * half + 1] -= less.y;
        u[half] += own.x * x[m][2 * half] + own.y * x[m][2 * half + 1];
        v[half] += own.x * w[m][2 * half] + own.y * w[m][2 * half + 1];
        kappa[n / 2][j] = Mma<T>::pack(own.x, own.y);
      }
    }
    // Of either row: delta of coarse keys, what the logits are less, in log2 units.
    float coarse_delta[2], shift[2], a[2], b[2], b_of_sum[2];
    bool any[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      any[half] = share[half] != 0.f;
      delta[half] = quad_sum(delta[half]);
      const float scale2 = p.scale * p.scale, variance = scale2 * quad_sum(v[half]);
      const float gamma = reciprocal_approx(1.f + variance / 4);
      const float slope = gamma * p.scale * quad_sum(u[half]);
      coarse_delta[half] = delta[half] - slope;
      a[half] = any[half] ? share[half] * gamma * p.scale : 0.f;
      b[half] = any[half] ? a[half] * slope * p.scale * -0.25f : 0.f;
      b_of_sum[half] =
          any[half] ? scale2 * (0.75f * reciprocal_approx(1.f + 0.75f * variance) - gamma / 4)
                    : 0.f;
      shift[half] = lse[half] * kLog2e - log2_approx(3.f - 2.f * gamma);
      if (t == half && first + 8 * half < p.rows) p.made_delta[i + 8 * half] = delta[half];
    }

    if (count >= 2) barrier_wait(&s.weighted_empty[team], count / 2 - 1 & 1);
    uint32_t grads[2 * kHalves][4];  // of logits, times the scale
    float coarse_sum[2] = {};
#pragma unroll
    for (int part = 0; part < kHalves; ++part) {
      if (part > 0) start_logits(part);
      wgmma_wait<0>();
      pin(c);
      pin(dl);
      const uint32_t unseen = s.unseen[stage][row / 32][part] >> 2 * t;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 bias = load_pair(&s.bias[slot][32 * part + 8 * n + 2 * t]);
        float l[2] = {bias.x, bias.y};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (unseen >> (8 * n + e) & 1) l[e] = -INFINITY;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& weight = c[n][2 * half + e];
            float& grad = dl[n][2 * half + e];
            // A row without weight may hold anything.
            weight =
                any[half] ? exp2_approx(fmaf(weight, p.scale * kLog2e, l[e] - shift[half])) : 0.f;
            grad = any[half] ? weight * (grad - coarse_delta[half]) : 0.f;
            mass_grad[4 * part + n][e] += grad;
            coarse_sum[half] += grad;
            grad *= p.scale;
          }
        }
      }
      uint32_t weights[2][4];
      pack<T>(weights, c);
      pack<T>(reinterpret_cast<uint32_t(&)[2][4]>(grads[2 * part]), dl);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        warp_rows.store(to[2], 32 * part + 16 * j, grads[2 * part + j]);
        warp_rows.store(to[kHalves + 1], (kHalves == 1 ? 32 : 32 * part) + 16 * j, weights[j]);
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) b[half] += b_of_sum[half] * quad_sum(coarse_sum[half]);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2;
        x[n][e] = any[half] ? a[half] * x[n][e] + 2 * b[half] * w[n][e] : 0.f;
      }
      row_sum[n][0] += x[n][0] + x[n][2], row_sum[n][1] += x[n][1] + x[n][3];
    }
    pin(x);
    wgmma_fence();
    multiply_pn<T>(x, grads, s.k[slot]);
    wgmma_commit();

    group_sync(team);  // the other warps' products with this tile are made
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      uint32_t of_c[4], of_sigma[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int half = j % 2;
        if (!any[half]) kappa[n / 2][j] = 0;
        const float2 own = unpack2(kappa[n / 2][j], T{});
        of_c[j] = Mma<T>::pack(a[half] * own.x, a[half] * own.y);
        of_sigma[j] = Mma<T>::pack(b[half] * own.x, b[half] * own.y);
      }
      warp_rows.store(q, 8 * n, kappa[n / 2]);
      warp_rows.store(to[0], 8 * n, of_c);
      warp_rows.store(to[1], 8 * n, of_sigma);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (any[half]) continue;
      for (int n = 0; n < 8; ++n) {
        *reinterpret_cast<uint32_t*>(&grad_out[0][row + 8 * half][(n ^ g) * 8 + 2 * t]) = 0;
      }
    }
    fence_for_copies();
    barrier_arrive(&s.weighted_full[team]);

    wgmma_wait<0>();
    pin(x);
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      uint32_t grad[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        grad[j] = Mma<T>::pack(x[n + j / 2][j % 2 * 2], x[n + j / 2][j % 2 * 2 + 1]);
      }
      warp_rows.store(out, 8 * n, grad);
    }
    fence_for_copies();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      store_panel(p.grad_q_map, &out[0][row / 16 * 16][0], 0, at.first + 64 * tile + row / 16 * 16,
                  at.h, at.b);
      store_commit();
    }
    __syncwarp();
  }

  // Leaves its sums for the third warpgroup.
  __device__ __forceinline__ void end_item(int slot) {
    const int warp = threadIdx.x / 32;
    const auto leave = [&](auto& sums, float* to) {
#pragma unroll
      for (auto& pair : sums) {
#pragma unroll
        for (float& sum : pair) {
#pragma unroll
          for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
        }
        if (g == 0) *reinterpret_cast<float2*>(to + 2 * t) = make_float2(pair[0], pair[1]);
        to += 8;
      }
    };
    leave(row_sum, s.row_sums[slot][warp]);
    leave(mass_grad, s.mass_grads[slot][warp]);
    barrier_arrive(&s.summed[slot]);
    barrier_arrive(&s.item_empty[slot]);
  }
};

// What the third warpgroup does: sums over the rows of an item.
template <int kKeys>
struct PooledOrder1Sums {
  using T = __nv_bfloat16;
  using Shared = PooledOrder1Shared<kKeys>;

  const PooledOrder1Maps& p;
  Shared& s;
  // dC transposed; dSigma; gradients of pooled keys and values, transposed.
  float dc[8][4], ds[8][4], dk[kKeys / 8][4], dv[kKeys / 8][4];

  __device__ __forceinline__ void add(int count, bool more) {
    const int stage = uniform(count % Shared::kStages), team = uniform(count % 2);
    const auto& q = s.rows[stage][0][0];
    const auto& grad_out = s.rows[stage][1][0];
    const auto& from = s.weighted[team];
    barrier_wait(&s.weighted_full[team], count / 2 & 1);
    pin(dc);
    pin(ds);
    pin(dk);
    pin(dv);
    wgmma_fence();
    multiply_tn<T>(dc, grad_out, from[0], more);
    multiply_tn<T>(ds, q, from[1], more);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint64_t grads = descriptor(from[2]) + 128 * j;
      const uint64_t weights = kKeys == 32 ? grads + 4 : descriptor(from[kKeys / 32 + 1]) + 128 * j;
      Wgmma<T, kKeys>::template multiply<true, true>(dk, descriptor(q) + 128 * j, grads,
                                                     more || j > 0);
      Wgmma<T, kKeys>::template multiply<true, true>(dv, descriptor(grad_out) + 128 * j, weights,
                                                     more || j > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(dc);
    pin(ds);
    pin(dk);
    pin(dv);
    barrier_arrive(&s.weighted_empty[team]);
    barrier_arrive(&s.empty[stage]);
  }

  // A lane's columns of `sums`, added up over the warps that attend rows.
  static __device__ __forceinline__ float sum_warps(const float* sums, int pitch, int column) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < Shared::kRowWarps; ++warp) sum += sums[warp * pitch + column];
    return sum;
  }

  __device__ __forceinline__ void end_item(const PooledOrder1Item& at, int item, int slot,
                                           int turn) {
    const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int thread = threadIdx.x % 128, dim = matrix_dim<64>(p.D), group = p.H / p.Hk;
    int keys = 0;
    if (p.sums_of_rows == nullptr) {
      for (int y = threadIdx.x % 32; y < p.nk; y += 32) {
        keys += p.key_count[static_cast<int64_t>(at.b) * p.nk + y];
      }
      keys = __reduce_add_sync(kFullWarp, keys);
    }
    const int64_t key_head = static_cast<int64_t>(at.b) * p.Hk + at.hk;
    const int64_t part = at.h % group * p.chunks + at.chunk;
    const int64_t share = (part * p.B * p.Hk + key_head) * p.nk;
    barrier_wait(&s.summed[slot], turn / 2 & 1);
    if (thread < p.D) {
      p.row_sums[static_cast<int64_t>(item) * p.D + thread] =
          -sum_warps(s.row_sums[slot][0], 64, thread);
    }
    const auto live = [&](int y) { return y < p.nk && s.bias[slot][y] != -INFINITY; };
    if (thread < p.nk) {
      p.pooled_mass_grads[share + thread] =
          live(thread) ? sum_warps(s.mass_grads[slot][0], kKeys, thread) : 0.f;
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int y = 8 * n + 2 * t + e;
        if (y >= p.nk) continue;
        const bool any = live(y);
        const float mass = p.scale * sum_warps(s.mass_grads[slot][0], kKeys, y);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int d = row + 8 * half;
          if (d >= p.D) continue;
          const int64_t to = (share + y) * p.D + d;
          p.pooled_grad_k[to] = any ? dk[n][2 * half + e] + mass * s.centre[slot][d] : 0.f;
          p.pooled_grad_v[to] = any ? dv[n][2 * half + e] : 0.f;
        }
      }
    }
    barrier_arrive(&s.item_empty[slot]);
    const auto store = [&](const float(&c)[8][4], int which, bool transposed) {
      const int64_t matrix = static_cast<int64_t>(item) * 2 + which;
      const float factor = (which == 0 ? 1.f : 2.f) / max(keys, 1);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int d = row + e / 2 * 8, column = 8 * n + 2 * t + e % 2;
          if (d >= dim || column >= dim) continue;
          const int64_t to =
              matrix * dim * dim + (transposed ? column * dim + d : d * dim + column);
          if (p.sums_of_rows != nullptr) {
            p.sums_of_rows[to] = c[n][e];
          } else {
            static_cast<T*>(p.moment_grads)[to] = __float2bfloat16(factor * c[n][e]);
          }
        }
      }
    };
    store(dc, 0, true);
    store(ds, 1, false);
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
    if (warp_index() == 4 * kTeams + 4) fetch_rows(p, s);
    if (warp_index() == 4 * kTeams + 5) look_up_unseen(p, s);
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
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) sums.add(before + tile, tile > 0);
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
    rows.start_item();
#pragma unroll 1
    for (int tile = (group + before) % 2; tile < tiles; tile += 2) {
      rows.attend(at, slot, tile, uniform(before + tile));
    }
    rows.end_item(slot);
    before += tiles;
  }
  if (threadIdx.x % 32 == 0) store_wait();
#endif
}

template <int DP>
cudaError_t launch_backward_pooled_order1(const PooledOrder1& params, const Device& device,
                                          cudaStream_t stream) {
  static_assert(DP == 64);
  if (params.nk > kPooledOrder1Keys || params.list_rows % 32 != 0) return cudaErrorNotSupported;
  PooledOrder1Maps p{params};
  constexpr Dtype bf16 = Dtype::bf16;
  constexpr int kKeys = kPooledOrder1Keys;
  const auto map = [&](CUtensorMap* to, const void* data, const Strides& strides, int rows) {
    return tensor_map(to, bf16, data, strides, p.B, p.H, p.rows, p.D, rows);
  };
  const auto keys_map = [&](CUtensorMap* to, const void* data) {
    const int64_t head = int64_t{p.nk} * p.D;
    return tensor_map(to, bf16, data, {p.Hk * head, head, p.D}, p.B, p.Hk, p.nk, p.D, kKeys);
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
  const int tiles = (p.rows + 63) / 64;
  p.tiles = (tiles + p.chunks - 1) / p.chunks;
  constexpr int kBytes = sizeof(PooledOrder1Shared<kKeys>) + 1024;
  if (kBytes > device.max_smem) return cudaErrorNotSupported;
  return launch_grid(backward_pooled_order1_kernel<kKeys>, std::min(p.items, device.sms),
                     PooledOrder1Traits<kKeys>::kThreads, kBytes, stream, p);
}

}  // namespace mra::cuda::sm90
