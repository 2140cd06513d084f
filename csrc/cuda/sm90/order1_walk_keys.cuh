// Order 1 of the keys under causal in the backward pass. With dC and dSigma the sums over the rows
// of the units behind of q^T (w_a dO) and q^T (w_b q), w the weights that the rows' kernel leaves:
//
//   dv_j = kappa_j dC,   dk_j = nu_j dC^T + 2 kappa_j dSigma
//
// kappa and nu as in order1_keys.cuh. A chunk's tiles are walked from the last one on; behind the
// keys of a tile its rows are added to dC and dSigma. Without kWalk: only that, the sums of a
// chunk. With weighted means the results are times weight and count, the weight times the gradients
// of the pooled key and value is added, and what comes through the weights (docs/algorithm.md);
// what the centres get of it goes to memory, a sum for each 16 keys.
#pragma once

#include "order1_walk_block.cuh"

namespace mra::cuda::sm90 {

struct WalkKeysMaps : WalkKeys {
  CUtensorMap k_map, v_map, q_map, grad_out_map, grad_k_map, grad_v_map;
  int tiles;  // of a chunk
};

template <int DP, bool kWalk, bool kWeighted>
struct WalkKeysShared {
  static constexpr int kPanels = DP / 64, kStages = 2;
  uint16_t matrices[kWalk ? 2 : 1][kPanels][DP][64];  // dC, 2 dSigma
  uint16_t rows[kStages][2][kPanels][64][64];         // q, dO
  uint16_t weighted_q[kPanels][64][64];
  KeyTiles<DP, kWalk ? 2 : 1, kWalk && kWeighted> keys;
  alignas(16) float2 weights[kStages][64];
  float dots[kPanels][64], totals[4];  // with weighted means: of keys, and of 16 of them
  uint64_t full[kStages], empty[kStages];
  uint64_t centred[kWeighted ? kStages : 1];  // q, by two warps
};

// A tile of rows: dO times w_a where it lies, q times w_b to `weighted`, zeros in q for a row
// without weight, which may hold anything. Each warpgroup one panel.
template <int kPanels>
__device__ __forceinline__ void weigh_rows(uint16_t (&rows)[2][kPanels][64][64],
                                           uint16_t (&weighted)[kPanels][64][64],
                                           const float2 (&weights)[64], int panel) {
  using T = __nv_bfloat16;
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 16 * i + thread / 8, column = thread % 8 * 8;
    const float2 weight = weights[row];
    const bool any = weight.x != 0.f || weight.y != 0.f;
    auto* const q = reinterpret_cast<uint4*>(&rows[0][panel][row][column]);
    auto* const grad = reinterpret_cast<uint4*>(&rows[1][panel][row][column]);
    const auto times = [](const uint4& bits, float factor) {
      float x[8];
      unpack16<T>(bits, x);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] *= factor;
      return make_uint4(Mma<T>::pack(x[0], x[1]), Mma<T>::pack(x[2], x[3]),
                        Mma<T>::pack(x[4], x[5]), Mma<T>::pack(x[6], x[7]));
    };
    *reinterpret_cast<uint4*>(&weighted[panel][row][column]) = any ? times(*q, weight.y) : uint4{};
    *grad = any ? times(*grad, weight.x) : uint4{};
    if (!any) *q = uint4{};
  }
}

template <int DP, int kBlocks, bool kWalk, bool kWeighted>
__global__ void __launch_bounds__(WalkTraits<DP>::kThreads, WalkTraits<DP>::kBlocks)
    order1_walk_keys_kernel(const __grid_constant__ WalkKeysMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = __nv_bfloat16;
  using Traits = WalkTraits<DP>;
  using Shared = WalkKeysShared<DP, kWalk, kWeighted>;
  constexpr int kPanels = DP / 64, kStages = Shared::kStages;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  if (threadIdx.x == 0) {
    s.keys.init(Traits::kConsumers);
    barrier_init_ring(s.full, s.empty, Traits::kConsumers);
    for (auto& barrier : s.centred) barrier_init(&barrier, 2);
    barrier_init_done();
  }
  __syncthreads();
  const Walk at(p, p.tiles);
  const int last = at.first + at.tiles - 1;
  // The rows of the chunk's first tile come last, and nothing behind them.
  const int row_tiles = kWalk ? at.tiles - 1 : at.tiles;
  const int warp = warp_index();
  if (warp >= Traits::kConsumers) {
    give_registers<Traits::kGiven>();
    if (warp == Traits::kConsumers) {
      if constexpr (kWalk) {
        const float* weights = nullptr;
        if constexpr (kWeighted) weights = p.key_weights + (at.key_head * p.nk << p.log2_block_k);
        s.keys.fetch(p.k_map, p.v_map, p.mask, weights, p.N, at.b, at.hk, 64 * last, at.tiles, -64);
      }
    } else if (warp == Traits::kConsumers + 1) {
      const int64_t padded = (p.N + 63) / 64 * 64;
#pragma unroll 1
      for (int turn = 0; turn < row_tiles * at.group; ++turn) {
        const int stage = turn % kStages, tile = turn / at.group;
        const int h = at.hk * at.group + turn - tile * at.group, row = 64 * (last - tile);
        const int64_t head = static_cast<int64_t>(at.b) * p.H + h;
        if (turn >= kStages) barrier_wait(&s.empty[stage], turn / kStages - 1 & 1);
        barrier_expect(&s.full[stage], 2 * 64 * DP * 2 + sizeof(s.weights[stage]));
        if (threadIdx.x % 32 == 0) {
          for (int i = 0; i < kPanels; ++i) {
            copy_panel(s.rows[stage][0][i], p.q_map, &s.full[stage], 64 * i, row, h, at.b);
            copy_panel(s.rows[stage][1][i], p.grad_out_map, &s.full[stage], 64 * i, row, h, at.b);
          }
          copy_bytes(s.weights[stage], p.weights + 2 * (head * padded + row),
                     sizeof(s.weights[stage]), &s.full[stage]);
        }
        __syncwarp();
      }
    } else if constexpr (kWeighted) {
#pragma unroll 1
      for (int turn = 0; turn < row_tiles * at.group; ++turn) {
        const int stage = turn % kStages, row = 64 * (last - turn / at.group);
        barrier_wait(&s.full[stage], turn / kStages & 1);
        centre_queries<T>(s.rows[stage][0], p, at.b, at.key_head, row,
                          warp - Traits::kConsumers - 2);
        fence_for_copies();
        barrier_arrive(&s.centred[stage]);
      }
    }
    return;
  }
  take_registers<Traits::kTaken>();

  const int panel = uniform(threadIdx.x / 128), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row = threadIdx.x / 32 % 4 * 16 + g;
  const int64_t chunk = static_cast<int64_t>(at.key_head) * p.chunks + at.chunk;
  WalkedPair<DP> sums;
  sums.load(kWalk ? p.start : nullptr, chunk, matrix_dim<DP>(p.D));
  int turn = 0;

  const auto add_rows = [&] {
    const int stage = turn % kStages;
    auto& rows = s.rows[stage];
    barrier_wait(&s.full[stage], turn / kStages & 1);
    if constexpr (kWeighted) barrier_wait(&s.centred[stage], turn / kStages & 1);
    weigh_rows(rows, s.weighted_q, s.weights[stage], panel);
    fence_for_copies();  // products read shared memory as copies do
    consumer_sync<DP>();
    sums.pin_both();
    wgmma_fence();
    multiply_tn<T>(sums.first, rows[0][panel], rows[1], true);
    multiply_tn<T>(sums.second, rows[0][panel], s.weighted_q, true);
    wgmma_commit();
    wgmma_wait<0>();
    sums.pin_both();
    barrier_arrive(&s.empty[stage]);
    consumer_sync<DP>();  // no product reads weighted_q any more
    ++turn;
  };
  if constexpr (!kWalk) {
#pragma unroll 1
    for (int i = 0; i < row_tiles * at.group; ++i) add_rows();
    sums.store(p.sums, chunk, matrix_dim<DP>(p.D));
    return;
  } else {
#pragma unroll 1
    for (int tile = 0;; ++tile) {
      const int stage = tile % 2, key_tile = last - tile;
      auto& x = s.keys.x[stage];
      // The unit's last tile, or that of the keys.
      if (tile == 0 || (key_tile + 1) % p.unit_tiles == 0)
        sums.template place<T>(s.matrices, 1.f, 2.f);
      barrier_wait(&s.keys.full[stage], tile / 2 & 1);
      centre<kBlocks, kWeighted, false>(s.keys, stage, threadIdx.x / 32);
      fence_for_copies();
      consumer_sync<DP>();
      const uint32_t valid[2] = {s.keys.valid[stage][0], s.keys.valid[stage][1]};
      const auto pair_at = [&](uint16_t(&of)[kPanels][64][64], int n, int half) -> uint32_t& {
        return reinterpret_cast<uint32_t&>(of[panel][row + 8 * half][(n ^ g) * 8 + 2 * t]);
      };
      WalkedBlock<kBlocks, kWeighted, Shared> block(p, s, at.key_head, key_tile, stage, valid);
      float grad[8][4];
      uint32_t dv[8][2];
      const auto start = [&](float(&of_value)[8][4]) {
        pin(of_value);
        wgmma_fence();
        multiply_columns<T, false>(of_value, x[0], s.matrices[0], panel, false);
      };
      const auto keep_value = [&](const float(&of_value)[8][4]) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          dv[n][0] = Mma<T>::pack(of_value[n][0], of_value[n][1]);
          dv[n][1] = Mma<T>::pack(of_value[n][2], of_value[n][3]);
        }
      };
      const auto add_key = [&] {
        multiply_columns<T, false>(grad, x[0], s.matrices[1], panel, false);
        multiply_columns<T, true>(grad, x[1], s.matrices[0], panel, true);
        wgmma_commit();
        wgmma_wait<0>();
        pin(grad);
      };
      if constexpr (kWeighted) {  // one behind the other: registers are full
        start(grad);
        wgmma_commit();
        wgmma_wait<0>();
        pin(grad);
        block.add_mean(grad, 1,
                       [&](int n, int half) { return unpack2(pair_at(x[1], n, half), T{}); });
        keep_value(grad);
        pin(grad);
        wgmma_fence();
        add_key();
      } else {
        float of_value[8][4];
        pin(grad);
        start(of_value);
        add_key();
        pin(of_value);
        keep_value(of_value);
      }
      // The place of the tile before is given back once its gradients have left.
      if (tile > 0) arrive_behind_stores(&s.keys.empty[(tile - 1) % 2]);
      consumer_sync<DP>();
      const auto kappa = [&](int n, int half) { return unpack2(pair_at(x[0], n, half), T{}); };
      block.add_mean(grad, 0, kappa);
      block.add_through(grad, kappa, [] { consumer_sync<DP>(); });
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 8 * half;
        const bool live = valid[r / 32] >> r % 32 & 1;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          pair_at(x[0], n, half) =
              live ? Mma<T>::pack(grad[n][2 * half], grad[n][2 * half + 1]) : 0;
          pair_at(x[1], n, half) = live ? dv[n][half] : 0;
        }
      }
      fence_for_copies();
      consumer_sync<DP>();
      if (threadIdx.x == 0) {
        for (int i = 0; i < kPanels; ++i) {
          store_panel(p.grad_k_map, x[0][i], 64 * i, 64 * key_tile, at.hk, at.b);
          store_panel(p.grad_v_map, x[1][i], 64 * i, 64 * key_tile, at.hk, at.b);
        }
        store_commit();
      }
      __syncwarp();
      if (tile == at.tiles - 1) break;
#pragma unroll 1
      for (int i = 0; i < at.group; ++i) add_rows();
    }
    if (threadIdx.x == 0) store_wait();
  }
#endif
}

template <int DP>
cudaError_t launch_order1_walk_keys(const WalkKeys& params, const Device& device,
                                    cudaStream_t stream) {
  WalkKeysMaps p{params};
  if (p.dtype != Dtype::bf16) return cudaErrorNotSupported;
  const bool walk = p.sums == nullptr;
  const auto map = [&](CUtensorMap* to, const void* data, const Strides& strides, int heads) {
    return tensor_map(to, Dtype::bf16, data, strides, p.B, heads, p.N, p.D, 64);
  };
  const bool maps =
      map(&p.q_map, p.q, p.q_strides, p.H) &&
      map(&p.grad_out_map, p.grad_out, p.grad_out_strides, p.H) &&
      (!walk || (map(&p.k_map, p.k, p.k_strides, p.Hk) && map(&p.v_map, p.v, p.v_strides, p.Hk) &&
                 map(&p.grad_k_map, p.grad_k, p.grad_k_strides, p.Hk) &&
                 map(&p.grad_v_map, p.grad_v, p.grad_v_strides, p.Hk)));
  const int64_t blocks = static_cast<int64_t>(p.B) * p.Hk * p.chunks;
  if (!maps || blocks > INT_MAX) return cudaErrorNotSupported;
  p.tiles = chunk_tiles(p.N, p.chunks, p.unit_tiles);
  const auto launch = [&](auto key_blocks, auto walks, auto weighted) {
    constexpr int kBytes = 1024 + sizeof(WalkKeysShared<DP, walks(), weighted()>);
    if (kBytes > device.max_smem) return cudaErrorNotSupported;
    return launch_grid(order1_walk_keys_kernel<DP, key_blocks(), walks(), weighted()>, blocks,
                       WalkTraits<DP>::kThreads, kBytes, stream, p);
  };
  const auto by_blocks = [&](auto weighted) {
    constexpr std::integral_constant<int, 1> one;
    if (!walk) return launch(one, std::false_type{}, weighted);
    if (p.log2_block_k == 6) return launch(one, std::true_type{}, weighted);
    return p.log2_block_k == 5
               ? launch(std::integral_constant<int, 2>{}, std::true_type{}, weighted)
               : launch(std::integral_constant<int, 4>{}, std::true_type{}, weighted);
  };
  return p.key_weights != nullptr ? by_blocks(std::true_type{}) : by_blocks(std::false_type{});
}

}  // namespace mra::cuda::sm90
