// Gradients of the keys and values on Hopper: what sm80/backward_columns.cuh computes for the keys
// of one block from the rows of its column list, for half types and head dims up to 128. A block of
// threads takes 64 keys: one warp fetches tiles of 64 rows, a warpgroup multiplies with the scores
// transposed. Registers move from the fetching warps to those that hold two accumulators.
#pragma once

#include "columns.cuh"

namespace mra::cuda::sm90 {

struct BackwardColumnsMaps : BackwardParams {
  CUtensorMap q_map, grad_out_map, k_map, v_map, grad_k_map, grad_v_map;
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
__device__ void fetch_rows(const BackwardColumnsMaps& p, ColumnsShared<DP>& s, const KeyTile& at) {
  constexpr int kStages = ColumnsShared<DP>::kStages, kPanels = DP / 64;
  const int lane = threadIdx.x % 32, run = min(p.list_rows, 64), runs = 64 / run;
  if (lane == 0) s.fetch_keys(p.k_map, p.v_map, at.first_key, at.hk, at.b);
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
      RowSums sums;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = lane + 32 * half;
        sums.look_up(half, p.lse2 + head, p.delta + head,
                     __shfl_sync(0xffffffffu, first, r / run) + r % run, p.rows);
      }
      const int sixteen =
          __shfl_sync(0xffffffffu, first, lane % 4 * 16 / run) + lane % 4 * 16 % run;
      if (fetched >= kStages) barrier_wait(&s.empty[stage], fetched / kStages - 1 & 1);
      if (lane == 0) barrier_expect(&s.full[stage], 2 * 64 * DP * 2);
      __syncwarp();
      if (lane < runs) {
        for (int i = 0; i < kPanels; ++i) {
          copy_panel(s.q[stage][i][run * lane], p.q_map, &s.full[stage], 64 * i, first, h, at.b);
          copy_panel(s.grad_out[stage][i][run * lane], p.grad_out_map, &s.full[stage], 64 * i,
                     first, h, at.b);
        }
      }
      sums.store(s, stage);
      if (lane < 4) s.first[stage][lane] = sixteen;
      barrier_arrive(&s.full[stage]);
      __syncwarp();
    }
  }
}

template <typename T, int DP>
__global__ void __launch_bounds__(256, 2)
    backward_columns_kernel(const __grid_constant__ BackwardColumnsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = ColumnsShared<DP>;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);

  if (threadIdx.x == 0) {
    s.init();
    barrier_init_done();
  }
  __syncthreads();
  const KeyTile at(p);
  if (warp_index() >= 4) {
    give_registers<32>();
    if (warp_index() == 4) fetch_rows<DP>(p, s, at);
    return;
  }
  take_registers<224>();

  int tiles = 0;
  for (int h = at.hk * (p.H / p.Hk); h < (at.hk + 1) * (p.H / p.Hk); ++h) {
    tiles += KeyTile::tiles(p, at.column(p, h));
  }
  tiles = uniform(tiles);
  const int key = 16 * warp_index(), g = threadIdx.x % 32 / 4;

  float dk[DP / 8][4] = {}, dv[DP / 8][4] = {};
  if (tiles > 0) barrier_wait(&s.keys_full, 0);
  const float none[2] = {};
  attend_rows<T, DP, false>(dk, dv, s, tiles, p.scale, p.causal, at.first_key, none);

  const KeyTile own(p);
  bool live[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = key + g + 8 * half;
    live[half] = r < own.keys;
    if (live[half] && p.key_mask != nullptr) {
      live[half] = p.key_mask[static_cast<int64_t>(own.b) * p.M + own.first_key + r];
    }
  }
  const int64_t block = ((static_cast<int64_t>(own.b) * p.Hk + own.hk) * p.nk + own.block) *
                        static_cast<int64_t>(p.D);
  const float k_scale[2] = {p.scale, p.scale}, v_scale[2] = {1.f, 1.f};
  finish_rows(dk, k_scale, live, p.k_block == nullptr ? nullptr : p.k_block + block, 0, p.D);
  finish_rows(dv, v_scale, live, p.v_block == nullptr ? nullptr : p.v_block + block, 0, p.D);
  // Out through the place of the keys and values, once every warp is done with them.
  if (tiles == 0) barrier_wait(&s.keys_full, 0);
  group_sync();
  place_rows<T>(s.k, dk);
  place_rows<T>(s.v, dv);
  fence_for_copies();
  group_sync();
  if (threadIdx.x == 0) {
    for (int i = 0; i < DP / 64; ++i) {
      give_panel(p.add, p.grad_k_map, s.k[i], 64 * i, own.first_key, own.hk, own.b);
      give_panel(p.add, p.grad_v_map, s.v[i], 64 * i, own.first_key, own.hk, own.b);
    }
    store_commit();
    store_wait();
  }
#endif
}

template <typename T, int DP>
cudaError_t launch_backward_columns(const BackwardParams& params, const Device& device,
                                    cudaStream_t stream) {
  if (params.block_k % 64 != 0 || params.list_rows < 16) return cudaErrorNotSupported;
  BackwardColumnsMaps p{params};
  constexpr Dtype dtype = kDtype<T>;
  const int run = p.list_rows < 64 ? p.list_rows : 64;
  const bool maps =
      64 % run == 0 && tensor_map(&p.q_map, dtype, p.q, p.q_strides, p.B, p.H, p.rows, p.D, run) &&
      tensor_map(&p.grad_out_map, dtype, p.grad_out, p.grad_out_strides, p.B, p.H, p.rows, p.D,
                 run) &&
      tensor_map(&p.k_map, dtype, p.k, p.k_strides, p.B, p.Hk, p.M, p.D, 64) &&
      tensor_map(&p.v_map, dtype, p.v, p.v_strides, p.B, p.Hk, p.M, p.D, 64) &&
      tensor_map(&p.grad_k_map, dtype, p.grad_k, p.grad_k_strides, p.B, p.Hk, p.M, p.D, 64) &&
      tensor_map(&p.grad_v_map, dtype, p.grad_v, p.grad_v_strides, p.B, p.Hk, p.M, p.D, 64);
  constexpr size_t kBytes = sizeof(ColumnsShared<DP>) + 1024;
  if (!maps || kBytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
  const int64_t blocks = (p.M + 63) / 64 * static_cast<int64_t>(p.B) * p.Hk;
  const auto kernel = backward_columns_kernel<T, DP>;
  return launch(kernel, p, blocks, 256 / 32, kBytes, stream);
}

}  // namespace mra::cuda::sm90
