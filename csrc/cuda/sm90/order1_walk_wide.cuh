// The order-1 term of the queries for head dims beyond 128, as order1_walk_rows.cuh, where the pair
// of matrices is too large for one block of threads: each has 128 columns of one, its two halves of
// rows as a pair, and sees all columns of the queries and keys.
//
//   sums       first += kappa_0^T r,  second += kappa_1^T r     r: 128 columns of nu, or of kappa
//   variance   x = q_0 first + q_1 second, and its product with the same columns of q
//   term       out += P gamma s / n x
#pragma once

#include "order1_walk.cuh"

namespace mra::cuda::sm90 {

struct WalkWideMaps : WalkWide {
  CUtensorMap k_map, v_map, q_map, out_map;
  int tiles;  // of a chunk
};

// As KeyTiles: 256 columns of keys, then 128 of values.
template <typename Value, int kPlaces>
struct WideKeyTiles {
  using T = Value;
  static constexpr int kStages = kPlaces, kPanels = 6;
  uint16_t x[kStages][1][kPanels][64][64];
  uint32_t valid[kStages][2];
  uint64_t full[kStages], empty[kStages];
  float weight[1][64];

  __device__ __forceinline__ auto& panel(int stage, int which, int i) { return x[stage][which][i]; }

  // By one warp: `panels` of the six, values from column `column` on.
  __device__ void fetch(const WalkWideMaps& p, int panels, int column, int b, int h, int first,
                        int tiles) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % kStages, key = first + 64 * tile;
      uint32_t bits[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = key + 32 * half + lane;
        const bool there =
            j < p.M && (p.mask == nullptr || p.mask[static_cast<int64_t>(b) * p.M + j]);
        bits[half] = __ballot_sync(kFullWarp, there);
      }
      if (tile >= kStages) barrier_wait(&empty[stage], tile / kStages - 1 & 1);
      if (lane == 0) {
        valid[stage][0] = bits[0];
        valid[stage][1] = bits[1];
      }
      barrier_expect(&full[stage], panels * 64 * 64 * 2);
      if (lane == 0) {
        for (int i = 0; i < panels; ++i) {
          copy_panel(x[stage][0][i], i < 4 ? p.k_map : p.v_map, &full[stage],
                     i < 4 ? 64 * i : column + 64 * (i - 4), key, h, b);
        }
      }
      __syncwarp();
    }
  }
};

template <typename T, bool kSums>
struct WalkWideShared {
  static constexpr int kStages = 2;
  uint16_t matrices[kSums ? 1 : 2][2][128][64];
  uint16_t q[kSums ? 1 : kStages][4][64][64];
  WideKeyTiles<T, kSums ? 3 : 1> keys;
  float dots[2][2][64];  // of even and odd turns, of each warpgroup
  float most[2][8];
  uint64_t full[kStages], empty[kStages];
  int keys_before;
};

template <typename T, int kBlocks, WideStep kStep, bool kCausal>
__global__ void __launch_bounds__(WalkTraits<128>::kThreads, 1)
    order1_walk_wide_kernel(const __grid_constant__ WalkWideMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Traits = WalkTraits<128>;
  constexpr bool kSums = kStep == WideStep::sums, kTerm = kStep == WideStep::term;
  using Shared = WalkWideShared<T, kSums>;
  using Half = uint16_t[2][64][64];
  constexpr int kStages = Shared::kStages, kKeyStages = decltype(Shared::keys)::kStages;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  if (threadIdx.x == 0) {
    barrier_init_ring(s.keys.full, s.keys.empty, Traits::kConsumers);
    barrier_init_ring(s.full, s.empty, Traits::kConsumers);
    barrier_init_done();
    s.keys_before = 0;
  }
  __syncthreads();
  // Blocks of threads that read the same lie side by side.
  constexpr int kEach = kSums ? 4 : 2;
  const int item = blockIdx.x / kEach, columns = blockIdx.x % 2;
  const bool sigma = kSums ? blockIdx.x % 4 >= 2 : !kTerm;
  const int key_head = item / p.chunks, chunk = item - key_head * p.chunks;
  const int b = key_head / p.Hk, hk = key_head - b * p.Hk, group = p.H / p.Hk;
  const int first = chunk * p.tiles;
  const int tiles = uniform(min(p.tiles, ((kSums ? p.M : p.N) + 63) / 64 - first));
  const int panels = sigma ? 4 : 6;  // of keys and values
  int seen = 0;
  if constexpr (!kSums) {
    const int blocks_before = kCausal ? min(first * kBlocks, p.nk) : p.nk;
    seen = count_keys(p.key_count, p.nk, b, blocks_before, s.keys_before);
  }
  const int warp = warp_index();
  if (warp >= Traits::kConsumers) {
    give_registers<Traits::kGiven>();
    if (warp == Traits::kConsumers) {
      // Where rows are walked nothing comes behind the last tile's keys.
      const int key_tiles = kSums ? tiles : kCausal ? tiles - 1 : 0;
      s.keys.fetch(p, panels, 128 * columns, b, hk, 64 * first, key_tiles);
    } else if (!kSums && warp == Traits::kConsumers + 1) {
#pragma unroll 1
      for (int turn = 0; turn < tiles * group; ++turn) {
        const int stage = turn % kStages, tile = turn / group;
        const int h = hk * group + turn - tile * group;
        if (turn >= kStages) barrier_wait(&s.empty[stage], turn / kStages - 1 & 1);
        barrier_expect(&s.full[stage], sizeof(s.q[stage]));
        if (threadIdx.x % 32 == 0) {
          for (int i = 0; i < 4; ++i) {
            copy_panel(s.q[stage][i], p.q_map, &s.full[stage], 64 * i, 64 * (first + tile), h, b);
          }
        }
        __syncwarp();
      }
    }
    return;
  }
  take_registers<Traits::kTaken>();

  const int panel = uniform(threadIdx.x / 128), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row = threadIdx.x / 32 % 4 * 16 + g;
  const int64_t slot =
      ((static_cast<int64_t>(sigma) * 2 + columns) * p.B * p.Hk + key_head) * p.slots +
      (kSums || kCausal ? chunk : p.slots - 1);
  WalkedPair<128> sums;
  sums.load(kSums ? nullptr : p.sums, slot, 128);

  // Adds the keys of a tile; returns how many count.
  const auto add_keys = [&](int tile) {
    const int stage = tile % kKeyStages;
    barrier_wait(&s.keys.full[stage], tile / kKeyStages & 1);
    int count = 0;
#pragma unroll 1
    for (int unit = warp; unit < 2 * panels; unit += Traits::kConsumers) {
      count = centre<kBlocks, false, false>(s.keys, stage, unit);
    }
    fence_for_copies();  // products read shared memory as copies do
    consumer_sync<128>();
    auto& x = s.keys.x[stage][0];
    const auto& right = reinterpret_cast<const Half&>(x[sigma ? 2 * columns : 4]);
    sums.pin_both();
    wgmma_fence();
    multiply_tn<T>(sums.first, x[panel], right, true);
    multiply_tn<T>(sums.second, x[2 + panel], right, true);
    wgmma_commit();
    wgmma_wait<0>();
    sums.pin_both();
    barrier_arrive(&s.keys.empty[stage]);
    return count;
  };
  if constexpr (kSums) {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) add_keys(tile);
    sums.store(p.sums, slot, 128);
    return;
  } else {
    int turn = 0;
    float of_x = 0.f;  // what products with the matrices in shared memory need
    // One tile of queries of head h.
    const auto walk = [&](int tile, int h) {
      const int stage = turn % kStages;
      const int64_t head = static_cast<int64_t>(b) * p.H + h;
      const int64_t parts = static_cast<int64_t>(p.B) * p.H * p.N;
      const int first_row = 64 * (first + tile);
      auto& q = s.q[stage];
      auto& own = q[2 * columns + panel];
      float share[2] = {}, variance[2] = {};
      if constexpr (kTerm) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = first_row + row + 8 * half;
          if (i >= p.N) continue;
          share[half] = p.share[head * p.N + i];
          variance[half] = p.variance[head * p.N + i] + p.variance[parts + head * p.N + i];
        }
      }
      barrier_wait(&s.full[stage], turn / kStages & 1);
      float x[8][4];
      pin(x);
      wgmma_fence();
      multiply_columns<T, false>(x, reinterpret_cast<const Half&>(q[0]), s.matrices[0], panel,
                                 false);
      multiply_columns<T, false>(x, reinterpret_cast<const Half&>(q[2]), s.matrices[1], panel,
                                 true);
      wgmma_commit();
      wgmma_wait<0>();
      pin(x);
      const auto place = [&](int n, int half) {
        return reinterpret_cast<uint32_t*>(&own[row + 8 * half][(n ^ g) * 8 + 2 * t]);
      };
      if constexpr (!kTerm) {
        float(&dots)[2][64] = s.dots[turn % 2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float v = 0.f;
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const float2 y = unpack2(*place(n, half), T{});
            v += y.x * x[n][2 * half] + y.y * x[n][2 * half + 1];
          }
          v = quad_sum(v);
          if (t == 0) dots[panel][row + 8 * half] = v;
        }
        barrier_arrive(&s.empty[stage]);
        consumer_sync<128>();
        const int r = threadIdx.x, i = first_row + r;
        if (r < 64 && i < p.N) {
          p.variance[columns * parts + head * p.N + i] = of_x * (dots[0][r] + dots[1][r]);
        }
      } else {
        if (turn > 0) arrive_behind_stores(&s.empty[(turn - 1) % kStages]);
        consumer_sync<128>();  // no product reads this tile any more
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float gamma = reciprocal_approx(1.f + p.scale * p.scale / 4 * variance[half]);
          const bool any = share[half] != 0.f;
          const float a = any ? share[half] * gamma * p.scale * of_x : 0.f;
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            *place(n, half) = any ? Mma<T>::pack(a * x[n][2 * half], a * x[n][2 * half + 1]) : 0;
          }
        }
        fence_for_copies();
        consumer_sync<128>();
        if (threadIdx.x == 0) {
          for (int i = 2 * columns; i < 2 * columns + 2; ++i) {
            add_panel(p.out_map, q[i], 64 * i, first_row, h, b);
          }
          store_commit();
        }
        __syncwarp();
      }
      ++turn;
    };
#pragma unroll 1
    for (int tile = 0;; ++tile) {
      if (kCausal ? (first + tile) % p.unit_tiles == 0 : tile == 0) {
        float factors[2] = {1.f, 1.f};
        if constexpr (std::is_same_v<T, __half>) {
          sums.fit(s.most, factors);
          factors[0] = factors[1] = fminf(factors[0], factors[1]);  // of one matrix
        }
        sums.template place<T>(s.matrices, factors[0], factors[1]);
        fence_for_copies();  // products read shared memory as copies do
        of_x = 1.f / (factors[0] * static_cast<float>(max(seen, 1)));
      }
      consumer_sync<128>();
#pragma unroll 1
      for (int i = 0; i < group; ++i) walk(tile, hk * group + i);
      if (tile == tiles - 1) break;
      if constexpr (kCausal) seen += add_keys(tile);
    }
    if (threadIdx.x == 0) store_wait();
  }
#endif
}

template <typename T>
cudaError_t launch_order1_walk_wide(const WalkWide& params, const Device& device,
                                    cudaStream_t stream) {
  WalkWideMaps p{params};
  const bool sums = p.step == WideStep::sums, term = p.step == WideStep::term;
  const auto map = [&](CUtensorMap* to, const void* data, const Strides& strides, int heads,
                       int length) {
    return tensor_map(to, kDtype<T>, data, strides, p.B, heads, length, p.D, 64);
  };
  const bool maps =
      map(&p.k_map, p.k, p.k_strides, p.Hk, p.M) && map(&p.v_map, p.v, p.v_strides, p.Hk, p.M) &&
      map(&p.q_map, p.q, p.q_strides, p.H, p.N) && map(&p.out_map, p.out, p.out_strides, p.H, p.N);
  const size_t bytes =
      1024 + (sums ? sizeof(WalkWideShared<T, true>) : sizeof(WalkWideShared<T, false>));
  const int64_t blocks = static_cast<int64_t>(p.B) * p.Hk * p.chunks * (sums ? 4 : 2);
  if (!maps || bytes > static_cast<size_t>(device.max_smem) || blocks > INT_MAX) {
    return cudaErrorNotSupported;
  }
  p.tiles = chunk_tiles(sums ? p.M : p.N, p.chunks, p.unit_tiles);
  const auto by_blocks = [&](auto step, auto causal) {
    constexpr WideStep kStep = decltype(step)::value;
    constexpr bool kCausal = decltype(causal)::value;
    if constexpr (!kCausal && kStep != WideStep::sums) {
      return order1_walk_wide_kernel<T, 1, kStep, false>;
    } else {
      return p.log2_block_k == 6   ? order1_walk_wide_kernel<T, 1, kStep, kCausal>
             : p.log2_block_k == 5 ? order1_walk_wide_kernel<T, 2, kStep, kCausal>
                                   : order1_walk_wide_kernel<T, 4, kStep, kCausal>;
    }
  };
  using Sums = std::integral_constant<WideStep, WideStep::sums>;
  using Variance = std::integral_constant<WideStep, WideStep::variance>;
  using Add = std::integral_constant<WideStep, WideStep::term>;
  const auto kernel =
      sums ? by_blocks(Sums{}, std::false_type{})
      : p.causal
          ? (term ? by_blocks(Add{}, std::true_type{}) : by_blocks(Variance{}, std::true_type{}))
          : (term ? by_blocks(Add{}, std::false_type{}) : by_blocks(Variance{}, std::false_type{}));
  return launch_grid(kernel, blocks, WalkTraits<128>::kThreads, bytes, stream, p);
}

}  // namespace mra::cuda::sm90
