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
struct PooledOrder1Rows {
  using T = __nv_bfloat16;
  using Shared = PooledOrder1Shared;

  const PooledOrder1Maps& p;
  Shared& s;
  const int team, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row = threadIdx.x / 32 % 4 * 16 + g;
  const WarpRows warp_rows{};
  float row_sum[8][2], mass_grad[4][2];  // of this thread's rows

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
    const int stage = count % Shared::kStages, phase = count / Shared::kStages & 1;
    auto& q = s.rows[stage][0];
    auto& grad_out = s.rows[stage][1];
    auto& out = s.rows[stage][2];
    float x[8][4], w[8][4], c[4][4], dl[4][4];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 less = load_pair(&s.centre_sigma[slot][8 * n + 2 * t]);
      w[n][0] = w[n][2] = -less.x, w[n][1] = w[n][3] = -less.y;
    }
    barrier_wait(&s.numbers_full[stage], phase);
    barrier_wait(&s.full[stage], phase);
    pin(x);
    pin(w);
    wgmma_fence();
    multiply_matrix<T, true>(x, grad_out, s.moments[slot][0], 0, false);
    multiply_matrix<T, true>(w, q, s.moments[slot][1], 0, true);
    wgmma_commit();
    pin(c);
    pin(dl);
    wgmma_fence();
    multiply_nt<T>(c, q, s.k[slot]);
    multiply_nt<T>(dl, grad_out, s.v[slot]);
    wgmma_commit();
    if (count >= 2) {  // the gradient of this team's tile before has left its place
      if (threadIdx.x % 32 == 0) store_wait();
      barrier_arrive(&s.empty[(count - 2) % Shared::kStages]);
    }
    // dO.o: of the products of all rows with all rows of a warp the diagonal.
    float dots[2][4] = {};
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
      Mma<T>::A grads;
      uint32_t outs[4];
      warp_rows.load(grads.r, grad_out, k);
      warp_rows.load(outs, out, k);
      Mma<T>::product(dots[0], grads, outs[0], outs[2]);
      Mma<T>::product(dots[1], grads, outs[1], outs[3]);
    }
    uint32_t kappa[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) warp_rows.load(kappa[k], q, 16 * k);
    wgmma_wait<1>();
    pin(x);
    pin(w);

    float u[2] = {}, v[2] = {};
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int m = n + j / 2, half = j % 2;
        const float2 centre = load_pair(&s.centre[slot][8 * m + 2 * t]);
        float2 own = unpack2(kappa[n / 2][j], T{});
        own.x -= centre.x, own.y -= centre.y;
        u[half] += own.x * x[m][2 * half] + own.y * x[m][2 * half + 1];
        v[half] += own.x * w[m][2 * half] + own.y * w[m][2 * half + 1];
        kappa[n / 2][j] = Mma<T>::pack(own.x, own.y);
      }
    }
    // Of either row: delta of coarse keys, what the logits are less, in log2 units; and a, and b,
    // but for what the gradients of the logits give to it.
    float coarse_delta[2], shift[2], a[2], b[2], b_of_sum[2];
    bool any[2];
    float* const to =
        p.made_delta + static_cast<int64_t>(at.head) * p.rows + (at.first + 64 * tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto& numbers = s.numbers[stage];
      const int r = row + 8 * half;
      const float share = numbers[0][r], scale2 = p.scale * p.scale;
      const float variance = scale2 * quad_sum(v[half]);
      const float gamma = reciprocal_approx(1.f + variance / 4);
      const float slope = gamma * p.scale * quad_sum(u[half]);
      const float dot = g % 2 == 0 ? dots[half][2 * half] : dots[half][2 * half + 1];
      const float delta = __shfl_sync(kFullWarp, dot, g / 2, 4) - numbers[2][r];
      if (t == half && at.first + 64 * tile + r < p.rows) to[r] = delta;
      any[half] = share != 0.f;
      coarse_delta[half] = delta - slope;
      shift[half] = numbers[1][r] - log2_approx(3.f - 2.f * gamma);
      a[half] = share * gamma * p.scale;
      b[half] = a[half] * slope * p.scale * -0.25f;
      b_of_sum[half] = scale2 * (0.75f * reciprocal_approx(1.f + 0.75f * variance) - gamma / 4);
    }
    wgmma_wait<0>();
    pin(c);
    pin(dl);
    group_sync(team);  // the other warps' products with this tile are made
    if (!__all_sync(kFullWarp, any[0] && any[1])) {
      // A row without weight may hold anything.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (any[half]) continue;
        coarse_delta[half] = a[half] = b[half] = b_of_sum[half] = 0.f;
        shift[half] = INFINITY;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          kappa[n / 2][n % 2 * 2 + half] = 0;
          *reinterpret_cast<uint32_t*>(&grad_out[0][row + 8 * half][(n ^ g) * 8 + 2 * t]) = 0;
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            x[n][e] = w[n][e] = 0.f;
            if (n < 4) c[n][e] = dl[n][e] = 0.f;
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) warp_rows.store(q, 16 * k, kappa[k]);

    const uint32_t both = row < 32 ? s.unseen[stage].x : s.unseen[stage].y;
    const uint32_t unseen = both >> 2 * t;
    const float log2_scale = p.scale * kLog2e;
    float coarse_sum[2] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 bias = load_pair(&s.bias[slot][8 * n + 2 * t]);
      const float l[2] = {unseen >> 8 * n & 1 ? -INFINITY : bias.x,
                          unseen >> 8 * n & 2 ? -INFINITY : bias.y};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, e = i % 2;
        const float weight = exp2_approx(fmaf(c[n][i], log2_scale, l[e] - shift[half]));
        const float grad = weight * (dl[n][i] - coarse_delta[half]);
        mass_grad[n][e] += grad;
        coarse_sum[half] += grad;
        c[n][i] = weight;
        dl[n][i] = grad * p.scale;
      }
    }
    uint32_t weights[2][4], grads[2][4];
    pack<T>(weights, c);
    pack<T>(grads, dl);
    if (count >= 2) barrier_wait(&s.weights_empty[team], count / 2 - 1 & 1);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      warp_rows.store(s.weights[team], 16 * j, grads[j]);
      warp_rows.store(s.weights[team], 32 + 16 * j, weights[j]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      b[half] += b_of_sum[half] * quad_sum(coarse_sum[half]);
      if (t != half) continue;
      s.row_weights[team][0][row + 8 * half] = a[half];
      s.row_weights[team][1][row + 8 * half] = b[half];
    }
    const float twice[2] = {2 * b[0], 2 * b[1]};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] = a[e / 2] * x[n][e] + twice[e / 2] * w[n][e];
      row_sum[n][0] += x[n][0] + x[n][2], row_sum[n][1] += x[n][1] + x[n][3];
    }
    pin(x);
    wgmma_fence();
    multiply_pn<T>(x, grads, s.k[slot]);
    wgmma_commit();

    fence_for_copies();
    barrier_arrive(&s.weights_full[team]);

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
struct PooledOrder1Sums {
  using T = __nv_bfloat16;
  using Shared = PooledOrder1Shared;
  static constexpr int kKeys = Shared::kKeys;

  const PooledOrder1Maps& p;
  Shared& s;
  const WarpRows warp_rows{};
  // dC transposed; dSigma; gradients of pooled keys and values, transposed.
  float dc[8][4], ds[8][4], dk[kKeys / 8][4], dv[kKeys / 8][4];

  // The `count`th tile: all but the last of its products, which end beside the next tile's.
  __device__ __forceinline__ void add(int count, bool more) {
    const int stage = uniform(count % Shared::kStages), team = uniform(count % 2);
    const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const auto& q = s.rows[stage][0];
    const auto& grad_out = s.rows[stage][1];
    barrier_wait(&s.weights_full[team], count / 2 & 1);
    uint32_t kappa[2][4];  // sixteen columns, and the next
    warp_rows.load(kappa[0], q, 0);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint64_t grads = descriptor(s.weights[team], 16, 128 * j);
      const uint64_t weights = descriptor(s.weights[team], 16, 128 * j + 4);  // columns 32 on
      Wgmma<T, kKeys>::template multiply<true, true>(dk, descriptor(q, 16, 128 * j), grads,
                                                     more || j > 0);
      Wgmma<T, kKeys>::template multiply<true, true>(dv, descriptor(grad_out, 16, 128 * j), weights,
                                                     more || j > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (more) give_back(count - 1);
    float a[2], b[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[half] = s.row_weights[team][0][row + 8 * half];
      b[half] = s.row_weights[team][1][row + 8 * half];
    }
    group_sync(Shared::kTeams);  // all products with the tile before are made
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t of_c[4], of_sigma[4];
      if (k < 3) warp_rows.load(kappa[(k + 1) % 2], q, 16 * (k + 1));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 own = unpack2(kappa[k % 2][j], T{});
        of_c[j] = Mma<T>::pack(a[j % 2] * own.x, a[j % 2] * own.y);
        of_sigma[j] = Mma<T>::pack(b[j % 2] * own.x, b[j % 2] * own.y);
      }
      warp_rows.store(s.weighted[0], 16 * k, of_c);
      warp_rows.store(s.weighted[1], 16 * k, of_sigma);
    }
    fence_for_copies();
    group_sync(Shared::kTeams);
    wgmma_fence();
    multiply_tn<T>(dc, grad_out[0], s.weighted[0], more);
    multiply_tn<T>(ds, q[0], s.weighted[1], more);
    wgmma_commit();
  }
  __device__ __forceinline__ void give_back(int count) {
    barrier_arrive(&s.weights_empty[count % 2]);
    barrier_arrive(&s.empty[count % Shared::kStages]);
  }
  __device__ __forceinline__ void finish(int count) {
    wgmma_wait<0>();
    pin(dk);
    pin(dv);
    pin(dc);
    pin(ds);
    give_back(count);
  }

  // A column of the sums of the warps that attend rows.
  template <int kColumns>
  static __device__ __forceinline__ float sum_warps(
      const float (&sums)[Shared::kRowWarps][kColumns], int column) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < Shared::kRowWarps; ++warp) sum += sums[warp][column];
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
      p.row_sums[static_cast<int64_t>(item) * p.D + thread] = -sum_warps(s.row_sums[slot], thread);
    }
    if (thread < kKeys) {
      const float mass = sum_warps(s.mass_grads[slot], thread);
      if (thread < p.nk) p.pooled_mass_grads[share + thread] = mass;
      s.mass_sums[thread] = p.scale * mass;
    }
    const float centre[2] = {s.centre[slot][row], s.centre[slot][row + 8]};
    group_sync(Shared::kTeams);
    barrier_arrive(&s.item_empty[slot]);
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
          to_k[y * p.D] = dk[n][2 * half + e] + s.mass_sums[y] * centre[half];
          to_v[y * p.D] = dv[n][2 * half + e];
        }
      }
    }
    if (p.sums_of_rows != nullptr) {
      store_matrices(
          p.sums_of_rows + static_cast<int64_t>(item) * 2 * dim * dim, row, t, dim,
          [](float x, float) { return x; }, 1.f);
    } else {
      store_matrices(
          static_cast<T*>(p.moment_grads) + static_cast<int64_t>(item) * 2 * dim * dim, row, t, dim,
          [](float x, float factor) { return __float2bfloat16(factor * x); }, 1.f / max(keys, 1));
    }
  }

  // dC, which is transposed here, and dSigma, [2, dim, dim], of which the latter is quadratic.
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
          to[column * dim + d] = element(dc[n][i], factor);
          to[(dim + d) * dim + column] = element(ds[n][i], 2 * factor);
        }
      }
    }
  }
};

__global__ void __launch_bounds__(PooledOrder1Traits::kThreads, 1)
    backward_pooled_order1_kernel(const __grid_constant__ PooledOrder1Maps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Traits = PooledOrder1Traits;
  constexpr int kTeams = Traits::kTeams;
  extern __shared__ char raw[];
  auto& s = aligned<PooledOrder1Shared>(raw);
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
      look_up_unseen(p, s);
    } else if (role == 2) {
      look_up_numbers(p, s);
    }
    return;
  }
  int before = 0, turn = 0;
  if (group == kTeams) {
    take_registers<Traits::kSumRegisters>();
    PooledOrder1Sums sums{p, s};
#pragma unroll 1
    for (int item = blockIdx.x; item < p.items; item += gridDim.x, ++turn) {
      const PooledOrder1Item at(p, item);
      const int tiles = uniform(at.tiles), slot = turn % 2;
      barrier_wait(&s.item_full[slot], turn / 2 & 1);
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) sums.add(before + tile, tile > 0);
      sums.finish(before + tiles - 1);
      sums.end_item(at, item, slot, turn);
      before += tiles;
    }
    return;
  }
  take_registers<Traits::kRowRegisters>();
  PooledOrder1Rows rows{p, s, group};
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
  static_assert(DP == 64 && kPooledOrder1Keys == 32);
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
  constexpr int kBytes = sizeof(PooledOrder1Shared) + 1024;
  if (kBytes > device.max_smem) return cudaErrorNotSupported;
  return launch_grid(backward_pooled_order1_kernel, std::min(p.items, device.sms),
                     PooledOrder1Traits::kThreads, kBytes, stream, p);
}

}  // namespace mra::cuda::sm90
