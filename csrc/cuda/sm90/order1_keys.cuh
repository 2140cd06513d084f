// Order 1 of the keys in the backward pass: dv_j = kappa_j dC, dk_j = nu_j dC^T + kappa_j dSigma,
// with kappa and nu the key and value less the means of their block, zeros for a key that doesn't
// count. With weighted means these are times the weight and the block's count, the
// weight times the gradients of the pooled key and value is added, and what comes through the
// weights (docs/algorithm.md). dC and dSigma stay in shared memory; a block of threads walks a
// chunk of a head's tiles of 64 keys, its warpgroups in turns.
#pragma once

#include <climits>

#include "key_tiles.cuh"
#include "key_weights.cuh"
#include "moments.h"
#include "order1_keys.h"

namespace mra::cuda::sm90 {

struct Order1KeysMaps : Order1Keys {
  CUtensorMap k_map, v_map, matrices_map, grad_k_map, grad_v_map;
  int tiles;  // of a chunk
};

// Measured choices (docs/kernels.md). kBlocks: key blocks of a tile.
template <int DP, int kBlocks, bool kWeighted>
struct Order1KeysTraits {
  static constexpr int kLog2BlockK = kBlocks == 1 ? 6 : kBlocks == 2 ? 5 : 4;
  static constexpr int kResident = order1_keys_resident(DP, kWeighted, kLog2BlockK);
  static constexpr int kStages = kResident == 3 ? 3 : 4;
  static constexpr int kThreads = DP == 64 ? 160 : 384;
  // Means of blocks come with the tile; with weights and blocks of 16 there is no room for them.
  static constexpr bool kFetchMeans = !kWeighted || kBlocks < 4;
};

template <int DP, int kBlocks, bool kWeighted>
struct Order1KeysShared {
  static constexpr int kStages = Order1KeysTraits<DP, kBlocks, kWeighted>::kStages;
  uint16_t matrices[2][DP / 64][DP][64];  // dC, dSigma
  KeyTiles<DP, kStages, kWeighted> keys;
  // Means of the keys and values of a tile's blocks, and the gradients of these: D columns each.
  static constexpr bool kFetchMeans = Order1KeysTraits<DP, kBlocks, kWeighted>::kFetchMeans;
  alignas(16) float means[kFetchMeans ? kStages : 1][2][kFetchMeans ? kBlocks * DP : 4];
  alignas(16) float shares[kWeighted ? kStages : 1][2][kWeighted ? kBlocks * DP : 4];
  uint64_t matrices_full;
  alignas(8) float centre[kWeighted ? DP : 2];
  float totals[kWeighted ? DP / 64 : 1][4];  // of the 16 keys of each warp
};

// These means and gradients, with the tile.
template <int kBlocks, bool kWeighted, class Shared>
struct TileShares {
  const Order1KeysMaps& p;
  Shared& s;
  int head, first;  // first: tile of the chunk

  __device__ __forceinline__ int first_block(int tile) const { return (first + tile) * kBlocks; }
  __device__ __forceinline__ int one(int tile) const {  // bytes of either
    return min(kBlocks, p.nk - first_block(tile)) * p.D * 4;
  }
  __device__ __forceinline__ int bytes(int tile) const {
    return ((Shared::kFetchMeans ? 2 : 0) + (kWeighted ? 2 : 0)) * one(tile);
  }
  __device__ __forceinline__ void copy(int tile, int stage, uint64_t* barrier) const {
    const int64_t from = (static_cast<int64_t>(head) * p.nk + first_block(tile)) * p.D;
    if constexpr (Shared::kFetchMeans) {
      copy_bytes(s.means[stage][0], p.k_mean + from, one(tile), barrier);
      copy_bytes(s.means[stage][1], p.v_mean + from, one(tile), barrier);
    }
    if constexpr (kWeighted) {
      const int64_t of_values = static_cast<int64_t>(p.B) * p.Hk * p.nk * p.D;
      copy_bytes(s.shares[stage][0], p.shares + from, one(tile), barrier);
      copy_bytes(s.shares[stage][1], p.shares + of_values + from, one(tile), barrier);
    }
  }
};

// Keys that count of the block that key r of a tile is in.
template <int kBlocks>
__device__ __forceinline__ int count_of(const uint32_t (&valid)[2], int r) {
  if constexpr (kBlocks == 1) return __popc(valid[0]) + __popc(valid[1]);
  if constexpr (kBlocks == 2) return __popc(valid[r / 32]);
  return __popc(valid[r / 32] & 0xffffu << r % 32 / 16 * 16);
}

// kNarrow: head dims up to 32.
template <int DP, int kBlocks, bool kWeighted, bool kNarrow>
__global__ void __launch_bounds__(Order1KeysTraits<DP, kBlocks, kWeighted>::kThreads,
                                  Order1KeysTraits<DP, kBlocks, kWeighted>::kResident)
    order1_keys_kernel(const __grid_constant__ Order1KeysMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  let_next_start();
  using T = __nv_bfloat16;
  using Shared = Order1KeysShared<DP, kBlocks, kWeighted>;
  constexpr int kStages = Shared::kStages, kPanels = DP / 64, kGroups = kPanels;
  constexpr int kTiles = kNarrow ? 4 : 8 * kPanels;  // of eight columns that count
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  auto& keys = s.keys;
  if (threadIdx.x == 0) {
    barrier_init(&s.matrices_full, 1);
    keys.init(4);
    barrier_init_done();
  }
  const int head = blockIdx.x / p.chunks, chunk = blockIdx.x - head * p.chunks;
  if constexpr (kWeighted) {
    for (int d = threadIdx.x; d < DP; d += blockDim.x) {
      s.centre[d] = d < p.D ? p.centre[static_cast<int64_t>(head) * p.D + d] : 0.f;
    }
  }
  __syncthreads();
  const int b = head / p.Hk, h = head - b * p.Hk, first = chunk * p.tiles;
  const int tiles = uniform(min(p.tiles, (p.M + 63) / 64 - first));
  if (warp_index() >= 4 * kGroups) {
    if constexpr (DP > 64) give_registers<24>();
    if (warp_index() > 4 * kGroups) return;
    barrier_expect(&s.matrices_full, 2 * DP * DP * 2);
    if (threadIdx.x % 32 == 0) {
      copy_matrices<DP>(s.matrices, p.matrices_map, &s.matrices_full, h, b);
    }
    __syncwarp();
    const float* weights = nullptr;
    if (kWeighted) weights = p.weights + (static_cast<int64_t>(head) * p.nk << p.log2_block_k);
    keys.fetch(p.k_map, p.v_map, p.mask, weights, p.M, b, h, 64 * first, tiles, 64,
               TileShares<kBlocks, kWeighted, Shared>{p, s, head, first});
    return;
  }
  if constexpr (DP > 64) take_registers<240>();

  const int group = uniform(threadIdx.x / 128), warp = threadIdx.x / 32 % 4;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = 16 * warp + g;
  const bool leader = threadIdx.x % 128 == 0;
  const auto group_sync = [&] { sm90::group_sync(group); };
  float centre_grad[kTiles][2] = {};  // of the rows of this thread
  barrier_wait(&s.matrices_full, 0);
#pragma unroll 1
  for (int tile = group; tile < tiles; tile += kGroups) {
    const int stage = tile % kStages;
    auto& x = keys.x[stage];
    // Both rows of a thread lie in one block.
    const int y = min((64 * (first + tile) + 16 * warp) >> p.log2_block_k, p.nk - 1);
    float mass_grad = 0.f;
    if constexpr (kWeighted) mass_grad = p.mass_grad[static_cast<int64_t>(head) * p.nk + y];
    barrier_wait(&keys.full[stage], tile / kStages & 1);
#pragma unroll 1
    for (int unit = warp; unit < keys.kUnits; unit += 4) {
      if constexpr (Shared::kFetchMeans) {
        take_means<kBlocks, kNarrow>(keys, stage, unit, s.means[stage], p.D);
      } else {
        centre<kBlocks, kWeighted, kNarrow>(keys, stage, unit);
      }
    }
    fence_for_copies();  // products read shared memory as copies do
    group_sync();
    float dk[8 * kPanels][4], dv[8 * kPanels][4];
    pin(dk);
    pin(dv);
    wgmma_fence();
    multiply_matrix<T, false>(dv, x[0], s.matrices[0], DP * 128, false);
    multiply_matrix<T, false>(dk, x[0], s.matrices[1], DP * 128, false);
    multiply_matrix<T, true>(dk, x[1], s.matrices[0], DP * 128, true);
    wgmma_commit();
    // The place of the tile before is given back once its gradients have left.
    if (leader) store_wait();
    if (tile >= kGroups) barrier_arrive(&keys.empty[(tile - kGroups) % kStages]);
    wgmma_wait<0>();
    pin(dk);
    pin(dv);
    group_sync();
    const int count = count_of<kBlocks>(keys.valid[stage], 16 * warp);
    const float *share = nullptr, *value_share = nullptr;  // gradients of the pooled key and value
    float through[2] = {};                                 // gradients of log weights
    if constexpr (kWeighted) {
      const int at = (y - (first + tile) * kBlocks) * p.D + 2 * t;
      share = s.shares[stage][0] + at;
      value_share = s.shares[stage][1] + at;
      WeightsBackward<kBlocks, kTiles, kPanels> weights{keys.weight[stage], s.totals[group], count,
                                                        p.D};
      const auto nothing = [](int, const float2&) {};
      weights.add(x[0], dk, share, nothing);
      weights.add(x[1], dv, value_share, nothing);
      weights.finish(through, mass_grad, p.scale, group_sync);
    }
    float weight[2], factor[2];
    bool live[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 8 * half;
      live[half] = keys.valid[stage][r / 32] >> r % 32 & 1;
      weight[half] = kWeighted ? keys.weight[stage][r] : 1.f;
      factor[half] = kWeighted ? weight[half] * static_cast<float>(count) : 1.f;
    }
    const auto place = [&](bool of_keys, uint16_t(&to)[kPanels][64][64],
                           const float(&grad)[8 * kPanels][4]) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float2 u{}, centre{};
        if (kWeighted && 8 * n + 2 * t < p.D) u = load_pair(share + 8 * n);
        if (kWeighted && of_keys) centre = load_pair(s.centre + 8 * n + 2 * t);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 sum = make_float2(grad[n][2 * half], grad[n][2 * half + 1]);
          if constexpr (kWeighted) {
            sum.x = fmaf(factor[half], sum.x, weight[half] * u.x);
            sum.y = fmaf(factor[half], sum.y, weight[half] * u.y);
          }
          const int r = row + 8 * half, at = (n % 8 ^ g) * 8 + 2 * t;
          auto& pair = reinterpret_cast<uint32_t&>(to[n / 8][r][at]);
          if (kWeighted && of_keys) {
            const float2 kappa = unpack2(pair, T{});
            sum.x = fmaf(through[half], centre.x, sum.x);
            sum.y = fmaf(through[half], centre.y, sum.y);
            centre_grad[n][0] = fmaf(through[half], kappa.x, centre_grad[n][0]);
            centre_grad[n][1] = fmaf(through[half], kappa.y, centre_grad[n][1]);
          }
          pair = live[half] ? Mma<T>::pack(sum.x, sum.y) : 0;
        }
      }
    };
    place(true, x[0], dk);
    share = value_share;
    place(false, x[1], dv);
    fence_for_copies();
    group_sync();
    if (leader) {
      for (int i = 0; i < kPanels; ++i) {
        store_panel(p.grad_k_map, x[0][i], 64 * i, 64 * (first + tile), h, b);
        store_panel(p.grad_v_map, x[1][i], 64 * i, 64 * (first + tile), h, b);
      }
      store_commit();
    }
  }
  if (leader) store_wait();
  if constexpr (kWeighted) {
    const int64_t part = static_cast<int64_t>(blockIdx.x) * 4 * kGroups + 4 * group + warp;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          centre_grad[n][e] += __shfl_xor_sync(kFullWarp, centre_grad[n][e], step);
        }
      }
      if (g == 0 && 8 * n + 2 * t < p.D) {
        *reinterpret_cast<float2*>(p.centre_grads + part * p.D + 8 * n + 2 * t) =
            make_float2(centre_grad[n][0], centre_grad[n][1]);
      }
    }
  }
#endif
}

template <int DP, bool kWeighted, bool kNarrow>
cudaError_t launch_order1_keys_of(const Order1Keys& params, const Device& device,
                                  cudaStream_t stream) {
  Order1KeysMaps p{params};
  const auto map = [&](CUtensorMap* to, const void* data, const Strides& strides) {
    return tensor_map(to, Dtype::bf16, data, strides, p.B, p.Hk, p.M, p.D, 64);
  };
  const bool maps = map(&p.k_map, p.k, p.k_strides) && map(&p.v_map, p.v, p.v_strides) &&
                    map(&p.grad_k_map, p.grad_k, p.grad_k_strides) &&
                    map(&p.grad_v_map, p.grad_v, p.grad_v_strides) &&
                    matrices_map(&p.matrices_map, p.moment_grads, p.B, p.Hk, matrix_dim<DP>(p.D));
  const int64_t blocks = static_cast<int64_t>(p.B) * p.Hk * p.chunks;
  if (!maps || p.D % 8 != 0 || blocks > INT_MAX) return cudaErrorNotSupported;
  p.tiles = chunk_tiles(p.M, p.chunks, 1);
  const auto launch = [&](auto key_blocks) {
    constexpr int kBlocks = key_blocks();
    using Traits = Order1KeysTraits<DP, kBlocks, kWeighted>;
    constexpr int kBytes = sizeof(Order1KeysShared<DP, kBlocks, kWeighted>) + 1024;
    static_assert(Traits::kResident * (kBytes + 1024) <= 228 * 1024);
    if (kBytes > device.max_smem) return cudaErrorNotSupported;
    return launch_grid(order1_keys_kernel<DP, kBlocks, kWeighted, kNarrow>, blocks,
                       Traits::kThreads, kBytes, stream, p);
  };
  return p.log2_block_k == 6   ? launch(std::integral_constant<int, 1>{})
         : p.log2_block_k == 5 ? launch(std::integral_constant<int, 2>{})
                               : launch(std::integral_constant<int, 4>{});
}

template <int DP>
cudaError_t launch_order1_keys(const Order1Keys& params, const Device& device,
                               cudaStream_t stream) {
  constexpr bool kCanBeNarrow = DP == 64;
  const auto launch = [&](auto weighted) {
    return params.D <= 32
               ? launch_order1_keys_of<DP, weighted(), kCanBeNarrow>(params, device, stream)
               : launch_order1_keys_of<DP, weighted(), false>(params, device, stream);
  };
  return params.weights != nullptr ? launch(std::true_type{}) : launch(std::false_type{});
}

}  // namespace mra::cuda::sm90
