// Gradients through the weights of weighted means, where order 1 makes the gradients of keys.
#pragma once

#include "../sm80/tile.cuh"

namespace mra::cuda::sm90 {

// Gradients of the log weights of two keys of this thread, `half` 0 and 1: pi_j (x_j - what the
// block has of it), x_j in docs/algorithm.md, from their deviations, the products of these with dC
// and dSigma, and the block's shares. Of a product of two deviations each has a half.
template <int kBlocks, int kTiles, int kPanels>
struct WeightsBackward {
  const float* weights;  // of the tile's keys
  float (&totals)[4];
  int count;  // keys of the block
  int D;
  float of_products[2] = {}, of_shares[2] = {};

  // Of keys, then of values, or the other way round: deviations x, their products with the
  // matrices, and the block's shares, from column 2 t on. Calls read(n, shares) behind the last
  // reading of products[n].
  template <class Read>
  __device__ __forceinline__ void add(const uint16_t (&x)[kPanels][64][64],
                                      const float (&products)[8 * kPanels][4], const float* shares,
                                      const Read& read) {
    const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 u = 8 * n + 2 * t < D ? load_pair(shares + 8 * n) : float2{};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = 16 * warp + g + 8 * half, at = (n % 8 ^ g) * 8 + 2 * t;
        const float2 k = pair_of(&x[n / 8][r][at]);
        of_products[half] += k.x * products[n][2 * half] + k.y * products[n][2 * half + 1];
        of_shares[half] += k.x * u.x + k.y * u.y;
      }
      read(n, u);
    }
  }
  // Then.
  template <class Sync>
  __device__ __forceinline__ void finish(float (&grad)[2], float mass_grad, float scale,
                                         const Sync& sync) const {
    const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4;
    const float half_count = 0.5f * static_cast<float>(count);
    float weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      weight[half] = weights[16 * warp + g + 8 * half];
      grad[half] = weight[half] * quad_sum(fmaf(half_count, of_products[half], of_shares[half]));
      if (weight[half] > 0.f) grad[half] -= weight[half] * __logf(weight[half]) * mass_grad;
    }
    float total = grad[0] + grad[1];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(kFullWarp, total, step);
    if constexpr (kBlocks < 4) {
      if (threadIdx.x % 32 == 0) totals[warp] = total;
      sync();
      total = kBlocks == 1 ? totals[0] + totals[1] + totals[2] + totals[3]
                           : totals[warp / 2 * 2] + totals[warp / 2 * 2 + 1];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) grad[half] = scale * (grad[half] - weight[half] * total);
  }
  static __device__ __forceinline__ float2 pair_of(const uint16_t* pair) {
    return cuda::unpack2(*reinterpret_cast<const uint32_t*>(pair), __nv_bfloat16{});
  }
};

}  // namespace mra::cuda::sm90
