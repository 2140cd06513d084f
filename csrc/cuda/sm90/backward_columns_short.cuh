// Gradients of the keys and values on Hopper for key blocks of 32: as backward_columns.cuh, but two
// warps multiply by mma.sync, scores transposed, what a third one fetches for them: tiles of 32
// rows.
#pragma once

#include "../sm80/tile.cuh"
#include "backward.h"
#include "column_lists.cuh"
#include "divisor.h"
#include "queue.cuh"
#include "team.cuh"
#include "tma.cuh"
#include "warp_products.cuh"

namespace mra::cuda::sm90 {

struct BackwardColumnsShortMaps : BackwardParams {
  int items;              // key blocks in all
  int group;              // query heads of a key head
  int log2_rows;          // of a list
  Divisor blocks, heads;  // key blocks a head; key heads
  CUtensorMap q_map, grad_out_map, k_map, v_map, grad_k_map, grad_v_map;
};

// Measured choices (docs/kernels.md).
template <int DP>
struct BackwardColumnsShortTraits {
  static constexpr int kStages = 3, kBlocks = DP == 64 ? 4 : 2, kThreads = 96;
};

// A key block and how many tiles of rows attend it; below zero: the end.
struct KeyBlock {
  int b, hk, block, tiles;

  __device__ KeyBlock(const BackwardColumnsShortMaps& p, unsigned item) : tiles(0) {
    const unsigned head = p.blocks.divide(item);
    block = item - head * p.nk;
    b = p.heads.divide(head);
    hk = head - b * p.Hk;
  }
  __device__ int list(const BackwardColumnsShortMaps&) const { return block; }
  // Of all batch entries.
  __device__ int first_head(const BackwardColumnsShortMaps& p) const {
    return b * p.H + hk * p.group;
  }
};

template <int DP>
struct BackwardColumnsShortShared {
  static constexpr int kStages = BackwardColumnsShortTraits<DP>::kStages;
  uint16_t k[2][DP / 64][32][64], v[2][DP / 64][32][64];  // also their gradients on their way
  uint16_t q[kStages][DP / 64][32][64], grad_out[kStages][DP / 64][32][64];
  alignas(16) float sums[kStages][2][32];  // of the rows lse (log2 units) and delta
  alignas(16) float blocks[2][2][DP];      // what the block's keys share of dk and dv
  int first[kStages];                      // first row of the tile
  alignas(16) char work[2][sizeof(KeyBlock)];
  ListPlace places[2][32];  // of the lists of this key block and of the next
  uint64_t keys_full[2], keys_empty[2], full[kStages], empty[kStages];

  __device__ KeyBlock& block(int slot) { return *reinterpret_cast<KeyBlock*>(work[slot]); }
};

// Run by one warp: key blocks and, head by head, the rows that attend them.
template <int DP>
__device__ void fetch_ahead(const BackwardColumnsShortMaps& p, BackwardColumnsShortShared<DP>& s) {
  constexpr int kStages = BackwardColumnsShortTraits<DP>::kStages;
  const int lane = threadIdx.x % 32;
  int fetched = 0;
  const auto tiles_of = [&](int entries) { return entries << p.log2_rows - 5; };
  // The blocks of 32 tiles from `tile` on, one a lane.
  const auto window_of = [&](const List& list, int tile) {
    const int i = tile + lane >> p.log2_rows - 5;
    return i < list.count ? list.entries[i] : -1;
  };
  ColumnTiles<BackwardColumnsShortMaps, KeyBlock> keys(p, s.places);
  List list = keys.first_of_first();
  int window = window_of(list, 0);  // that holds the next tile's block
#pragma unroll 1
  for (; keys.has_tile(); keys.advance()) {
    const KeyBlock at = keys.take(tiles_of);
    const int turn = keys.turn, slot = turn % 2;
    if (turn >= 2) barrier_wait(&s.keys_empty[slot], turn / 2 - 1 & 1);
    uint64_t* full = &s.keys_full[slot];
    const int bytes = p.k_block == nullptr ? 0 : p.D * 4;
    if (lane == 0) s.block(slot) = at;
    barrier_expect(full, 2 * 32 * DP * 2 + 2 * bytes);
    if (lane == 0) {
      for (int i = 0; i < DP / 64; ++i) {
        copy_panel(s.k[slot][i], p.k_map, full, 64 * i, at.block * 32, at.hk, at.b);
        copy_panel(s.v[slot][i], p.v_map, full, 64 * i, at.block * 32, at.hk, at.b);
      }
      if (bytes > 0) {
        const int64_t from = ((static_cast<int64_t>(at.b) * p.Hk + at.hk) * p.nk + at.block) * p.D;
        copy_bytes(s.blocks[slot][0], p.k_block + from, bytes, full);
        copy_bytes(s.blocks[slot][1], p.v_block + from, bytes, full);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < p.group; ++i) {
      const int h = at.hk * p.group + i, tiles = tiles_of(list.count);
      const float* sums =
          p.sums + static_cast<int64_t>(at.first_head(p) + i) * sum_chunks(p.rows) * 64;
#pragma unroll 1
      for (int tile = 0; tile < max(tiles, 1); ++tile) {
        const int block = __shfl_sync(0xffffffffu, window, tile % 32);
        if (tile + 1 < tiles) {
          if (tile % 32 == 31) window = window_of(list, tile + 1);
        } else {  // on to the next head's
          if (i + 1 < p.group) {
            list = keys.list_of(at, i + 1);
          } else {
            list = keys.first_of_next();
          }
          window = window_of(list, 0);
        }
        if (tiles == 0) break;
        int first = (p.rows + 63) / 64 * 64;  // beyond the end: zeros, without weight
        if (static_cast<unsigned>(block) < static_cast<unsigned>(p.row_lists.lists)) {
          first = min(first, (block << p.log2_rows) + (32 * tile & p.list_rows - 1));
        }
        const int stage = fetched % kStages;
        if (fetched >= kStages) barrier_wait(&s.empty[stage], fetched / kStages - 1 & 1);
        uint64_t* full = &s.full[stage];
        if (lane == 0) s.first[stage] = first;
        barrier_expect(full, 2 * 32 * DP * 2 + sizeof(s.sums[0]));
        if (lane == 0) {
          for (int i = 0; i < DP / 64; ++i) {
            copy_panel(s.q[stage][i], p.q_map, full, 64 * i, first, h, at.b);
            copy_panel(s.grad_out[stage][i], p.grad_out_map, full, 64 * i, first, h, at.b);
          }
          copy_bytes(s.sums[stage], sums + first / 32 * 64, sizeof(s.sums[0]), full);
        }
        __syncwarp();
        ++fetched;
      }
    }
  }
  const int turn = keys.turn;
  if (turn >= 2) barrier_wait(&s.keys_empty[turn % 2], turn / 2 - 1 & 1);
  if (lane == 0) s.block(turn % 2).tiles = -1;
  barrier_arrive(&s.keys_full[turn % 2]);
}

// kColumns: of the DP of a row, those that may be other than zeros.
template <typename T, int DP, int kColumns>
__global__ void __launch_bounds__(BackwardColumnsShortTraits<DP>::kThreads,
                                  BackwardColumnsShortTraits<DP>::kBlocks)
    backward_columns_short_kernel(const __grid_constant__ BackwardColumnsShortMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kStages = BackwardColumnsShortTraits<DP>::kStages;
  extern __shared__ char raw[];
  auto& s = aligned<BackwardColumnsShortShared<DP>>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&s.keys_full[i], 1);
      barrier_init(&s.keys_empty[i], 2);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], 2);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (warp_index() == 2) {
    fetch_ahead<DP>(p, s);
    return;
  }

  const PanelLane lane;
  const int key = 16 * warp_index(), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const bool first_lane = threadIdx.x % 32 == 0;
  int at_tile = 0, turn = 0;  // tiles of rows so far; key blocks
#pragma unroll 1
  for (;; ++turn) {
    const int slot = turn % 2;
    barrier_wait(&s.keys_full[slot], turn / 2 & 1);
    const KeyBlock at = s.block(slot);
    if (at.tiles < 0) break;
    // The place of the block before is given back once its gradients have left.
    if (turn > 0) {
      if (first_lane) store_wait();
      barrier_arrive(&s.keys_empty[slot ^ 1]);
    }
    float dk[kColumns / 8][4] = {}, dv[kColumns / 8][4] = {};
#pragma unroll 1
    for (int tile = 0; tile < at.tiles; ++tile, ++at_tile) {
      const int stage = at_tile % kStages;
      barrier_wait(&s.full[stage], at_tile / kStages & 1);
      float c[4][4] = {}, ds[4][4] = {};
      multiply_nt<T, kColumns / 16>(c, s.k[slot], key, s.q[stage], lane);
      multiply_nt<T, kColumns / 16>(ds, s.v[slot], key, s.grad_out[stage], lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 l = *reinterpret_cast<const float2*>(&s.sums[stage][0][8 * n + 2 * t]);
        const float2 d = *reinterpret_cast<const float2*>(&s.sums[stage][1][8 * n + 2 * t]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          c[n][i] = exp2_approx(fmaf(c[n][i], p.scale * kLog2e, -(i % 2 ? l.y : l.x)));
          if (p.causal) {
            const int row = s.first[stage] + 8 * n + 2 * t + i % 2;
            if (at.block * 32 + key + g + 8 * (i / 2) > row) c[n][i] = 0.f;
          }
          ds[n][i] = (ds[n][i] - (i % 2 ? d.y : d.x)) * c[n][i];
        }
      }
      multiply_pn<T>(dv, c, s.grad_out[stage], lane);
      multiply_pn<T>(dk, ds, s.q[stage], lane);
      barrier_arrive(&s.empty[stage]);
    }

    bool live[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = at.block * 32 + key + g + 8 * half;
      live[half] = j < p.M &&
                   (p.key_mask == nullptr || p.key_mask[static_cast<int64_t>(at.b) * p.M + j] != 0);
    }
    const bool shares = p.k_block != nullptr;
    const float k_scale[2] = {p.scale, p.scale}, v_scale[2] = {1.f, 1.f};
    finish_rows(dk, k_scale, live, shares ? s.blocks[slot][0] : nullptr, 0, p.D);
    finish_rows(dv, v_scale, live, shares ? s.blocks[slot][1] : nullptr, 0, p.D);
    // Out through the place of the keys and values, of which each warp has read its own.
    __syncwarp();
    place_rows<T>(s.k[slot], key, dk);
    place_rows<T>(s.v[slot], key, dv);
    fence_for_copies();
    __syncwarp();
    if (first_lane) {
      const int row = at.block * 32 + key;
      for (int i = 0; i < DP / 64; ++i) {
        give_panel(p.add, p.grad_k_map, s.k[slot][i][key], 64 * i, row, at.hk, at.b);
        give_panel(p.add, p.grad_v_map, s.v[slot][i][key], 64 * i, row, at.hk, at.b);
      }
      store_commit();
    }
  }
  if (first_lane) store_wait();
  if (blockIdx.x == 0) wait_for_previous();
#endif
}

template <typename T, int DP>
cudaError_t launch_backward_columns_short(const BackwardParams& params, const Device& device,
                                          cudaStream_t stream) {
  using Traits = BackwardColumnsShortTraits<DP>;
  if (params.block_k != 32 || params.list_rows < 32 || params.sums == nullptr) {
    return cudaErrorNotSupported;
  }
  BackwardColumnsShortMaps p{params};
  constexpr Dtype dtype = kDtype<T>;
  const auto of_rows = [&](CUtensorMap* to, const void* data, const Strides& strides) {
    return tensor_map(to, dtype, data, strides, p.B, p.H, p.rows, p.D, 32);
  };
  const auto of_keys = [&](CUtensorMap* to, const void* data, const Strides& strides, int rows) {
    return tensor_map(to, dtype, data, strides, p.B, p.Hk, p.M, p.D, rows);
  };
  const bool maps = of_rows(&p.q_map, p.q, p.q_strides) &&
                    of_rows(&p.grad_out_map, p.grad_out, p.grad_out_strides) &&
                    of_keys(&p.k_map, p.k, p.k_strides, 32) &&
                    of_keys(&p.v_map, p.v, p.v_strides, 32) &&
                    of_keys(&p.grad_k_map, p.grad_k, p.grad_k_strides, 16) &&
                    of_keys(&p.grad_v_map, p.grad_v, p.grad_v_strides, 16);
  if (!maps) return cudaErrorNotSupported;
  const int64_t items = static_cast<int64_t>(p.nk) * p.B * p.Hk;
  if (items > INT_MAX / 2) return cudaErrorInvalidConfiguration;
  p.items = static_cast<int>(items);
  p.group = p.H / p.Hk;
  for (p.log2_rows = 5; 1 << p.log2_rows < p.list_rows;) ++p.log2_rows;
  p.blocks = Divisor(p.nk);
  p.heads = Divisor(p.Hk);
  const auto kernel = p.D <= 32   ? backward_columns_short_kernel < T, DP,
             DP == 64 ? 32 : DP > : backward_columns_short_kernel<T, DP, DP>;
  return launch_teams<BackwardColumnsShortShared<DP>, Traits>(kernel, p, device, stream,
                                                              Together{p.beside});
}

}  // namespace mra::cuda::sm90
