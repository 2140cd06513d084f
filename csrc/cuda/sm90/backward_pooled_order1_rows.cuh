// The warpgroups of backward_pooled_order1.cuh that attend rows.
#pragma once

#include "backward_pooled_order1_tiles.cuh"

namespace mra::cuda::sm90 {

// What one warpgroup does with its tiles.
template <int kKeys>
struct PooledOrder1Rows {
  using T = __nv_bfloat16;
  using Shared = PooledOrder1Shared<kKeys>;
  static constexpr int kParts = kKeys / 32;  // 32 pooled keys are attended at once

  const PooledOrder1Maps& p;
  Shared& s;
  const int team, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int first = threadIdx.x / 32 % 4 * 16, row = first + g;  // of this warp, of this thread
  const WarpRows warp_rows{};

  // The `count`th tile of this block of threads, of the item at `slot`; before it this team had the
  // one two before, if there was one.
  __device__ __forceinline__ void attend(const PooledOrder1Item& at, int slot, int tile,
                                         int count) {
    const int stage = count % Shared::kStages, phase = count / Shared::kStages & 1;
    auto& q = s.rows[stage][0];
    auto& grad_out = s.rows[stage][1];
    auto& out = s.rows[stage][2];
    float x[8][4] = {}, w[8][4], c[4][4] = {}, dl[4][4] = {};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 less = load_pair(&s.centre_sigma[slot][8 * n + 2 * t]);
      w[n][0] = w[n][2] = -less.x, w[n][1] = w[n][3] = -less.y;
    }
    barrier_wait(&s.full[stage], phase);
    using Keys = const uint16_t(&)[1][32][64];
    uint32_t kappa[4][4], grads[4][4];  // the query at first
    if constexpr (kParts == 1) {
#pragma unroll
      for (int k = 0; k < 4; ++k) warp_rows.load(kappa[k], q[0], 16 * k);
#pragma unroll
      for (int k = 0; k < 4; ++k) warp_rows.load(grads[k], grad_out[0], 16 * k);
    }
    pin(x);
    pin(w);
    pin(c);
    pin(dl);
    wgmma_fence();
    if constexpr (kParts == 1) {
      multiply_pt<T>(w, kappa, s.moments[slot][1]);
      multiply_pt<T>(c, kappa, s.k[slot]);
      multiply_pt<T>(x, grads, s.moments[slot][0]);
      wgmma_commit();
      multiply_pt<T>(dl, grads, s.v[slot]);
    } else {  // too few registers
      multiply_matrix<T, true>(x, grad_out, s.moments[slot][0], 0, false);
      multiply_matrix<T, true>(w, q, s.moments[slot][1], 0, true);
      wgmma_commit();
      multiply_nt<T>(c, q, reinterpret_cast<Keys>(s.k[slot]));
      multiply_nt<T>(dl, grad_out, reinterpret_cast<Keys>(s.v[slot]));
    }
    wgmma_commit();
    if (count >= 2) {  // the gradient of this team's tile before has left its place
      if (threadIdx.x % 32 == 0) store_wait();
      barrier_arrive(&s.empty[(count - 2) % Shared::kStages]);
    }
    // dO.o: of the products of all rows with all rows of a warp the diagonal.
    float dots[2][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t outs[4];
      if constexpr (kParts > 1) warp_rows.load(grads[k], grad_out[0], 16 * k);
      warp_rows.load(outs, out[0], 16 * k);
      const Mma<T>::A left{{grads[k][0], grads[k][1], grads[k][2], grads[k][3]}};
      Mma<T>::product(dots[0], left, outs[0], outs[2]);
      Mma<T>::product(dots[1], left, outs[1], outs[3]);
    }
    if constexpr (kParts > 1) {
#pragma unroll
      for (int k = 0; k < 4; ++k) warp_rows.load(kappa[k], q[0], 16 * k);
    }
    barrier_wait(&s.numbers_full[stage], phase);
    wgmma_wait<1>();
    pin(x);
    pin(w);
    if constexpr (kParts == 1) pin(c);

    float u[2] = {}, v[2] = {};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 centre = load_pair(&s.centre[slot][8 * n + 2 * t]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t& pair = kappa[n / 2][n % 2 * 2 + half];
        float2 own = unpack2(pair, T{});
        own.x -= centre.x, own.y -= centre.y;
        u[half] += own.x * x[n][2 * half] + own.y * x[n][2 * half + 1];
        v[half] += own.x * w[n][2 * half] + own.y * w[n][2 * half + 1];
        pair = Mma<T>::pack(own.x, own.y);
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
    // A row without weight may hold anything.
    const bool all = __all_sync(kFullWarp, any[0] && any[1]);
    if (!all) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (any[half]) continue;
        coarse_delta[half] = a[half] = b[half] = b_of_sum[half] = 0.f;
        shift[half] = INFINITY;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          kappa[n / 2][n % 2 * 2 + half] = 0;
          x[n][2 * half] = x[n][2 * half + 1] = w[n][2 * half] = w[n][2 * half + 1] = 0.f;
        }
      }
    }

    if constexpr (kParts > 1) {  // no registers for them meanwhile
      __syncwarp();
#pragma unroll
      for (int k = 0; k < 4; ++k) warp_rows.store(out[0], 16 * k, kappa[k]);
    }
    if (count >= 2) barrier_wait(&s.weights_empty[team], count / 2 - 1 & 1);
    const float log2_scale = p.scale * kLog2e;
    float coarse_sum[2] = {};
    uint32_t scaled[2 * kParts][4];  // gradients of the logits times the scale
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part > 0) {
        pin(c);
        pin(dl);
        wgmma_fence();
        multiply_nt<T>(c, q, reinterpret_cast<Keys>(s.k[slot][0][32 * part]));
        multiply_nt<T>(dl, grad_out, reinterpret_cast<Keys>(s.v[slot][0][32 * part]));
        wgmma_commit();
      }
      wgmma_wait<0>();
      pin(c);
      pin(dl);
      if (!all) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (any[half]) continue;
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            c[n][2 * half] = c[n][2 * half + 1] = dl[n][2 * half] = dl[n][2 * half + 1] = 0.f;
          }
        }
      }
      const uint32_t unseen = s.unseen[stage][row / 32][part] >> 2 * t;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 bias = load_pair(&s.bias[slot][32 * part + 8 * n + 2 * t]);
        const float l[2] = {unseen >> 8 * n & 1 ? -INFINITY : bias.x,
                            unseen >> 8 * n & 2 ? -INFINITY : bias.y};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2;
          c[n][i] = exp2_approx(fmaf(c[n][i], log2_scale, l[i % 2] - shift[half]));
          dl[n][i] = c[n][i] * (dl[n][i] - coarse_delta[half]);
          coarse_sum[half] += dl[n][i];
        }
      }
      uint32_t weights[2][4], logit_grads[2][4];
      pack<T>(weights, c);
      pack<T>(logit_grads, dl);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        warp_rows.store(s.weights[team][0], 32 * part + 16 * j, logit_grads[j]);
        warp_rows.store(s.weights[team][kParts - 1], (kParts == 1 ? 32 : 32 * part) + 16 * j,
                        weights[j]);
      }
#pragma unroll
      for (auto& row_grads : dl) {
#pragma unroll
        for (float& grad : row_grads) grad *= p.scale;
      }
      pack<T>(reinterpret_cast<uint32_t(&)[2][4]>(scaled[2 * part]), dl);
    }
    if constexpr (kParts > 1) {
      group_sync(team);  // other warps' products with these rows are made
    } else {
      __syncwarp();  // other lanes' reading of them is done
    }
    if (!all) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (any[half]) continue;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          *reinterpret_cast<uint32_t*>(&grad_out[0][row + 8 * half][(n ^ g) * 8 + 2 * t]) = 0;
        }
      }
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
    }
    pin(x);
    wgmma_fence();
    multiply_pn<T>(x, scaled, s.k[slot]);
    wgmma_commit();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (kParts > 1) warp_rows.load(kappa[k], out[0], 16 * k);
      warp_rows.store(q[0], 16 * k, kappa[k]);
    }
    fence_for_copies();
    barrier_arrive(&s.weights_full[team]);

    wgmma_wait<0>();
    pin(x);
    place_rows<T>(out, x);
    fence_for_copies();
    barrier_arrive(&s.dq_full[stage]);
    if (threadIdx.x % 32 == 0) {
      store_panel(p.grad_q_map, out[0][first], 0, at.first + 64 * tile + first, at.h, at.b);
      store_commit();
    }
    __syncwarp();
  }
};

}  // namespace mra::cuda::sm90
