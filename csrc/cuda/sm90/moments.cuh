// Means of the blocks of keys and values, and sums over the valid keys of
//
//   kappa_j^T nu_j  and  kappa_j^T kappa_j,   kappa_j = k_j - mean of its block, nu_j = v_j - mean,
//
// or the same with weighted means and sums, from one reading of both. A block of threads walks a
// chunk of tiles of 64 keys: one warp fetches them ahead, another one makes their weights where
// they are not given, the others take the means, centre the tile where it lies, and multiply it
// while they centre the next. Warpgroup w makes 64 rows of both matrices, from row 64 w on.
#pragma once

#include <climits>

#include "key_weigher.cuh"

namespace mra::cuda::sm90 {

struct MomentsMaps : Moments {
  CUtensorMap k_map, v_map;
  int tiles;  // of a chunk
};

enum class Weights { even, given, made };

// Measured choices (docs/kernels.md).
template <int DP, Weights kWeights, bool kNarrow>
struct MomentsTraits {
  static constexpr int kBlocks = moments_resident(kNarrow ? 32 : DP, kWeights == Weights::made),
                       kStages = kNarrow ? 4 : 6;
  static constexpr int kThreads = DP == 128 ? 384 : kWeights == Weights::made ? 192 : 160;
  // Of threads that fetch and weigh, and of the others, at DP = 128.
  static constexpr int kFew = kWeights == Weights::made ? 56 : 24;
  static constexpr int kMany = kWeights == Weights::made ? 224 : 240;
};

// kNarrow: head dims up to 32.
template <typename T, int DP, int kBlocks, Weights kWeights, bool kNarrow>
__global__ void __launch_bounds__(MomentsTraits<DP, kWeights, kNarrow>::kThreads,
                                  MomentsTraits<DP, kWeights, kNarrow>::kBlocks)
    moments_kernel(const __grid_constant__ MomentsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Traits = MomentsTraits<DP, kWeights, kNarrow>;
  constexpr bool kWeighted = kWeights != Weights::even, kMade = kWeights == Weights::made;
  using Shared = KeyTiles<DP, Traits::kStages, kWeighted, T>;
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
    if constexpr (DP > 64) give_registers<Traits::kFew>();
    if (kMade && warp_index() == 4 * kPanels + 1) weigh_tiles<kBlocks>(p, s, head, first, tiles);
    if (warp_index() > 4 * kPanels) return;
    const float* weights = kWeights == Weights::given
                               ? p.weights + (static_cast<int64_t>(head) * p.nk << p.log2_block_k)
                               : nullptr;
    s.template fetch<kWeights == Weights::given>(p.k_map, p.v_map, p.mask, weights, p.M, b, h,
                                                 64 * first, tiles);
    return;
  }

  if constexpr (DP > 64) take_registers<Traits::kMany>();

  const int group = uniform(threadIdx.x / 128);
  float moment[8 * kPanels][4], sigma[8 * kPanels][4];
  const BlockMeans means{p.k_mean, p.v_mean, p.k_rounded, p.v_rounded,   p.key_count,
                         p.Hk,     p.nk,     p.D,         p.made.k_plain};
  int keys = 0;
  const auto prepare = [&](int tile) {
    const int stage = tile % kStages;
    barrier_wait(&s.full[stage], tile / kStages & 1);
    if constexpr (kMade) barrier_wait(&s.weighed[stage], tile / kStages & 1);
    keys += centre<kBlocks, kMeans, kNarrow, kMade>(means, s, stage, threadIdx.x / 32, b, h,
                                                    first + tile);
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

template <typename T, int DP, Weights kWeights, bool kNarrow>
cudaError_t launch_moments_of(const Moments& params, const Device& device, cudaStream_t stream) {
  MomentsMaps p{params};
  const bool maps = tensor_map(&p.k_map, kDtype<T>, p.k, p.k_strides, p.B, p.Hk, p.M, p.D, 64) &&
                    tensor_map(&p.v_map, kDtype<T>, p.v, p.v_strides, p.B, p.Hk, p.M, p.D, 64);
  using Traits = MomentsTraits<DP, kWeights, kNarrow>;
  constexpr int kBytes = sizeof(KeyTiles<DP, Traits::kStages, kWeights != Weights::even>) + 1024;
  const int64_t blocks = static_cast<int64_t>(p.B) * p.Hk * p.chunks;
  if (!maps || kBytes > device.max_smem || blocks > INT_MAX) return cudaErrorNotSupported;
  p.tiles = chunk_tiles(p.M, p.chunks, p.unit_tiles);
  const auto kernel = p.log2_block_k == 6   ? moments_kernel<T, DP, 1, kWeights, kNarrow>
                      : p.log2_block_k == 5 ? moments_kernel<T, DP, 2, kWeights, kNarrow>
                                            : moments_kernel<T, DP, 4, kWeights, kNarrow>;
  return launch_grid(kernel, blocks, Traits::kThreads, kBytes, stream, p);
}

template <int DP>
cudaError_t launch_moments(const Moments& params, const Device& device, cudaStream_t stream) {
  constexpr bool kCanBeNarrow = DP == 64;
  const auto launch = [&](auto t, auto weights) {
    using T = decltype(t);
    return params.D <= 32
               ? launch_moments_of<T, DP, weights(), kCanBeNarrow>(params, device, stream)
               : launch_moments_of<T, DP, weights(), false>(params, device, stream);
  };
  using Even = std::integral_constant<Weights, Weights::even>;
  const bool made = params.made.sample != nullptr;
  if (params.dtype == Dtype::f16) {
    if (made || params.weights != nullptr || params.sums == nullptr) return cudaErrorNotSupported;
    return launch(__half{}, Even{});
  }
  if (made) {
    return launch(__nv_bfloat16{}, std::integral_constant<Weights, Weights::made>{});
  }
  return params.weights != nullptr
             ? launch(__nv_bfloat16{}, std::integral_constant<Weights, Weights::given>{})
             : launch(__nv_bfloat16{}, Even{});
}

}  // namespace mra::cuda::sm90
