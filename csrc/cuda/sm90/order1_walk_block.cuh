// The keys that order1_walk_keys.cuh walks, where means are weighted: what their gradients get of
// those of the pooled key and value, and what comes through the weights.
#pragma once

#include "order1_walk.cuh"

namespace mra::cuda::sm90 {

// With weighted means, what becomes of the gradients of this thread's keys beside the products, in
// its columns; its warp's 16 keys lie in one block.
template <int kBlocks, bool kWeighted, class Shared>
struct WalkedBlock {
  static constexpr int kPanels = Shared::kPanels;
  const WalkKeys& p;
  Shared& s;
  int64_t key_head;
  int tile, stage, y, count;
  float through[2] = {};  // gradients of log weights

  __device__ __forceinline__ WalkedBlock(const WalkKeys& p, Shared& s, int64_t key_head, int tile,
                                         int stage, const uint32_t (&valid)[2])
      : p(p),
        s(s),
        key_head(key_head),
        tile(tile),
        stage(stage),
        y(min((64 * tile + 16 * warp()) >> p.log2_block_k, p.nk - 1)),
        count(count_of_block<kBlocks>(warp() * kBlocks / 4, valid)) {}
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % 4; }
  static __device__ __forceinline__ int row() { return 16 * warp() + threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int panel() { return threadIdx.x / 128; }
  static __device__ __forceinline__ int column() { return 64 * panel() + threadIdx.x % 4 * 2; }
  __device__ __forceinline__ float weight(int half) const {
    return s.keys.weight[stage][row() + 8 * half];
  }
  __device__ __forceinline__ float2 load(const float* from, int n) const {
    return 8 * n + column() < p.D ? load_pair(from + column() + 8 * n) : float2{};
  }

  // Products -> gradients but for what comes through the weights; there a product of two deviations
  // counts half. other: the deviations that the gradients are of, of tile n and a half.
  template <class Other>
  __device__ __forceinline__ void add_mean(float (&grad)[8][4], int which, const Other& other) {
    if constexpr (kWeighted) {
      const float* share =
          p.shares + ((which * static_cast<int64_t>(p.B) * p.Hk + key_head) * p.nk + y) * p.D;
      const float weight[2] = {this->weight(0), this->weight(1)};
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float2 u = load(share, n);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float factor = weight[half] * static_cast<float>(count);
          const float2 deviation = other(n, half);
          float *const x = &grad[n][2 * half], *const y = x + 1;
          *x *= factor, *y *= factor;
          const float mean_x = weight[half] * u.x, mean_y = weight[half] * u.y;
          through[half] +=
              deviation.x * fmaf(0.5f, *x, mean_x) + deviation.y * fmaf(0.5f, *y, mean_y);
          *x += mean_x, *y += mean_y;
        }
      }
    }
  }

  // Adds that to the keys' gradients, and leaves what the centre gets of the warp's keys.
  template <class Kappa, class Sync>
  __device__ __forceinline__ void add_through(float (&grad)[8][4], const Kappa& kappa,
                                              const Sync& sync) {
    if constexpr (kWeighted) {
      const float weight[2] = {this->weight(0), this->weight(1)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        through[half] = quad_sum(through[half]);
        if (kPanels > 1 && threadIdx.x % 4 == 0) s.dots[panel()][row() + 8 * half] = through[half];
      }
      if (kPanels > 1) sync();
      const float mass_grad = p.mass_grad[key_head * p.nk + y];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (kPanels > 1)
          through[half] = s.dots[0][row() + 8 * half] + s.dots[kPanels - 1][row() + 8 * half];
        if (weight[half] != 0.f) through[half] -= weight[half] * logf(weight[half]) * mass_grad;
      }
      float total = through[0] + through[1];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(kFullWarp, total, step);
      if constexpr (kBlocks < 4) {
        if (panel() == 0 && threadIdx.x % 32 == 0) s.totals[warp()] = total;
        sync();
        total = kBlocks == 1 ? s.totals[0] + s.totals[1] + s.totals[2] + s.totals[3]
                             : s.totals[warp() / 2 * 2] + s.totals[warp() / 2 * 2 + 1];
      }
      through[0] = p.scale * (through[0] - weight[0] * total);
      through[1] = p.scale * (through[1] - weight[1] * total);

      const int64_t end = static_cast<int64_t>(y + 1) << p.log2_block_k;
      const int64_t x = min(end + (1 << p.log2_block_q) - 1 >> p.log2_block_q,
                            static_cast<int64_t>(p.nq));  // the block that sees it first
      const float* const centre = p.centre + (key_head * (p.nq + 1) + x) * p.D;
      float* const sums =
          p.key_sums + ((key_head * ((p.N + 63) / 64) + tile) * 4 + warp()) * p.D + column();
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float2 u = load(centre, n);
        float2 sum{};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 deviation = kappa(n, half);
          grad[n][2 * half] = fmaf(through[half], u.x, grad[n][2 * half]);
          grad[n][2 * half + 1] = fmaf(through[half], u.y, grad[n][2 * half + 1]);
          sum.x = fmaf(through[half], deviation.x, sum.x);
          sum.y = fmaf(through[half], deviation.y, sum.y);
        }
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          sum.x += __shfl_xor_sync(kFullWarp, sum.x, step);
          sum.y += __shfl_xor_sync(kFullWarp, sum.y, step);
        }
        if (threadIdx.x % 32 < 4 && 8 * n + column() < p.D) {
          *reinterpret_cast<float2*>(sums + 8 * n) = sum;
        }
      }
    }
  }
};

}  // namespace mra::cuda::sm90
