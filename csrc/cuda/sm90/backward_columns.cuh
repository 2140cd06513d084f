// Gradients of the keys and values on Hopper: what sm80/backward_columns.cuh computes for the keys
// of one block from the rows of its column list, for half types and head dims up to 128. Persistent
// blocks of threads take tiles of 64 keys in turns: one warp fetches tiles of 64 rows ahead, a
// warpgroup multiplies with the scores transposed. Registers move from the fetching warps to those
// that hold two accumulators.
#pragma once

#include <algorithm>

#include "columns.cuh"
#include "queue.cuh"

namespace mra::cuda::sm90 {

struct BackwardColumnsMaps : BackwardParams {
  int items;  // tiles of keys in all
  CUtensorMap q_map, grad_out_map, k_map, v_map, grad_k_map, grad_v_map;

  cudaError_t set(Dtype dtype) {
    if (block_k % 64 != 0 || list_rows < 32 || sums == nullptr) return cudaErrorNotSupported;
    const auto of_rows = [&](CUtensorMap* to, const void* data, const Strides& strides) {
      return tensor_map(to, dtype, data, strides, B, H, rows, D, std::min(list_rows, 64));
    };
    const auto of_keys = [&](CUtensorMap* to, const void* data, const Strides& strides) {
      return tensor_map(to, dtype, data, strides, B, Hk, M, D, 64);
    };
    const bool maps = of_rows(&q_map, q, q_strides) &&
                      of_rows(&grad_out_map, grad_out, grad_out_strides) &&
                      of_keys(&k_map, k, k_strides) && of_keys(&v_map, v, v_strides) &&
                      of_keys(&grad_k_map, grad_k, grad_k_strides) &&
                      of_keys(&grad_v_map, grad_v, grad_v_strides);
    if (!maps) return cudaErrorNotSupported;
    const int64_t tiles = (M + 63) / 64 * static_cast<int64_t>(B) * Hk;
    if (tiles > INT_MAX / 2) return cudaErrorInvalidConfiguration;
    items = static_cast<int>(tiles);
    return cudaSuccess;
  }
};

// A tile of 64 keys of one block, and how many tiles of rows attend it; below zero: the end.
struct KeyTile {
  int b, hk, first_key, block, tiles;

  __device__ KeyTile(const BackwardParams& p, unsigned item) : tiles(0) {
    const unsigned key_tiles = (p.M + 63) / 64, head = item / key_tiles;
    first_key = (item - head * key_tiles) * 64;
    b = head / static_cast<unsigned>(p.Hk);
    hk = head - b * p.Hk;
    block = first_key >> p.log2_block_k;
    const int group = p.H / p.Hk;
    for (int h = hk * group; h < (hk + 1) * group; ++h) tiles += tiles_of(p, list_of_head(p, h));
  }
  __device__ List list_of_head(const BackwardParams& p, int h) const {
    return list_of(p.column_lists, static_cast<int64_t>(b) * p.H + h, block);
  }
  static __device__ int tiles_of(const BackwardParams& p, const List& list) {
    return static_cast<int>((static_cast<int64_t>(list.count) * p.list_rows + 63) / 64);
  }
};

template <int DP>
struct BackwardColumnsShared : ColumnsShared<DP, DP == 64 ? 2 : 1> {
  // Of every other tile; `blocks`: what the block's keys share of dk and dv.
  alignas(16) float blocks[2][2][DP];
  alignas(16) KeyTile tile[2];
};

// The keys of a tile and what else its end needs, by one warp.
template <int DP>
__device__ void fetch_tile(const BackwardColumnsMaps& p, BackwardColumnsShared<DP>& s,
                           const KeyTile& at, int turn) {
  const int bytes = p.k_block == nullptr ? 0 : p.D * 4, place = turn % s.kPlaces;
  if (threadIdx.x % 32 == 0) s.tile[turn % 2] = at;
  s.fetch_keys(place, p.k_map, p.v_map, at.first_key, at.hk, at.b, 2 * bytes);
  if (bytes == 0 || threadIdx.x % 32 != 0) return;
  const int64_t from = ((static_cast<int64_t>(at.b) * p.Hk + at.hk) * p.nk + at.block) * p.D;
  copy_bytes(s.blocks[turn % 2][0], p.k_block + from, bytes, &s.keys_full[place]);
  copy_bytes(s.blocks[turn % 2][1], p.v_block + from, bytes, &s.keys_full[place]);
}

// Run by one warp: the rows of tiles of keys, head by head.
template <int DP>
__device__ void fetch_ahead(const BackwardColumnsMaps& p, BackwardColumnsShared<DP>& s) {
  using Shared = BackwardColumnsShared<DP>;
  constexpr int kStages = Shared::kStages, kPlaces = Shared::kPlaces;
  const int lane = threadIdx.x % 32, run = min(p.list_rows, 64), runs = 64 / run;
  const int group = p.H / p.Hk, log2_rows = __ffs(p.list_rows) - 1;
  int fetched = 0, turn = 0;  // tiles of rows, tiles of keys
  // Lists of the next tile are looked up while rows of this one are on their way. At D 64 that has
  // no use, and the consumers would lose their uniform registers to it.
  constexpr bool kLookAhead = DP > 64;
  WorkQueue queue(p);
  KeyTile next(p, queue.item);
#pragma unroll 1
  for (; queue.has_item(); queue.advance(), ++turn) {
    const KeyTile at = kLookAhead ? next : KeyTile(p, queue.item);
    bool looked = !kLookAhead || !queue.has_next();
    if (turn >= kPlaces) barrier_wait(&s.keys_empty[turn % kPlaces], turn / kPlaces - 1 & 1);
    fetch_tile(p, s, at, turn);
    __syncwarp();
#pragma unroll 1
    for (int h = at.hk * group; h < (at.hk + 1) * group; ++h) {
      const List list = at.list_of_head(p, h);
      const int tiles = KeyTile::tiles_of(p, list);
      // The block of this lane's run of a tile.
      const auto block_of = [&](int tile) {
        const int i = 64 * tile + run * lane >> log2_rows;
        return lane < runs && i < list.count ? list.entries[i] : -1;
      };
      int block = block_of(0);
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        int first = (p.rows + 63) / 64 * 64;  // beyond the end: zeros, without weight
        if (static_cast<unsigned>(block) < static_cast<unsigned>(p.row_lists.lists)) {
          first = min(first, (block << log2_rows) + (64 * tile + run * lane & p.list_rows - 1));
        }
        if (tile + 1 < tiles) block = block_of(tile + 1);
        const int stage = fetched % kStages;
        if (fetched >= kStages) barrier_wait(&s.empty[stage], fetched / kStages - 1 & 1);
        if (p.causal) {
          const int at = 16 * lane & 63,
                    sixteen = __shfl_sync(0xffffffffu, first, at / run) + at % run;
          if (lane < 4) s.first[stage][lane] = sixteen;
        }
        announce_tile(s, stage);
        if (lane < runs) {
          const float* sums =
              p.sums + (static_cast<int64_t>(at.b) * p.H + h) * sum_chunks(p.rows) * 64;
          fetch_run(s, p.q_map, p.grad_out_map, sums, stage, run * lane, run, first, h, at.b);
        }
        __syncwarp();
        ++fetched;
        if (!looked) next = KeyTile(p, queue.next);
        looked = true;
      }
    }
    if (!looked) next = KeyTile(p, queue.next);
  }
  if (turn >= kPlaces) barrier_wait(&s.keys_empty[turn % kPlaces], turn / kPlaces - 1 & 1);
  if (lane == 0) s.tile[turn % 2].tiles = -1;
  barrier_arrive(&s.keys_full[turn % kPlaces]);
}

template <typename T, int DP>
__global__ void __launch_bounds__(256, 2)
    backward_columns_kernel(const __grid_constant__ BackwardColumnsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = BackwardColumnsShared<DP>;
  constexpr int kPlaces = Shared::kPlaces;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);

  if (threadIdx.x == 0) {
    s.init();
    barrier_init_done();
  }
  __syncthreads();
  if (warp_index() >= 4) {
    give_registers<DP == 64 ? 56 : 32>();
    if (warp_index() == 4) fetch_ahead<DP>(p, s);
    return;
  }
  take_registers<DP == 64 ? 200 : 224>();

  const int key = 16 * warp_index(), g = threadIdx.x % 32 / 4;
  int before = 0, turn = 0;  // tiles of rows before this tile of keys; tiles of keys
  bool owes = false;         // the place of the last rows
#pragma unroll 1
  for (;; ++turn) {
    const int place = turn % kPlaces;
    float dk[DP / 8][4] = {}, dv[DP / 8][4] = {};
    barrier_wait(&s.keys_full[place], turn / kPlaces & 1);
    const KeyTile& at = s.tile[turn % 2];
    const int tiles = uniform(at.tiles);
    if (tiles < 0) break;
    // Once the gradients of the tile before have left, the place that they took.
    if (turn > 0 && (!Shared::kEarly || owes)) {
      arrive_behind_stores(Shared::kEarly ? &s.empty[(before - 1) % Shared::kStages]
                                          : &s.keys_empty[(turn - 1) % kPlaces]);
    }
    const float none[2] = {};
    attend_rows<T, DP, false>(dk, dv, s, place, before, tiles, p.scale, p.causal, at.first_key,
                              none);
    before += tiles;

    bool live[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = at.first_key + key + g + 8 * half;
      live[half] = j < p.M &&
                   (p.key_mask == nullptr || p.key_mask[static_cast<int64_t>(at.b) * p.M + j] != 0);
    }
    const bool shares = p.k_block != nullptr;
    const float k_scale[2] = {p.scale, p.scale}, v_scale[2] = {1.f, 1.f};
    finish_rows(dk, k_scale, live, shares ? s.blocks[turn % 2][0] : nullptr, 0, p.D);
    finish_rows(dv, v_scale, live, shares ? s.blocks[turn % 2][1] : nullptr, 0, p.D);
    // Out through the place of the keys and values (of the last rows), once every warp is done with
    // them.
    owes = Shared::kEarly && tiles > 0;
    const int stage = (before - 1) % Shared::kStages;
    auto& k_out = owes ? s.q[stage] : s.k[place];
    auto& v_out = owes ? s.grad_out[stage] : s.v[place];
    group_sync();
    place_rows<T>(k_out, dk);
    place_rows<T>(v_out, dv);
    fence_for_copies();
    group_sync();
    if (threadIdx.x == 0) {
      for (int i = 0; i < DP / 64; ++i) {
        give_panel(p.add, p.grad_k_map, k_out[i], 64 * i, at.first_key, at.hk, at.b);
        give_panel(p.add, p.grad_v_map, v_out[i], 64 * i, at.first_key, at.hk, at.b);
      }
      store_commit();
    }
    if (Shared::kEarly && !owes) arrive_behind_stores(&s.keys_empty[place]);
  }
  if (threadIdx.x == 0) store_wait();
  if (blockIdx.x == 0) wait_for_previous();
#endif
}

template <typename T, int DP>
cudaError_t launch_backward_columns(const BackwardParams& params, const Device& device,
                                    cudaStream_t stream) {
  BackwardColumnsMaps p{params};
  const cudaError_t error = p.set(kDtype<T>);
  if (error != cudaSuccess) return error;
  const size_t bytes = sizeof(BackwardColumnsShared<DP>) + 1024;
  if (bytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
  const int blocks = std::min(p.items, 2 * device.sms);
  return launch_grid(backward_columns_kernel<T, DP>, blocks, 256, bytes, stream, Beside{p.beside},
                     p);
}

}  // namespace mra::cuda::sm90
