// Gradients of the pooled keys and values on Hopper: what sm80/backward_columns.cuh computes for
// them, for half types and head dims up to 256. A block of threads takes 64 pooled keys and a part
// of the rows: one warp fetches tiles of rows, one looks up which of the keys they don't see, a
// warpgroup multiplies, or two.
#pragma once

#include "columns.cuh"
#include "key_tiles.cuh"
#include "unseen.cuh"

namespace mra::cuda::sm90 {

struct BackwardPooledMaps : BackwardParams {
  CUtensorMap q_map, grad_out_map, k_map, v_map;
};

template <int DP>
struct BackwardPooledShared : ColumnsShared<DP> {
  uint4 windows[2][32];  // of 32 tiles of rows: keys that the first and the last 32 rows don't see
  uint64_t window_full[2], window_empty[2];
  // Of every other tile of rows: sums of the gradients of its logits, over 16 keys by each warp.
  alignas(16) float row_sums[2][4][64];
  uint64_t row_sums_full[2], row_sums_empty[2];
};

// 64 pooled keys, and a run of tiles of rows of every query head that shares them.
struct PooledTile {
  int split, b, hk, first_key, keys, first_tile, tiles, group;

  __device__ explicit PooledTile(const BackwardParams& p) {
    const unsigned key_tiles = (p.nk + 63) / 64, behind = blockIdx.x / key_tiles;
    const unsigned heads = p.B * p.Hk;
    first_key = (blockIdx.x - behind * key_tiles) * 64;
    split = behind / heads;
    b = behind % heads / p.Hk;
    hk = behind % heads % p.Hk;
    keys = min(64, p.nk - first_key);
    group = p.H / p.Hk;
    const int row_tiles = (p.rows + 63) / 64, each = (row_tiles + p.splits - 1) / p.splits;
    first_tile = min(split * each, row_tiles);
    tiles = min(each, row_tiles - first_tile);
  }
  // Of tile i over all heads: the head, its row tile.
  __device__ int head(int i) const { return hk * group + i / tiles; }
  __device__ int row_tile(int i) const { return first_tile + i % tiles; }
};

template <int DP>
__device__ void fetch_rows(const BackwardPooledMaps& p, BackwardPooledShared<DP>& s,
                           const PooledTile& at) {
  constexpr int kStages = ColumnsShared<DP>::kStages;
  const int lane = threadIdx.x % 32, all = at.group * at.tiles;
  s.fetch_keys(0, p.k_map, p.v_map, at.first_key, at.hk, at.b);
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < all; ++i) {
    const int stage = i % kStages, h = at.head(i), row = at.row_tile(i) * 64;
    const int64_t head = static_cast<int64_t>(at.b) * p.H + h;
    const int window = i / 32 % 2;
    if (i % 32 == 0) barrier_wait(&s.window_full[window], i / 64 & 1);
    const uint4 unseen = s.windows[window][i % 32];
    if (i % 32 == 31) barrier_arrive(&s.window_empty[window]);
    if (i >= kStages) barrier_wait(&s.empty[stage], i / kStages - 1 & 1);
    if (lane == 0) *reinterpret_cast<uint4*>(s.unseen[stage]) = unseen;
    announce_tile(s, stage);
    if (lane == 0) {
      fetch_run(s, p.q_map, p.grad_out_map, p.pooled_sums + head * sum_chunks(p.rows) * 64, stage,
                0, 64, row, h, at.b);
    }
    __syncwarp();
  }
}

// By one warp, a tile of rows each lane.
template <int DP>
__device__ void look_up_unseen(const BackwardParams& p, BackwardPooledShared<DP>& s,
                               const PooledTile& at) {
  const int lane = threadIdx.x % 32, all = at.group * at.tiles;
#pragma unroll 1
  for (int i0 = 0; i0 < all; i0 += 32) {
    const int window = i0 / 32 % 2, i = i0 + lane;
    uint64_t unseen[2] = {0, 0};
    if (i < all) {
      const int64_t head = static_cast<int64_t>(at.b) * p.H + at.head(i);
      unseen_by_tile(p, head, at.row_tile(i) * 64, at.first_key, unseen);
    }
    if (i0 >= 64) barrier_wait(&s.window_empty[window], i0 / 64 - 1 & 1);
    s.windows[window][lane] =
        make_uint4(static_cast<uint32_t>(unseen[0]), static_cast<uint32_t>(unseen[0] >> 32),
                   static_cast<uint32_t>(unseen[1]), static_cast<uint32_t>(unseen[1] >> 32));
    barrier_arrive(&s.window_full[window]);
  }
}

// Sums over the 16 keys of a warp, of which a thread has two.
__device__ __forceinline__ void sum_keys(const float (&pairs)[8][2], float (&to)[64]) {
  const int lane = threadIdx.x % 32;
  float sum[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float x[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) x[n] = pairs[n][e];
    sum[e] = reduce_scatter(x);  // of n = lane / 4
  }
  *reinterpret_cast<float2*>(&to[lane / 4 * 8 + lane % 4 * 2]) = make_float2(sum[0], sum[1]);
}

// By one warp: those of the four warps to coarse_sum.
template <int DP>
__device__ void store_row_sums(const BackwardParams& p, BackwardPooledShared<DP>& s,
                               const PooledTile& at) {
  const int lane = threadIdx.x % 32, all = at.group * at.tiles;
#pragma unroll 1
  for (int i = 0; i < all; ++i) {
    const int place = i % 2;
    const int64_t part = static_cast<int64_t>(at.first_key / 64) * p.B + at.b;
    float* const to = p.coarse_sum + (part * p.H + at.head(i)) * p.rows;
    barrier_wait(&s.row_sums_full[place], i / 2 & 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = 32 * half + lane, row = at.row_tile(i) * 64 + r;
      float sum = 0.f;
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) sum += s.row_sums[place][warp][r];
      if (row < p.rows) to[row] = sum;
    }
    barrier_arrive(&s.row_sums_empty[place]);
  }
}

template <int DP>
struct BackwardPooledTraits {
  static constexpr int kWarps = ColumnsShared<DP>::kWarps;  // that multiply
  static constexpr int kThreads = 32 * kWarps + 128, kBlocks = kWarps == 4 ? 2 : 1;
};

template <typename T, int DP>
__global__ void __launch_bounds__(BackwardPooledTraits<DP>::kThreads,
                                  BackwardPooledTraits<DP>::kBlocks)
    backward_pooled_kernel(const __grid_constant__ BackwardPooledMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = BackwardPooledShared<DP>;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  if (threadIdx.x == 0) {
    s.init();
    barrier_init_ring(s.window_full, s.window_empty, 1);
    for (int i = 0; i < 2; ++i) {
      barrier_init(&s.row_sums_full[i], 4);
      barrier_init(&s.row_sums_empty[i], 1);
    }
    barrier_init_done();
  }
  __syncthreads();
  const PooledTile at(p);
  constexpr int kWarps = BackwardPooledTraits<DP>::kWarps;
  if (warp_index() >= kWarps) {
    give_registers<DP == 128 ? 24 : 32>();
    if (warp_index() == kWarps) fetch_rows<DP>(p, s, at);
    if (warp_index() == kWarps + 1) look_up_unseen<DP>(p, s, at);
    if (warp_index() == kWarps + 2 && p.coarse_sum != nullptr) store_row_sums<DP>(p, s, at);
    return;
  }
  take_registers<DP == 128 ? 232 : 224>();

  const int key = 16 * (warp_index() % 4), g = threadIdx.x % 32 / 4;
  float bias[2];
  bool live[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = key + g + 8 * half;
    const float mass = r < at.keys ? mass_of(p, masses_of(p, at.b, at.hk)[at.first_key + r]) : 0.f;
    live[half] = mass > 0.f;
    bias[half] = live[half] ? log2_approx(mass) : -INFINITY;
  }
  const int tiles = uniform(at.group * at.tiles);
  const auto store = [&](float(&c)[DP / 8][4], float scale, float* to) {
    const int64_t head = (static_cast<int64_t>(at.split) * p.B + at.b) * p.Hk + at.hk;
    const float factor[2] = {scale, scale};
    finish_rows(c, factor, live, nullptr, 0, p.D);
    store_rows<float>(c, to + (head * p.nk + at.first_key + key) * p.D, p.D, at.keys - key, 0, p.D);
  };
  const auto store_mass_grad = [&](const float(&mine)[2]) {
    if (p.pooled_mass_grads == nullptr) return;
    const int64_t head = (static_cast<int64_t>(at.split) * p.B + at.b) * p.Hk + at.hk;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(mine[half]);
      const int r = key + g + 8 * half;
      if (threadIdx.x % 4 != 0 || r >= at.keys) continue;
      p.pooled_mass_grads[head * p.nk + at.first_key + r] = live[half] ? sum : 0.f;
    }
  };
  float mass_grad[2] = {};
  barrier_wait(&s.keys_full[0], 0);
  if constexpr (kWarps == 8) {
    float sums[DP / 8][4] = {};
    if (warp_index() < 4) {
      attend_rows_wide<T, DP, true, true>(sums, s, 0, 0, tiles, p.scale, false, 0, bias);
      store(sums, 1.f, p.pooled_grad_v);
    } else {
      attend_rows_wide<T, DP, true, false>(sums, s, 0, 0, tiles, p.scale, false, 0, bias,
                                           mass_grad);
      store(sums, p.scale, p.pooled_grad_k);
      store_mass_grad(mass_grad);
    }
  } else {
    float dk[DP / 8][4] = {}, dv[DP / 8][4] = {};
    const auto of_rows = [&](int tile, const float(&pairs)[8][2]) {
      if (p.coarse_sum == nullptr) return;
      const int place = tile % 2;
      if (tile >= 2) barrier_wait(&s.row_sums_empty[place], tile / 2 - 1 & 1);
      sum_keys(pairs, s.row_sums[place][warp_index()]);
      barrier_arrive(&s.row_sums_full[place]);
    };
    attend_rows<T, DP, true>(dk, dv, s, 0, 0, tiles, p.scale, false, 0, bias, mass_grad, of_rows);
    store(dk, p.scale, p.pooled_grad_k);
    store(dv, 1.f, p.pooled_grad_v);
    store_mass_grad(mass_grad);
  }
#endif
}

template <typename T, int DP>
cudaError_t launch_backward_pooled(const BackwardParams& params, const Device& device,
                                   cudaStream_t stream) {
  if (params.list_rows % 32 != 0 || params.pooled_sums == nullptr) return cudaErrorNotSupported;
  if (params.coarse_sum != nullptr && DP > 128) return cudaErrorNotSupported;
  BackwardPooledMaps p{params};
  constexpr Dtype dtype = kDtype<T>;
  const bool maps = tensor_map(&p.q_map, dtype, p.q, p.q_strides, p.B, p.H, p.rows, p.D, 64) &&
                    tensor_map(&p.grad_out_map, dtype, p.grad_out, p.grad_out_strides, p.B, p.H,
                               p.rows, p.D, 64) &&
                    means_map(&p.k_map, dtype, p.pooled_k, p.B, p.Hk, p.nk, p.D) &&
                    means_map(&p.v_map, dtype, p.pooled_v, p.B, p.Hk, p.nk, p.D);
  constexpr int kBytes = sizeof(BackwardPooledShared<DP>) + 1024;
  if (!maps || kBytes > device.max_smem) return cudaErrorNotSupported;
  const int64_t blocks = (p.nk + 63) / 64 * static_cast<int64_t>(p.B) * p.Hk * p.splits;
  const auto kernel = backward_pooled_kernel<T, DP>;
  return launch_grid(kernel, blocks, BackwardPooledTraits<DP>::kThreads, kBytes, stream, p);
}

}  // namespace mra::cuda::sm90
