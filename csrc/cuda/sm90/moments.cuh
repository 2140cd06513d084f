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

#include "moments_columns.cuh"
#include "moments_head.cuh"

namespace mra::cuda::sm90 {

struct MomentsMaps : Moments {
  CUtensorMap k_map, v_map;
  int tiles;  // of a chunk
};

// Measured choices (docs/kernels.md).
template <int DP, Weights kWeights>
struct MomentsTraits {
  static constexpr int kBlocks = moments_resident(DP, kWeights == Weights::even);
  static constexpr int kStages = kBlocks == 3 ? 4 : 6;
  static constexpr int kThreads = DP == 128 ? 384 : 160 + 32 * weighers(kWeights);
  // Registers of threads that fetch and weigh, and of the others, at DP = 128: no more than the
  // launch has, or the others wait forever.
  static constexpr int kFew = kWeights == Weights::sampled ? 104 : makes(kWeights) ? 56 : 24;
  static constexpr int kMany = kWeights == Weights::sampled ? 200 : makes(kWeights) ? 224 : 240;
  static_assert(kFew + 2 * kMany <= 504);
};

// kNarrow: head dims up to 32. kWhole: with what WholeHead asks for.
template <typename T, int DP, int kBlocks, Weights kWeights, bool kNarrow, bool kWhole>
__global__ void __launch_bounds__(MomentsTraits<DP, kWeights>::kThreads,
                                  MomentsTraits<DP, kWeights>::kBlocks)
    moments_kernel(const __grid_constant__ MomentsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Traits = MomentsTraits<DP, kWeights>;
  constexpr bool kWeighted = kWeights != Weights::even;
  using Shared = MomentsTiles<T, DP, Traits::kStages, kBlocks, kWeights, kWhole>;
  constexpr int kStages = Shared::kStages, kPanels = DP / 64, kDim = kNarrow ? 32 : DP;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  let_next_start();
  s.init(4 * kPanels);
  const int head = kWhole ? blockIdx.x : blockIdx.x / p.chunks;
  const int chunk = kWhole ? 0 : blockIdx.x - head * p.chunks;
  const int b = head / p.Hk, h = head - b * p.Hk, first = chunk * p.tiles;
  const int tiles = uniform(min(p.tiles, (p.M + 63) / 64 - first));
  // Of a whole head all places but the last, which is room before, are fetched first.
  const int ahead = kWhole ? min(kStages - 1, tiles) : 0;
  const auto fetch = [&](int done, int end) {
    s.keys.fetch(p.k_map, p.v_map, p.mask, nullptr, p.M, b, h, 64 * first, end, 64, NothingElse{},
                 done);
  };
  if constexpr (kWhole) {
    if (blockIdx.x == 0 && p.whole.plan.queues != nullptr) clear_queues(p.whole.plan.queues);
    if (warp_index() == 4 * kPanels) fetch(0, ahead);
    pool_queries<T, kDim>(p, head, b, h, s.query_count);
    __syncthreads();
    if (h == 0) {
      const int x = threadIdx.x;
      if (x < p.whole.query.n) p.whole.query.count[b * p.whole.query.n + x] = s.query_count[x];
    }
    if constexpr (kWeighted) {
      using Room = float4[kShortHeadThreads];
      static_assert(sizeof(Room) <= sizeof(s.keys.x[0]) && Traits::kThreads >= kShortHeadThreads);
      find_centre<DP>(p, head, s.query_count, reinterpret_cast<Room&>(s.keys.x[kStages - 1]),
                      s.centre);
      fence_for_copies();
      __syncthreads();
    }
  }
  if (warp_index() >= 4 * kPanels) {
    if constexpr (DP > 64) give_registers<Traits::kFew>();
    const int role = warp_index() - 4 * kPanels;
    if (role == 0) fetch(ahead, tiles);
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
  const uint32_t less_one = Mma<T>::pack(-1.f, -1.f);
  float moment[8 * kPanels][4] = {}, sigma[8 * kPanels][4] = {};
  // Sums of the left side by blocks, of 16, with the sign changed: of eight, and of those of now.
  float rest[2][4] = {};
  int keys = 0, stage = 0, phase = 0;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    barrier_wait(&s.keys.full[stage], phase);
    if constexpr (kWeighted) barrier_wait(&s.weighed[stage], phase);
    const uint32_t valid[2] = {s.keys.valid[stage][0], s.keys.valid[stage][1]};
    keys += __popc(valid[0]) + __popc(valid[1]);
    // Copies fill with zeros what lies behind the last key.
    if (p.mask != nullptr && (valid[0] & valid[1]) != kFullWarp) columns.clear(stage);
    uint32_t a[4][4];
    columns.load_deviations(a, stage, valid);
    pin(moment);
    pin(sigma);
    wgmma_fence();
    multiply_pn<T>(moment, a, s.keys.x[stage][1]);
    multiply_pn<T>(sigma, a, s.keys.x[stage][0]);
    wgmma_commit();
    const int block = (first + tile) * kBlocks;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t one = g == (block + k * kBlocks / 4) % 8 ? less_one : 0u;
      Mma<T>::product(rest[1], columns.as_left(a[k]), one, one);
    }
    columns.keep_values(stage, valid);
    wgmma_wait<0>();
    pin(moment);
    pin(sigma);
    const int last = block + kBlocks - 1;
    if (last % 16 < 8 && (last % 8 == 7 || tile + 1 == tiles)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) rest[0][i] = rest[1][i], rest[1][i] = 0.f;
    }
    if (last % 16 == 15 || tile + 1 == tiles) {
      consumer_sync<DP>();  // of all columns
      columns.take_off(moment, rest, 1, last);
      columns.take_off(sigma, rest, 0, last);
#pragma unroll
      for (int i = 0; i < 8; ++i) rest[i / 4][i % 4] = 0.f;
    }
    barrier_arrive(&s.keys.empty[stage]);
    columns.advance();
    if (++stage == kStages) stage = 0, phase ^= 1;
  }

  const int row = 64 * group + 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
  if (!kWhole && kNarrow && row >= kDim) return;
  constexpr float kUndo = kWeighted ? 64.f / kBlocks : 1.f;  // what weights lack
  const auto store = [&](const float(&c)[8 * kPanels][4], int which) {
    if (kNarrow && row >= kDim) return;
    const int64_t matrix = static_cast<int64_t>(blockIdx.x) * 2 + which;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = (matrix * kDim + row + 8 * half) * kDim + threadIdx.x % 4 * 2;
#pragma unroll
      for (int n = 0; n < 8 * kPanels; ++n) {
        if (8 * n >= kDim) break;
        const float u = c[n][2 * half] * kUndo, w = c[n][2 * half + 1] * kUndo;
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
  if constexpr (kWhole) {
    consumer_sync<DP>();  // the matrices are there, and no warp reads the ring
    unsigned place = smem_address(raw);
    asm volatile("" : "+r"(place));  // or the address of what follows is held, and spills
    Shared& s = *reinterpret_cast<Shared*>(raw + (-place & 1023));
    if constexpr (kWeighted) multiply_centre<kDim>(p, head, s.centre);
    if (p.whole.plan.index == nullptr) return;
    auto& means = reinterpret_cast<PlanMeans<kDim>&>(s.keys.x);
    static_assert(sizeof(means) <= sizeof(s.keys.x));
    plan_head<kDim, 4 * kPanels>(p, head, means, s.query_count, s.key_count,
                                 [] { consumer_sync<DP>(); });
  }
#endif
}

template <typename T, int DP, Weights kWeights, bool kNarrow, bool kWhole = false>
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
    using Shared = MomentsTiles<T, DP, Traits::kStages, kBlocks, kWeights, kWhole>;
    constexpr int kBytes = sizeof(Shared) + 1024;
    if (kBytes > device.max_smem) return cudaErrorNotSupported;
    const auto kernel = moments_kernel<T, DP, kBlocks, kWeights, kNarrow, kWhole>;
    return launch_grid(kernel, blocks, Traits::kThreads, kBytes, stream, p);
  };
  if (p.log2_block_k == 6) return launch(std::integral_constant<int, 1>{});
  if (kWhole || p.log2_block_k == 5) return launch(std::integral_constant<int, 2>{});
  return launch(std::integral_constant < int, kWhole ? 2 : 4 > {});
}

// Head dims from kDim / 2 on: lanes that pool a row of queries.
template <int DP, Weights kWeights>
cudaError_t launch_whole_heads(const Moments& params, const Device& device, cudaStream_t stream) {
  using T = __nv_bfloat16;
  if (DP == 64 && params.D <= 32) {
    return launch_moments_of<T, DP, kWeights, DP == 64, true>(params, device, stream);
  }
  return launch_moments_of<T, DP, kWeights, false, true>(params, device, stream);
}

template <int DP>
cudaError_t launch_moments(const Moments& params, const Device& device, cudaStream_t stream) {
  if (params.whole.query.mean != nullptr) {
    if (params.whole.centre == nullptr) {
      return launch_whole_heads<DP, Weights::even>(params, device, stream);
    }
    // Beyond 64 columns there are not enough registers.
    if constexpr (DP > 64) return cudaErrorNotSupported;
    return launch_whole_heads<64, Weights::centred>(params, device, stream);
  }
  constexpr bool kCanBeNarrow = DP == 64;
  const auto launch = [&](auto t, auto weights) {
    using T = decltype(t);
    return params.D <= 32
               ? launch_moments_of<T, DP, weights(), kCanBeNarrow>(params, device, stream)
               : launch_moments_of<T, DP, weights(), false>(params, device, stream);
  };
  const auto by_weights = [&](auto t) {
    if (params.made.parts != nullptr) {
      return launch(t, std::integral_constant<Weights, Weights::sampled>{});
    }
    if (params.made.sample != nullptr) {
      return launch(t, std::integral_constant<Weights, Weights::centred>{});
    }
    return params.weights != nullptr ? launch(t, std::integral_constant<Weights, Weights::given>{})
                                     : launch(t, std::integral_constant<Weights, Weights::even>{});
  };
  if (params.dtype == Dtype::bf16) return by_weights(__nv_bfloat16{});
  return params.sums == nullptr ? cudaErrorNotSupported : by_weights(__half{});
}

}  // namespace mra::cuda::sm90
