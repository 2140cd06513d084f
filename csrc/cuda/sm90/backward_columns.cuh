// Gradients of the keys and values on Hopper: what sm80/backward_columns.cuh computes for the keys
// of one block from the rows of its column list, for half types and head dims up to 128. Persistent
// blocks of threads take tiles of 64 keys in turns: one warp fetches tiles of 64 rows ahead, a
// warpgroup multiplies with the scores transposed. Registers move from the fetching warps to those
// that hold two accumulators.
#pragma once

#include <algorithm>

#include "column_lists.cuh"
#include "columns.cuh"
#include "divisor.h"

namespace mra::cuda::sm90 {

struct BackwardColumnsMaps : BackwardParams {
  int items;                     // tiles of keys in all
  int group;                     // query heads of a key head
  int run, log2_rows;            // rows of one copy; of a list
  Divisor key_tiles, key_heads;  // tiles a head
  CUtensorMap q_map, grad_out_map, k_map, v_map, grad_k_map, grad_v_map;

  cudaError_t set(Dtype dtype) {
    if (block_k % 64 != 0 || list_rows < 32 || sums == nullptr) return cudaErrorNotSupported;
    group = H / Hk;
    run = std::min(list_rows, 64);
    for (log2_rows = 5; 1 << log2_rows < list_rows;) ++log2_rows;
    const auto of_rows = [&](CUtensorMap* to, const void* data, const Strides& strides) {
      return tensor_map(to, dtype, data, strides, B, H, rows, D, run);
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
    key_tiles = Divisor((M + 63) / 64);
    key_heads = Divisor(Hk);
    const int64_t tiles = key_tiles.d * static_cast<int64_t>(B) * Hk;
    if (tiles > INT_MAX / 2) return cudaErrorInvalidConfiguration;
    items = static_cast<int>(tiles);
    return cudaSuccess;
  }
};

// A tile of 64 keys of one block, and how many tiles of rows attend it; below zero: the end.
struct KeyTile {
  int b, hk, first_key, tiles;

  __device__ KeyTile(const BackwardColumnsMaps& p, unsigned item) : tiles(0) {
    const unsigned head = p.key_tiles.divide(item);
    first_key = (item - head * p.key_tiles.d) * 64;
    b = p.key_heads.divide(head);
    hk = head - b * p.Hk;
  }
  // Its block, whose lists are its own.
  __device__ int list(const BackwardColumnsMaps& p) const { return first_key >> p.log2_block_k; }
  // Of all batch entries.
  __device__ int first_head(const BackwardColumnsMaps& p) const { return b * p.H + hk * p.group; }
};

template <int DP>
struct BackwardColumnsShared : ColumnsShared<DP, DP == 64 ? 2 : 1> {
  // Of every other tile; `blocks`: what the block's keys share of dk and dv.
  alignas(16) float blocks[2][2][DP];
  alignas(16) KeyTile tile[2];
  ListPlace places[2][32];  // of the lists of this tile of keys and of the next

  // What fetch_ahead fetches behind a tile's last rows: nothing.
  __device__ void fetch_last(const BackwardColumnsMaps&, const KeyTile&, int&) {}
};

// The keys of a tile and what else its end needs, by one warp.
template <int DP>
__device__ void fetch_tile(const BackwardColumnsMaps& p, BackwardColumnsShared<DP>& s,
                           const KeyTile& at, int turn) {
  const int bytes = p.k_block == nullptr ? 0 : p.D * 4, place = turn % s.kPlaces;
  if (threadIdx.x % 32 == 0) s.tile[turn % 2] = at;
  s.fetch_keys(place, p.k_map, p.v_map, at.first_key, at.hk, at.b, 2 * bytes);
  if (bytes == 0 || threadIdx.x % 32 != 0) return;
  const int64_t from = ((static_cast<int64_t>(at.b) * p.Hk + at.hk) * p.nk + at.list(p)) * p.D;
  copy_bytes(s.blocks[turn % 2][0], p.k_block + from, bytes, &s.keys_full[place]);
  copy_bytes(s.blocks[turn % 2][1], p.v_block + from, bytes, &s.keys_full[place]);
}

// Run by one warp, of kTeams in a block of threads: the rows of tiles of keys, head by head.
template <int kTeams, class Maps, class Shared>
__device__ void fetch_ahead(const Maps& p, Shared& s, int team) {
  constexpr int kStages = Shared::kStages, kPlaces = Shared::kPlaces;
  const int lane = threadIdx.x % 32;
  int fetched = 0;  // tiles of rows
  const auto tiles_of = [&](int entries) {
    return p.log2_rows < 6 ? entries + 1 >> 1 : entries << p.log2_rows - 6;
  };
  // The block of this lane's run of a tile.
  const auto block_of = [&](const List& list, int tile) {
    const int i = 64 * tile + p.run * lane >> p.log2_rows;
    return p.run * lane < 64 && i < list.count ? list.entries[i] : -1;
  };
  ColumnTiles<BackwardColumnsMaps, KeyTile, kTeams> keys(p, s.places, team);
  List list = keys.first_of_first();
  int block = block_of(list, 0);  // of the next tile of rows
#pragma unroll 1
  for (; keys.has_tile(); keys.advance()) {
    const KeyTile at = keys.take(tiles_of);
    const int turn = keys.turn;
    if (turn >= kPlaces) barrier_wait(&s.keys_empty[turn % kPlaces], turn / kPlaces - 1 & 1);
    fetch_tile(p, s, at, turn);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < p.group; ++i) {
      const int h = at.hk * p.group + i, tiles = tiles_of(list.count);
#pragma unroll 1
      for (int tile = 0; tile < max(tiles, 1); ++tile) {
        int first = (p.rows + 63) / 64 * 64;  // beyond the end: zeros, without weight
        if (static_cast<unsigned>(block) < static_cast<unsigned>(p.row_lists.lists)) {
          first = min(first, (block << p.log2_rows) + (64 * tile + p.run * lane & p.list_rows - 1));
        }
        if (tile + 1 >= tiles) {  // on to the next head's
          if (i + 1 < p.group) {
            list = keys.list_of(at, i + 1);
          } else {
            list = keys.first_of_next();
          }
        }
        block = block_of(list, tile + 1 < tiles ? tile + 1 : 0);
        if (tiles == 0) break;
        const int stage = fetched % kStages;
        if (fetched >= kStages) barrier_wait(&s.empty[stage], fetched / kStages - 1 & 1);
        if (p.causal) {
          const int at = 16 * lane & 63,
                    sixteen = __shfl_sync(0xffffffffu, first, at >> min(p.log2_rows, 6)) +
                              (at & p.run - 1);
          if (lane < 4) s.first[stage][lane] = sixteen;
        }
        announce_tile(s, stage);
        if (p.run * lane < 64) {
          const float* sums =
              p.sums + static_cast<int64_t>(at.first_head(p) + i) * sum_chunks(p.rows) * 64;
          fetch_run(s, p.q_map, p.grad_out_map, sums, stage, p.run * lane, p.run, first, h, at.b);
        }
        __syncwarp();
        ++fetched;
      }
    }
    s.fetch_last(p, at, fetched);
  }
  const int turn = keys.turn;
  if (turn >= kPlaces) barrier_wait(&s.keys_empty[turn % kPlaces], turn / kPlaces - 1 & 1);
  if (lane == 0) s.tile[turn % 2].tiles = -1;
  barrier_arrive(&s.keys_full[turn % kPlaces]);
}

// Measured choices (docs/kernels.md): blocks of threads a multiprocessor, warpgroups of each that
// attend tiles of keys of their own, registers of their threads and of those that fetch.
template <int DP>
struct BackwardColumnsTraits {
  static constexpr int kBlocks = DP == 64 ? 1 : 2, kTeams = DP == 64 ? 3 : 1;
  static constexpr int kThreads = 128 * (kTeams + 1);
  static constexpr int kTaken = DP == 64 ? 160 : 224, kGiven = 32;
};

template <typename T, int DP>
__global__ void __launch_bounds__(BackwardColumnsTraits<DP>::kThreads,
                                  BackwardColumnsTraits<DP>::kBlocks)
    backward_columns_kernel(const __grid_constant__ BackwardColumnsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = BackwardColumnsShared<DP>;
  using Traits = BackwardColumnsTraits<DP>;
  constexpr int kPlaces = Shared::kPlaces, kTeams = Traits::kTeams;
  extern __shared__ char raw[];
  const Team<kTeams> team;
  Shared& s = aligned<Shared>(raw + team.index * team_pitch<Shared>());

  if (team.first_thread()) {
    s.init();
    barrier_init_done();
  }
  __syncthreads();
  if (!team.attends()) {
    give_registers<Traits::kGiven>();
    if (team.fetches()) fetch_ahead<kTeams>(p, s, team.index);
    return;
  }
  take_registers<Traits::kTaken>();

  const int key = 16 * (warp_index() % 4), g = threadIdx.x % 32 / 4;
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
    team.sync();
    place_rows_by_pairs<T>(k_out, dk);
    place_rows_by_pairs<T>(v_out, dv);
    fence_for_copies();
    team.sync();
    if (team.first_thread()) {
      for (int i = 0; i < DP / 64; ++i) {
        give_panel(p.add, p.grad_k_map, k_out[i], 64 * i, at.first_key, at.hk, at.b);
        give_panel(p.add, p.grad_v_map, v_out[i], 64 * i, at.first_key, at.hk, at.b);
      }
      store_commit();
    }
    if (Shared::kEarly && !owes) arrive_behind_stores(&s.keys_empty[place]);
  }
  if (team.first_thread()) store_wait();
  if (blockIdx.x == 0) wait_for_previous();
#endif
}

template <typename T, int DP>
cudaError_t launch_backward_columns(const BackwardParams& params, const Device& device,
                                    cudaStream_t stream) {
  BackwardColumnsMaps p{params};
  const cudaError_t error = p.set(kDtype<T>);
  if (error != cudaSuccess) return error;
  using Traits = BackwardColumnsTraits<DP>;
  return launch_teams<BackwardColumnsShared<DP>, Traits, Traits::kTeams>(
      backward_columns_kernel<T, DP>, p, device, stream, Together{p.beside});
}

}  // namespace mra::cuda::sm90
