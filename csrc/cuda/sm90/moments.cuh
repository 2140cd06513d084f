// Means of the blocks of keys and values, and sums over the valid keys of
//
//   kappa_j^T nu_j  and  kappa_j^T kappa_j,   kappa_j = k_j - mean of its block, nu_j = v_j - mean,
//
// or the same with weighted means and sums, from one reading of both. A block of threads walks a
// chunk of tiles of 64 keys: one warp fetches them ahead, the others take the means, centre the
// tile where it lies, and multiply it while they centre the next. Warpgroup w makes 64 rows of both
// matrices, from row 64 w on.
#pragma once

#include <climits>

#include "key_tiles.cuh"
#include "moments.h"

namespace mra::cuda::sm90 {

struct MomentsMaps : Moments {
  CUtensorMap k_map, v_map;
  int tiles;  // of a chunk
};

// Measured choices (docs/kernels.md).
template <int DP, bool kNarrow>
struct MomentsTraits {
  static constexpr int kBlocks = moments_resident(kNarrow ? 32 : DP), kStages = kNarrow ? 4 : 6;
  static constexpr int kThreads = DP == 64 ? 160 : 384;
};

// kNarrow: head dims up to 32.
template <typename T, int DP, int kBlocks, bool kWeighted, bool kNarrow>
__global__ void __launch_bounds__(MomentsTraits<DP, kNarrow>::kThreads,
                                  MomentsTraits<DP, kNarrow>::kBlocks)
    moments_kernel(const __grid_constant__ MomentsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = KeyTiles<DP, MomentsTraits<DP, kNarrow>::kStages, kWeighted, T>;
  constexpr Means kMeans = kWeighted ? Means::rooted : Means::even;
  constexpr int kStages = Shared::kStages, kPanels = DP / 64;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  let_next_start();
  if (threadIdx.x == 0) {
    s.init(4 * kPanels);
    barrier_init_done();
  }
  __syncthreads();
  const int head = blockIdx.x / p.chunks, chunk = blockIdx.x - head * p.chunks;
  const int b = head / p.Hk, h = head - b * p.Hk, first = chunk * p.tiles;
  const int tiles = uniform(min(p.tiles, (p.M + 63) / 64 - first));
  if (warp_index() >= 4 * kPanels) {
    if constexpr (DP > 64) give_registers<24>();
    if (warp_index() > 4 * kPanels) return;
    const float* weights =
        kWeighted ? p.weights + (static_cast<int64_t>(head) * p.nk << p.log2_block_k) : nullptr;
    s.fetch(p.k_map, p.v_map, p.mask, weights, p.M, b, h, 64 * first, tiles);
    return;
  }

  if constexpr (DP > 64) take_registers<240>();

  const int group = uniform(threadIdx.x / 128);
  float moment[8 * kPanels][4], sigma[8 * kPanels][4];
  const BlockMeans means{p.k_mean,    p.v_mean, p.k_rounded, p.v_rounded,
                         p.key_count, p.Hk,     p.nk,        p.D};
  int keys = 0;
  const auto prepare = [&](int tile) {
    const int stage = tile % kStages;
    barrier_wait(&s.full[stage], tile / kStages & 1);
    keys += centre<kBlocks, kMeans, kNarrow>(means, s, stage, threadIdx.x / 32, b, h, first + tile);
    fence_for_copies();  // products read shared memory as copies do
    asm volatile("bar.sync 1, %0;" ::"n"(128 * kPanels) : "memory");
  };
  const auto multiply = [&](int tile, bool add) {
    const auto& x = s.x[tile % kStages];
    wgmma_fence();
    multiply_tn<T>(moment, x[0][group], x[1], add);
    multiply_tn<T>(sigma, x[0][group], x[0], add);
    wgmma_commit();
  };
  prepare(0);
  multiply(0, false);
#pragma unroll 1
  for (int tile = 1; tile < tiles; ++tile) {
    prepare(tile);
    wgmma_wait<0>();
    barrier_arrive(&s.empty[(tile - 1) % kStages]);
    multiply(tile, true);
  }
  wgmma_wait<0>();
  pin(moment);
  pin(sigma);

  const int row = 64 * group + 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
  constexpr int kDim = kNarrow ? 32 : DP;
  if (kNarrow && row >= kDim) return;
  const auto store = [&](const float(&c)[8 * kPanels][4], int which) {
    const int64_t matrix = static_cast<int64_t>(blockIdx.x) * 2 + which;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = (matrix * kDim + row + 8 * half) * kDim + threadIdx.x % 4 * 2;
#pragma unroll
      for (int n = 0; n < 8 * kPanels; ++n) {
        if (8 * n >= kDim) break;
        const float u = c[n][2 * half], w = c[n][2 * half + 1];
        if (p.sums != nullptr) {
          *reinterpret_cast<float2*>(p.sums + at + 8 * n) = make_float2(u, w);
        } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
          const float over_n = 1.f / max(keys, 1);
          reinterpret_cast<uint32_t*>(p.matrices)[(at + 8 * n) / 2] =
              Mma<T>::pack(u * over_n, w * over_n);
        }
      }
    }
  };
  store(moment, 0);
  store(sigma, 1);
#endif
}

template <typename T, int DP, bool kWeighted, bool kNarrow>
cudaError_t launch_moments_of(const Moments& params, const Device& device, cudaStream_t stream) {
  MomentsMaps p{params};
  const bool maps = tensor_map(&p.k_map, kDtype<T>, p.k, p.k_strides, p.B, p.Hk, p.M, p.D, 64) &&
                    tensor_map(&p.v_map, kDtype<T>, p.v, p.v_strides, p.B, p.Hk, p.M, p.D, 64);
  constexpr int kBytes =
      sizeof(KeyTiles<DP, MomentsTraits<DP, kNarrow>::kStages, kWeighted>) + 1024;
  const int64_t blocks = static_cast<int64_t>(p.B) * p.Hk * p.chunks;
  if (!maps || kBytes > device.max_smem || blocks > INT_MAX) return cudaErrorNotSupported;
  p.tiles = chunk_tiles(p.M, p.chunks, p.unit_tiles);
  const auto kernel = p.log2_block_k == 6   ? moments_kernel<T, DP, 1, kWeighted, kNarrow>
                      : p.log2_block_k == 5 ? moments_kernel<T, DP, 2, kWeighted, kNarrow>
                                            : moments_kernel<T, DP, 4, kWeighted, kNarrow>;
  return launch_grid(kernel, blocks, MomentsTraits<DP, kNarrow>::kThreads, kBytes, stream, p);
}

template <int DP>
cudaError_t launch_moments(const Moments& params, const Device& device, cudaStream_t stream) {
  constexpr bool kCanBeNarrow = DP == 64;
  const auto launch = [&](auto t, auto weighted) {
    using T = decltype(t);
    return params.D <= 32
               ? launch_moments_of<T, DP, weighted(), kCanBeNarrow>(params, device, stream)
               : launch_moments_of<T, DP, weighted(), false>(params, device, stream);
  };
  if (params.dtype == Dtype::f16) {
    if (params.weights != nullptr || params.sums == nullptr) return cudaErrorNotSupported;
    return launch(__half{}, std::false_type{});
  }
  return params.weights != nullptr ? launch(__nv_bfloat16{}, std::true_type{})
                                   : launch(__nv_bfloat16{}, std::false_type{});
}

}  // namespace mra::cuda::sm90
