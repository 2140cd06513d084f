// Means of the blocks of keys and values, and sums over the valid keys of
//
//   kappa_j^T nu_j  and  kappa_j^T kappa_j,   kappa_j = k_j - mean of its block, nu_j = v_j - mean,
//
// from one reading of both. A block of threads walks a chunk of tiles of 64 keys: one warp fetches
// them ahead, the others take the means, centre the tile where it lies, and multiply it while they
// centre the next. Warpgroup w makes rows 64 w to 64 w + 63 of both matrices.
#pragma once

#include <climits>

#include "../sm80/tile.cuh"
#include "moments.h"
#include "tma.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

struct MomentsMaps : Moments {
  CUtensorMap k_map, v_map;
  int tiles;  // of a chunk
};

// Measured choices (docs/kernels.md).
template <int DP>
struct MomentsTraits {
  static constexpr int kStages = 6, kBlocks = DP == 64 ? 2 : 1;
  static constexpr int kThreads = DP == 64 ? 160 : 384;
};

template <int DP>
struct MomentsShared {
  static constexpr int kStages = MomentsTraits<DP>::kStages, kPanels = DP / 64;
  uint16_t x[kStages][2][kPanels][64][64];  // keys, values
  uint32_t valid[kStages][2];
  uint64_t full[kStages], empty[kStages];
};

// Sum over the 8 lanes that differ in bits 2 to 4: of x[e], e = the lane's own (lane / 4).
__device__ __forceinline__ float reduce_scatter(float (&x)[8]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 4; step > 0; step /= 2) {
    const bool upper = lane & 4 * step;
#pragma unroll
    for (int e = 0; e < step; ++e) {
      const float give = upper ? x[e] : x[e + step], keep = upper ? x[e + step] : x[e];
      x[e] = keep + __shfl_xor_sync(0xffffffffu, give, 4 * step);
    }
  }
  return x[0];
}
// And back: x[e] = what lane 4 e + lane % 4 has.
__device__ __forceinline__ void all_gather(float (&x)[8], float mine) {
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    x[e] = __shfl_sync(0xffffffffu, mine, 4 * e + threadIdx.x % 4);
  }
}

template <int DP>
__device__ void fetch_keys(const MomentsMaps& p, MomentsShared<DP>& s, int b, int h, int first,
                           int tiles) {
  constexpr int kStages = MomentsShared<DP>::kStages, kPanels = DP / 64;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, key = first + 64 * tile;
    uint32_t valid[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = key + 32 * half + lane;
      const bool there =
          j < p.M && (p.mask == nullptr || p.mask[static_cast<int64_t>(b) * p.M + j]);
      valid[half] = __ballot_sync(0xffffffffu, there);
    }
    if (tile >= kStages) barrier_wait(&s.empty[stage], tile / kStages - 1 & 1);
    if (lane == 0) {
      s.valid[stage][0] = valid[0];
      s.valid[stage][1] = valid[1];
      barrier_expect(&s.full[stage], 2 * 64 * DP * 2);
      for (int i = 0; i < kPanels; ++i) {
        copy_panel(s.x[stage][0][i], p.k_map, &s.full[stage], 64 * i, key, h, b);
        copy_panel(s.x[stage][1][i], p.v_map, &s.full[stage], 64 * i, key, h, b);
      }
    }
    __syncwarp();
  }
}

// A warp's 32 columns of a tile whose rows lie in kBlocks blocks of keys: means to memory, centred
// rows to where they were, zeros for rows that don't count. Returns the number that do.
template <int DP, int kBlocks>
__device__ __forceinline__ int centre(const MomentsMaps& p, MomentsShared<DP>& s, int stage, int b,
                                      int h, int tile) {
  constexpr int kPanels = DP / 64;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Lanes of a quarter warp read four chunks of two rows that lie four apart: no bank twice.
  const int row = lane / 4 % 2 * 4 + lane / 8;
  const int which = warp / (2 * kPanels), panel = warp / 2 % kPanels, chunk = warp % 2 * 4 + lane % 4;
  uint16_t(*const rows)[64] = s.x[stage][which][panel];
  const uint32_t valid[2] = {s.valid[stage][0], s.valid[stage][1]};
  const auto place = [&](int i) {
    return reinterpret_cast<uint4*>(&rows[row + 8 * i][(chunk ^ row) * 8]);
  };
  const auto counts = [&](int i) { return valid[i / 4] >> (i % 4 * 8 + row) & 1; };

  uint4 bits[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) bits[i] = counts(i) ? *place(i) : uint4{};
  float* const to = which == 0 ? p.k_mean : p.v_mean;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    constexpr int kRows = 8 / kBlocks;  // of this lane
    float sum[8] = {}, x[8];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      unpack16<__nv_bfloat16>(bits[block * kRows + i], x);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += x[e];
    }
    const uint32_t mask = kBlocks == 1   ? 0xffffffffu
                          : kBlocks == 2 ? 0xffffffffu
                                         : 0xffffu << block % 2 * 16;
    const int count = kBlocks == 1 ? __popc(valid[0]) + __popc(valid[1])
                                   : __popc(valid[kBlocks == 2 ? block : block / 2] & mask);
    const float mean = reduce_scatter(sum) / static_cast<float>(max(count, 1));
    all_gather(sum, mean);
    const int y = tile * kBlocks + block;
    if (y < p.nk) {
      const int column = 64 * panel + chunk * 8 + lane / 4;
      if (to != nullptr && column < p.D) {
        to[((static_cast<int64_t>(b) * p.Hk + h) * p.nk + y) * p.D + column] = mean;
      }
      if (p.key_count != nullptr && h == 0 && threadIdx.x == 0) {
        p.key_count[static_cast<int64_t>(b) * p.nk + y] = count;
      }
    }
#pragma unroll
    for (int i = block * kRows; i < (block + 1) * kRows; ++i) {
      unpack16<__nv_bfloat16>(bits[i], x);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = counts(i) ? x[e] - sum[e] : 0.f;
      using M = Mma<__nv_bfloat16>;
      *place(i) = make_uint4(M::pack(x[0], x[1]), M::pack(x[2], x[3]), M::pack(x[4], x[5]),
                             M::pack(x[6], x[7]));
    }
  }
  return __popc(valid[0]) + __popc(valid[1]);
}

template <int DP, int kBlocks>
__global__ void __launch_bounds__(MomentsTraits<DP>::kThreads, MomentsTraits<DP>::kBlocks)
    moments_kernel(const __grid_constant__ MomentsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = MomentsShared<DP>;
  constexpr int kStages = Shared::kStages, kPanels = DP / 64;
  extern __shared__ char raw[];
  Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], 4 * kPanels);
    }
    barrier_init_done();
  }
  __syncthreads();
  const int head = blockIdx.x / p.chunks, chunk = blockIdx.x - head * p.chunks;
  const int b = head / p.Hk, h = head - b * p.Hk, first = chunk * p.tiles;
  const int tiles = uniform(min(p.tiles, (p.M + 63) / 64 - first));
  if (warp_index() >= 4 * kPanels) {
    if constexpr (DP > 64) give_registers<24>();
    if (warp_index() > 4 * kPanels) return;
    fetch_keys<DP>(p, s, b, h, 64 * first, tiles);
    return;
  }

  if constexpr (DP > 64) take_registers<240>();

  const int group = uniform(threadIdx.x / 128);
  const bool first_lane = threadIdx.x % 32 == 0;
  float moment[8 * kPanels][4], sigma[8 * kPanels][4];
  int keys = 0;
  const auto prepare = [&](int tile) {
    const int stage = tile % kStages;
    barrier_wait(&s.full[stage], tile / kStages & 1);
    keys += centre<DP, kBlocks>(p, s, stage, b, h, first + tile);
    fence_for_copies();  // products read shared memory as copies do
    asm volatile("bar.sync 1, %0;" ::"n"(128 * kPanels) : "memory");
  };
  const auto multiply = [&](int tile, bool add) {
    const auto& x = s.x[tile % kStages];
    wgmma_fence();
    multiply_tn<__nv_bfloat16>(moment, x[0][group], x[1], add);
    multiply_tn<__nv_bfloat16>(sigma, x[0][group], x[0], add);
    wgmma_commit();
  };
  prepare(0);
  multiply(0, false);
#pragma unroll 1
  for (int tile = 1; tile < tiles; ++tile) {
    prepare(tile);
    wgmma_wait<0>();
    __syncwarp();
    if (first_lane) barrier_arrive(&s.empty[(tile - 1) % kStages]);
    multiply(tile, true);
  }
  wgmma_wait<0>();
  pin(moment);
  pin(sigma);

  const int row = 64 * group + 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
  const auto store = [&](const float(&c)[8 * kPanels][4], int which) {
    const int64_t matrix = static_cast<int64_t>(blockIdx.x) * 2 + which;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = (matrix * DP + row + 8 * half) * DP + threadIdx.x % 4 * 2;
#pragma unroll
      for (int n = 0; n < 8 * kPanels; ++n) {
        const float u = c[n][2 * half], w = c[n][2 * half + 1];
        if (p.sums != nullptr) {
          *reinterpret_cast<float2*>(p.sums + at + 8 * n) = make_float2(u, w);
        } else {
          const float over_n = 1.f / max(keys, 1);
          reinterpret_cast<uint32_t*>(p.matrices)[(at + 8 * n) / 2] =
              Mma<__nv_bfloat16>::pack(u * over_n, w * over_n);
        }
      }
    }
  };
  store(moment, 0);
  store(sigma, 1);
#endif
}

template <int DP>
cudaError_t launch_moments(const Moments& params, const Device& device, cudaStream_t stream) {
  MomentsMaps p{params};
  const bool maps =
      tensor_map(&p.k_map, Dtype::bf16, p.k, p.k_strides, p.B, p.Hk, p.M, p.D, 64) &&
      tensor_map(&p.v_map, Dtype::bf16, p.v, p.v_strides, p.B, p.Hk, p.M, p.D, 64);
  constexpr int kBytes = sizeof(MomentsShared<DP>) + 1024;
  const int64_t blocks = static_cast<int64_t>(p.B) * p.Hk * p.chunks;
  if (!maps || kBytes > device.max_smem || blocks > INT_MAX) return cudaErrorNotSupported;
  p.tiles = ((p.M + 63) / 64 + p.chunks - 1) / p.chunks;
  const auto kernel = p.log2_block_k == 6   ? moments_kernel<DP, 1>
                      : p.log2_block_k == 5 ? moments_kernel<DP, 2>
                                            : moments_kernel<DP, 4>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), MomentsTraits<DP>::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace mra::cuda::sm90
