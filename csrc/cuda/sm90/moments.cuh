// Means of the blocks of keys and values, and sums over the valid keys of
//
//   kappa_j^T nu_j  and  kappa_j^T kappa_j,   kappa_j = k_j - mean of its block, nu_j = v_j - mean,
//
// or the same with weighted means and sums, from one reading of both. A block of threads walks a
// chunk of tiles of 64 keys: one warp fetches them ahead, others weigh them, and a warpgroup for
// each 64 columns takes means and multiplies: its left side is A_j = w_j kappa_j, from registers,
// its right side values and keys as they lie, since
//
//   sum_j A_j^T v_j - sum_y (sum of the A_j of block y)^T mean_y
//
// is the same, and the second sum, all but what rounding has left, is taken off once in 16 blocks.
#pragma once

#include <climits>

#include "head_half.cuh"
#include "moments_pool.cuh"

namespace mra::cuda::sm90 {

struct MomentsMaps : Moments {
  CUtensorMap k_map, v_map;
  int tiles;  // of a chunk
};

// Measured choices (docs/kernels.md).
template <int DP, Weights kWeights>
struct MomentsTraits {
  static constexpr int kBlocks = moments_resident(DP), kStages = 6;
  static constexpr int kWeighers = kWeights == Weights::made ? 2 : kWeights == Weights::given;
  static constexpr int kThreads = DP == 128 ? 384 : 160 + 32 * kWeighers;
  // Registers of threads that fetch and weigh, and of the others, at DP = 128.
  static constexpr int kFew = kWeights == Weights::made ? 56 : 24;
  static constexpr int kMany = kWeights == Weights::made ? 224 : 240;
};

// x / count, rounded as a division is but for overflow, without its branches.
__device__ __forceinline__ float divided(float x, float count) {
  const float inverse = __frcp_rn(count), quotient = x * inverse;
  return fmaf(fmaf(-quotient, count, x), inverse, quotient);
}

// What the warps that multiply do with a tile before: each has 16 columns.
template <typename T, int DP, int kBlocks, Weights kWeights, class Tiles>
struct TileColumns {
  static constexpr bool kWeighted = kWeights != Weights::even, kMade = kWeights == Weights::made;
  static constexpr int kPanels = DP / 64;
  using A = uint32_t[4][4];  // columns as left operands, over the tile's keys
  const Moments& p;
  Tiles& s;
  const int head, first, h, group;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32 % 4;
  const PanelLane<> panel{};
  // Right operands of the sums: of a block, weights and what rounding them has lost, or ones and
  // zeros, in columns 2 block and 2 block + 1, which thread t = block of four has.
  uint32_t right[4][2];

  __device__ __forceinline__ TileColumns(const Moments& p, Tiles& s, int head, int first, int h,
                                         int group)
      : p(p), s(s), head(head), first(first), h(h), group(group) {
    if constexpr (!kWeighted) load_ones(right);
  }

  static constexpr int block_of(int k) { return k * kBlocks / 4; }

  __device__ __forceinline__ void load_ones(uint32_t (&ones)[4][2]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      ones[k][0] = ones[k][1] = g == 2 * block_of(k) ? Mma<T>::pack(1.f, 1.f) : 0u;
    }
  }
  __device__ __forceinline__ void load_weights(int stage) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = s.weights[stage][g % 2][8 * k + 4 * i + t];
        right[k][i] = g / 2 == block_of(k) ? pair : 0u;
      }
    }
  }
  __device__ __forceinline__ void load(A& a, int stage, int which) const {
    const uint32_t base = smem_address(s.keys.x[stage][which][group]) + panel.keys(warp);
#pragma unroll
    for (int k = 0; k < 4; ++k) ldmatrix_x4<true>(a[k], base + 16 * k * 128);
  }

  // Zeros where a key does not count, whatever there is. By all who multiply.
  __device__ __forceinline__ void clear(int stage, const uint32_t (&valid)[2]) const {
    for (int row = lane / 4; row < 64; row += 8) {
      if (valid[row / 32] >> row % 32 & 1) continue;
      const int chunk = (2 * warp + t % 2) ^ row % 8;
      *reinterpret_cast<uint4*>(&s.keys.x[stage][t / 2][group][row][chunk * 8]) = uint4{};
    }
    fence_for_copies();  // products read shared memory as copies do
    sync();
  }
  __device__ __forceinline__ void sync() const {
    asm volatile("bar.sync 1, %0;" ::"n"(128 * kPanels) : "memory");
  }

  // Sums of columns g and g + 8 of this warp over the keys of block t.
  __device__ __forceinline__ void sum(float (&to)[2], const A& a,
                                      const uint32_t (&right)[4][2]) const {
    float c[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) Mma<T>::product(c, as_left(a[k]), right[k][0], right[k][1]);
    to[0] = c[0] + c[1];
    to[1] = c[2] + c[3];
  }
  static __device__ __forceinline__ typename Mma<T>::A as_left(const uint32_t (&x)[4]) {
    typename Mma<T>::A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.r[i] = x[i];
    return a;
  }
  // Such sums -> means of block t, of `count` keys, to memory and rounded to their panel; returned
  // as rounded.
  __device__ __forceinline__ void keep_means(uint32_t (&kept)[2], float (&mean)[2], float count,
                                             int which, int tile, float* to, void* rounded) const {
    const int of_chunk = tile * kBlocks + t, row = of_chunk % 16, y = first * kBlocks + of_chunk;
    const int64_t at = (static_cast<int64_t>(head) * p.nk + y) * p.D;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (!kWeighted) mean[half] = divided(mean[half], count);
      kept[half] = Mma<T>::pack(mean[half], 0.f) & 0xffffu;
      if (t >= kBlocks) continue;
      const int chunk = 2 * warp + half, d = 64 * group + 8 * chunk + g;
      s.mean[of_chunk / 16 % 2][which][group][row][(chunk ^ row % 8) * 8 + g] =
          static_cast<uint16_t>(kept[half]);
      if (to == nullptr || y >= p.nk || d >= p.D) continue;
      to[at + d] = mean[half];
      if (rounded != nullptr) static_cast<uint16_t*>(rounded)[at + d] = kept[half];
    }
  }

  // Keys -> their deviations from the means of their blocks, times their weights.
  __device__ __forceinline__ void deviate(A& a, const uint32_t (&kept)[2], int stage,
                                          const uint32_t (&valid)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t twice = kept[half] | kept[half] << 16;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t mean = __shfl_sync(kFullWarp, twice, lane / 4 * 4 + block_of(k));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t& x = a[k][2 * i + half];
          x = less<T>(x, mean);
          if constexpr (kWeighted) x = times<T>(x, s.weights[stage][2][8 * k + 4 * i + t]);
        }
      }
    }
    if constexpr (!kWeighted) {
      if ((valid[0] & valid[1]) == kFullWarp) return;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[k][i] &= mask_pair(valid[k / 2], 16 * k % 32 + i / 2 * 8 + 2 * t);
        }
      }
    }
  }

  // The left side of a tile, whose means are kept.
  __device__ __forceinline__ void load_deviations(A& a, int tile, int stage,
                                                  const uint32_t (&valid)[2]) {
    load(a, stage, 0);
    if constexpr (kWeighted) load_weights(stage);
    float mean[2];
    uint32_t kept[2];
    sum(mean, a, right);
    const int own = count_of_block<kBlocks>(t, valid);
    const auto count = static_cast<float>(max(own, 1));
    if (kMade && p.made.k_plain != nullptr) {
      uint32_t ones[4][2];
      load_ones(ones);
      float plain[2];
      sum(plain, a, ones);
      keep_plain(plain, count, tile);
    }
    keep_means(kept, mean, count, 0, tile, p.k_mean, p.k_rounded);
    deviate(a, kept, stage, valid);
    const int y = (first + tile) * kBlocks + t;
    if (p.key_count != nullptr && h == 0 && threadIdx.x < kBlocks && y < p.nk) {
      p.key_count[static_cast<int64_t>(head / p.Hk) * p.nk + y] = own;
    }
  }
  __device__ __forceinline__ void keep_plain(const float (&sums)[2], float count, int tile) const {
    const int y = (first + tile) * kBlocks + t;
    if (t >= kBlocks || y >= p.nk) return;
    const int64_t at = (static_cast<int64_t>(head) * p.nk + y) * p.D;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int d = 64 * group + 16 * warp + 8 * half + g;
      if (d < p.D) p.made.k_plain[at + d] = divided(sums[half], count);
    }
  }
  __device__ __forceinline__ void keep_values(int tile, int stage,
                                              const uint32_t (&valid)[2]) const {
    A a;
    load(a, stage, 1);
    float mean[2];
    uint32_t kept[2];
    sum(mean, a, right);
    const auto count = static_cast<float>(max(count_of_block<kBlocks>(t, valid), 1));
    keep_means(kept, mean, count, 1, tile, p.v_mean, p.v_rounded);
  }
};

// kNarrow: head dims up to 32.
template <typename T, int DP, int kBlocks, Weights kWeights, bool kNarrow>
__global__ void __launch_bounds__(MomentsTraits<DP, kWeights>::kThreads,
                                  MomentsTraits<DP, kWeights>::kBlocks)
    moments_kernel(const __grid_constant__ MomentsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Traits = MomentsTraits<DP, kWeights>;
  constexpr bool kWeighted = kWeights != Weights::even;
  using Shared = MomentsTiles<T, DP, Traits::kStages, kBlocks, kWeights>;
  constexpr int kStages = Shared::kStages, kPanels = DP / 64;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  let_next_start();
  s.init(4 * kPanels);
  const int head = blockIdx.x / p.chunks, chunk = blockIdx.x - head * p.chunks;
  const int b = head / p.Hk, h = head - b * p.Hk, first = chunk * p.tiles;
  const int tiles = uniform(min(p.tiles, (p.M + 63) / 64 - first));
  if (warp_index() >= 4 * kPanels) {
    if constexpr (DP > 64) give_registers<Traits::kFew>();
    const int role = warp_index() - 4 * kPanels;
    if (role == 0) {
      s.keys.fetch(p.k_map, p.v_map, p.mask, nullptr, p.M, b, h, 64 * first, tiles);
    }
    if constexpr (kWeighted) {
      if (role > 0 && role <= Shared::kWeighers) {
        KeyWeigher<T, DP, kBlocks, kWeights, Shared>(p, s, head, first).run(role - 1, tiles);
      }
    }
    return;
  }

  if constexpr (DP > 64) take_registers<Traits::kMany>();

  const int group = uniform(threadIdx.x / 128), g = threadIdx.x % 32 / 4;
  TileColumns<T, DP, kBlocks, kWeights, Shared> columns(p, s, head, first, h, group);
  const uint32_t one = Mma<T>::pack(1.f, 1.f);
  float moment[8 * kPanels][4] = {}, sigma[8 * kPanels][4] = {};
  float rest[2][4] = {};  // sums of the left side by blocks, of 16
  int keys = 0;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, phase = tile / kStages & 1;
    barrier_wait(&s.keys.full[stage], phase);
    if constexpr (kWeighted) barrier_wait(&s.weighed[stage], phase);
    const uint32_t valid[2] = {s.keys.valid[stage][0], s.keys.valid[stage][1]};
    keys += __popc(valid[0]) + __popc(valid[1]);
    if ((valid[0] & valid[1]) != kFullWarp) columns.clear(stage, valid);
    uint32_t a[4][4];
    columns.load_deviations(a, tile, stage, valid);
    pin(moment);
    pin(sigma);
    wgmma_fence();
    multiply_pn<T, 64>(moment, a, s.keys.x[stage][1]);
    multiply_pn<T, 64>(sigma, a, s.keys.x[stage][0]);
    wgmma_commit();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int row = (tile * kBlocks + k * kBlocks / 4) % 16;
      const uint32_t low = g == row ? one : 0u, high = g + 8 == row ? one : 0u;
      Mma<T>::product(rest[0], columns.as_left(a[k]), low, low);
      Mma<T>::product(rest[1], columns.as_left(a[k]), high, high);
    }
    columns.keep_values(tile, stage, valid);
    wgmma_wait<0>();
    pin(moment);
    pin(sigma);
    if (tile % Shared::kTilesOf16 == Shared::kTilesOf16 - 1 || tile + 1 == tiles) {
      columns.sync();  // of all columns
      const auto& means = s.mean[tile * kBlocks / 16 % 2];
#pragma unroll
      for (int i = 0; i < 8; ++i) rest[i / 4][i % 4] = -rest[i / 4][i % 4];
      multiply_pn<T>(moment, rest, means[1], columns.panel);
      multiply_pn<T>(sigma, rest, means[0], columns.panel);
#pragma unroll
      for (int i = 0; i < 8; ++i) rest[i / 4][i % 4] = 0.f;
    }
    barrier_arrive(&s.keys.empty[stage]);
  }

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
  using Traits = MomentsTraits<DP, kWeights>;
  const int64_t blocks = static_cast<int64_t>(p.B) * p.Hk * p.chunks;
  if (!maps || blocks > INT_MAX) return cudaErrorNotSupported;
  p.tiles = chunk_tiles(p.M, p.chunks, p.unit_tiles);
  const auto launch = [&](auto key_blocks) {
    constexpr int kBlocks = key_blocks();
    using Shared = MomentsTiles<T, DP, Traits::kStages, kBlocks, kWeights>;
    constexpr int kBytes = sizeof(Shared) + 1024;
    if (kBytes > device.max_smem) return cudaErrorNotSupported;
    const auto kernel = moments_kernel<T, DP, kBlocks, kWeights, kNarrow>;
    return launch_grid(kernel, blocks, Traits::kThreads, kBytes, stream, p);
  };
  return p.log2_block_k == 6   ? launch(std::integral_constant<int, 1>{})
         : p.log2_block_k == 5 ? launch(std::integral_constant<int, 2>{})
                               : launch(std::integral_constant<int, 4>{});
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
