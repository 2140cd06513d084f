// Gradients of the keys and values on Hopper: what sm80/backward_columns.cuh computes for the keys
// of one block from the rows of its column list, for half types and head dims up to 128. A block of
// threads takes 64 keys: one warp fetches tiles of 64 rows, a warpgroup multiplies with the scores
// transposed. Registers move from the fetching warps to those that hold two accumulators.
#pragma once

#include "backward.h"
#include "../sm80/tile.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

struct BackwardColumnsMaps : BackwardParams {
  CUtensorMap q_map, grad_out_map, k_map, v_map, moments_map;
};

template <int DP>
struct BackwardColumnsShared {
  static constexpr int kStages = 2, kPanels = DP / 64;
  uint16_t k[kPanels][64][64], v[kPanels][64][64];
  uint16_t q[kStages][kPanels][64][64], grad_out[kStages][kPanels][64][64];
  float lse[kStages][64], delta[kStages][64];
  int first[kStages][4];  // first row of each sixteen
  uint64_t keys_full, full[kStages], empty[kStages];
};

// A tile of 64 keys and how many tiles of rows attend it.
struct KeyTile {
  int b, hk, first_key, keys, block;

  __device__ explicit KeyTile(const BackwardParams& p) {
    unsigned item;  // looked up anew each time: kept, what follows from it would cost registers
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(item));
    const unsigned key_tiles = (p.M + 63) / 64, head = item / key_tiles;
    first_key = (item - head * key_tiles) * 64;
    b = head / static_cast<unsigned>(p.Hk);
    hk = head - b * p.Hk;
    keys = min(64, p.M - first_key);
    block = first_key >> p.log2_block_k;
  }
  __device__ List column(const BackwardParams& p, int h) const {
    return list_of(p.column_lists, static_cast<int64_t>(b) * p.H + h, block);
  }
  static __device__ int tiles(const BackwardParams& p, const List& list) {
    return static_cast<int>((static_cast<int64_t>(list.count) * p.list_rows + 63) / 64);
  }
};

// Run by one warp: the rows, head by head.
template <int DP>
__device__ void fetch_rows(const BackwardColumnsMaps& p, BackwardColumnsShared<DP>& s,
                           const KeyTile& at) {
  constexpr int kStages = BackwardColumnsShared<DP>::kStages, kPanels = DP / 64;
  const int lane = threadIdx.x % 32, run = min(p.list_rows, 64), runs = 64 / run;
  if (lane == 0) {
    barrier_expect(&s.keys_full, 2 * 64 * DP * 2);
    for (int i = 0; i < kPanels; ++i) {
      copy_panel(s.k[i], p.k_map, &s.keys_full, 64 * i, at.first_key, at.hk, at.b);
      copy_panel(s.v[i], p.v_map, &s.keys_full, 64 * i, at.first_key, at.hk, at.b);
    }
  }
  __syncwarp();
  const int group = p.H / p.Hk;
  int fetched = 0;
#pragma unroll 1
  for (int h = at.hk * group; h < (at.hk + 1) * group; ++h) {
    const List list = at.column(p, h);
    const int tiles = KeyTile::tiles(p, list);
    const int64_t head = (static_cast<int64_t>(at.b) * p.H + h) * p.rows;
    auto entry_of = [&](int tile) {
      const int i = static_cast<int>(static_cast<int64_t>(tile * runs + lane) * run / p.list_rows);
      return lane < runs && i < list.count ? list.entries[i] : -1;
    };
    int entry = entry_of(0);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile, ++fetched) {
      const int stage = fetched % kStages;
      const int64_t row = static_cast<int64_t>(entry) * p.list_rows +
                          static_cast<int64_t>(tile * runs + lane) * run % p.list_rows;
      const int first = entry >= 0 && row < p.rows ? static_cast<int>(row) : p.rows;  // or: zeros
      if (tile + 1 < tiles) entry = entry_of(tile + 1);
      float lse[2], delta[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = lane + 32 * half, i = __shfl_sync(0xffffffffu, first, r / run) + r % run;
        lse[half] = i < p.rows ? p.lse2[head + i] : INFINITY;
        delta[half] = i < p.rows ? p.delta[head + i] : 0.f;
      }
      const int sixteen = __shfl_sync(0xffffffffu, first, lane % 4 * 16 / run) + lane % 4 * 16 % run;
      if (fetched >= kStages) barrier_wait(&s.empty[stage], fetched / kStages - 1 & 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        s.lse[stage][lane + 32 * half] = lse[half];
        s.delta[stage][lane + 32 * half] = delta[half];
      }
      if (lane < 4) s.first[stage][lane] = sixteen;
      __syncwarp();
      if (lane == 0) barrier_expect(&s.full[stage], 2 * 64 * DP * 2);
      __syncwarp();
      if (lane < runs) {
        for (int i = 0; i < kPanels; ++i) {
          copy_panel(s.q[stage][i][run * lane], p.q_map, &s.full[stage], 64 * i, first, h, at.b);
          copy_panel(s.grad_out[stage][i][run * lane], p.grad_out_map, &s.full[stage], 64 * i,
                     first, h, at.b);
        }
      }
      __syncwarp();
    }
  }
  if (p.moment_grads == nullptr || lane != 0) return;
  // dC and dSigma: one in the queries and one in the output gradients of a place or, of 128 columns,
  // each in a place of its own, a panel in either.
#pragma unroll
  for (int i = 0; i < kPanels; ++i, ++fetched) {
    const int stage = fetched % kStages, row = i * DP;
    if (fetched >= kStages) barrier_wait(&s.empty[stage], fetched / kStages - 1 & 1);
    barrier_expect(&s.full[stage], 2 * 64 * DP * 2);
    for (int r = 0; r < DP; r += 64) {
      copy_panel(s.q[stage][r / 64], p.moments_map, &s.full[stage], 0, row + r, at.hk, at.b);
      copy_panel(s.grad_out[stage][r / 64], p.moments_map, &s.full[stage], kPanels == 1 ? 0 : 64,
                 kPanels == 1 ? DP : row + r, at.hk, at.b);
    }
  }
}

// A warp's 16 keys or values less the mean of their block where they lie, zeros for those that
// don't count.
template <typename T, int kPanels>
__device__ __forceinline__ void centre_rows(uint16_t (&x)[kPanels][64][64], const float* mean,
                                            int D, const bool (&live)[2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = 16 * warp_index() + g;
#pragma unroll
  for (int n = 0; n < 8 * kPanels; ++n) {
    const int d = 8 * n + 2 * t;
    const float2 m = d < D ? *reinterpret_cast<const float2*>(mean + d) : float2{};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto* at = reinterpret_cast<uint32_t*>(&x[n / 8][row + 8 * half][(n % 8 ^ g) * 8 + 2 * t]);
      const float2 u = unpack2(*at, T{});
      *at = live[half] ? Mma<T>::pack(u.x - m.x, u.y - m.y) : 0;
    }
  }
}

// Order 1 of the keys of a tile, whose place the first of the matrices has in the ring:
// dv_j += kappa_j dC, dk_j += nu_j dC^T + kappa_j dSigma. The keys and values are centred in place.
template <typename T, int DP>
__device__ __forceinline__ void add_moments(float (&dk)[DP / 8][4], float (&dv)[DP / 8][4],
                                            const BackwardColumnsMaps& p,
                                            BackwardColumnsShared<DP>& s, int64_t block,
                                            const bool (&live)[2], int place) {
  constexpr int kStages = BackwardColumnsShared<DP>::kStages, kPanels = DP / 64;
  centre_rows<T>(s.k, p.k_mean + block, p.D, live);
  centre_rows<T>(s.v, p.v_mean + block, p.D, live);
  fence_for_copies();
  asm volatile("bar.sync 1, 128;" ::: "memory");
  const int stage = place % kStages, next = (place + 1) % kStages;
  barrier_wait(&s.full[stage], place / kStages & 1);
  if (kPanels > 1) barrier_wait(&s.full[next], (place + 1) / kStages & 1);
  pin(dk);
  pin(dv);
  wgmma_fence();
  constexpr int kApart = sizeof(s.q);
  const auto* sigma = kPanels == 1 ? s.grad_out[stage] : s.q[next];
  multiply_matrix<T, false>(dv, s.k, s.q[stage], kApart, true);
  multiply_matrix<T, false>(dk, s.k, sigma, kApart, true);
  multiply_matrix<T, true>(dk, s.v, s.q[stage], kApart, true);
  wgmma_commit();
  wgmma_wait<0>();
  pin(dk);
  pin(dv);
}

template <typename T, int DP>
__global__ void __launch_bounds__(256, 2)
    backward_columns_kernel(const __grid_constant__ BackwardColumnsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = BackwardColumnsShared<DP>;
  constexpr int kStages = Shared::kStages;
  extern __shared__ char raw[];
  Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + 1023) / 1024 * 1024);

  if (threadIdx.x == 0) {
    barrier_init(&s.keys_full, 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], 4);
    }
    barrier_init_done();
  }
  __syncthreads();
  const KeyTile at(p);
  if (warp_index() >= 4) {
    give_registers<24>();
    if (warp_index() == 4) fetch_rows<DP>(p, s, at);
    return;
  }
  take_registers<232>();

  int tiles = 0;
  for (int h = at.hk * (p.H / p.Hk); h < (at.hk + 1) * (p.H / p.Hk); ++h) {
    tiles += KeyTile::tiles(p, at.column(p, h));
  }
  tiles = uniform(tiles);
  const int key = 16 * warp_index(), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const bool first_lane = threadIdx.x % 32 == 0;

  float dk[DP / 8][4] = {}, dv[DP / 8][4] = {};
  if (tiles > 0) barrier_wait(&s.keys_full, 0);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages;
    float c[8][4], ds[8][4];
    uint32_t a[4][4], da[4][4];
    barrier_wait(&s.full[stage], tile / kStages & 1);
    pin(c);
    wgmma_fence();
    multiply_nt<T, 64>(c, s.k, s.q[stage]);
    wgmma_commit();
    pin(ds);
    wgmma_fence();
    multiply_nt<T, 64>(ds, s.v, s.grad_out[stage]);
    wgmma_commit();

    wgmma_wait<1>();
    pin(c);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 l = *reinterpret_cast<const float2*>(&s.lse[stage][8 * n + 2 * t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        c[n][i] = exp2_approx(fmaf(c[n][i], p.scale * kLog2e, i % 2 ? -l.y : -l.x));
      }
    }
    if (p.causal) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int i = s.first[stage][n / 2] + n % 2 * 8 + 2 * t, j = at.first_key + key + g;
        if (j > i) c[n][0] = 0.f;
        if (j > i + 1) c[n][1] = 0.f;
        if (j + 8 > i) c[n][2] = 0.f;
        if (j + 8 > i + 1) c[n][3] = 0.f;
      }
    }
    pack<T>(a, c);
    pin(dv);
    wgmma_fence();
    multiply_pn<T, 64>(dv, a, s.grad_out[stage]);
    wgmma_commit();

    wgmma_wait<1>();
    pin(ds);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 d = *reinterpret_cast<const float2*>(&s.delta[stage][8 * n + 2 * t]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Rounded weights: keeping the others would take registers that dim 128 does not have.
        const float2 w = unpack2(a[n / 2][n % 2 * 2 + half], T{});
        ds[n][2 * half] = (ds[n][2 * half] - d.x) * w.x;
        ds[n][2 * half + 1] = (ds[n][2 * half + 1] - d.y) * w.y;
      }
    }
    pack<T>(da, ds);
    pin(dk);
    wgmma_fence();
    multiply_pn<T, 64>(dk, da, s.q[stage]);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dv);
    pin(dk);
    __syncwarp();
    if (first_lane) barrier_arrive(&s.empty[stage]);
  }

  const KeyTile own_tile(p);
  bool live[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = key + g + 8 * half;
    live[half] = r < own_tile.keys;
    if (live[half] && p.key_mask != nullptr) {
      live[half] = p.key_mask[static_cast<int64_t>(own_tile.b) * p.M + own_tile.first_key + r];
    }
  }
  float k_scale = p.scale;
  const int64_t block =
      ((static_cast<int64_t>(own_tile.b) * p.Hk + own_tile.hk) * p.nk + own_tile.block) * static_cast<int64_t>(p.D);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (p.moment_grads != nullptr) {
#pragma unroll
      for (int n = 0; n < DP / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dk[n][i] *= p.scale;
      }
      k_scale = 1.f;
      if (tiles == 0) barrier_wait(&s.keys_full, 0);
      add_moments<T, DP>(dk, dv, p, s, block, live, tiles);
    }
  }
  const int own = own_tile.first_key + key, present = own_tile.keys - key, D = p.D == DP ? DP : p.D;
  auto store = [&](float(&c)[DP / 8][4], float scale, void* grad, const Strides& strides,
                   const float* per_block, const void* extra, const Strides& extra_strides) {
    const float factor[2] = {scale, scale};
    finish_rows(c, factor, live, per_block == nullptr ? nullptr : per_block + block, 0, D);
    T* to = static_cast<T*>(grad) + own_tile.b * strides.b + own_tile.hk * strides.h + own * strides.l;
    if (extra == nullptr) {
      store_rows<T>(c, to, strides.l, present, 0, D);
      return;
    }
    const T* more = static_cast<const T*>(extra) + own_tile.b * extra_strides.b +
                    own_tile.hk * extra_strides.h + own * extra_strides.l;
    store_rows<T>(c, to, strides.l, present, 0, D, more, extra_strides.l, live);
  };
  store(dv, 1.f, p.grad_v, p.grad_v_strides, p.v_block, p.v_extra, p.v_extra_strides);
  store(dk, k_scale, p.grad_k, p.grad_k_strides, p.k_block, p.k_extra, p.k_extra_strides);
#endif
}

template <typename T, int DP>
cudaError_t launch_backward_columns(const BackwardParams& params, const Device& device,
                                    cudaStream_t stream) {
  if (params.block_k % 64 != 0 || params.list_rows < 16) return cudaErrorNotSupported;
  BackwardColumnsMaps p{params};
  constexpr Dtype dtype = std::is_same_v<T, __half> ? Dtype::f16 : Dtype::bf16;
  const int run = p.list_rows < 64 ? p.list_rows : 64;
  const bool maps = 64 % run == 0 &&
                    tensor_map(&p.q_map, dtype, p.q, p.q_strides, p.B, p.H, p.rows, p.D, run) &&
                    tensor_map(&p.grad_out_map, dtype, p.grad_out, p.grad_out_strides, p.B, p.H,
                               p.rows, p.D, run) &&
                    tensor_map(&p.k_map, dtype, p.k, p.k_strides, p.B, p.Hk, p.M, p.D, 64) &&
                    tensor_map(&p.v_map, dtype, p.v, p.v_strides, p.B, p.Hk, p.M, p.D, 64);
  if (p.moment_grads != nullptr) {
    constexpr int64_t kMatrix = DP * DP;
    if (dtype != Dtype::bf16 || p.D <= DP / 2 ||
        !tensor_map(&p.moments_map, dtype, p.moment_grads, {p.Hk * 2 * kMatrix, 2 * kMatrix, DP},
                    p.B, p.Hk, 2 * DP, DP, 64)) {
      return cudaErrorNotSupported;
    }
  }
  constexpr size_t kBytes = sizeof(BackwardColumnsShared<DP>) + 1024;
  if (!maps || kBytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
  const int64_t blocks = (p.M + 63) / 64 * static_cast<int64_t>(p.B) * p.Hk;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = backward_columns_kernel<T, DP>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kBytes));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), 256, kBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace mra::cuda::sm90
