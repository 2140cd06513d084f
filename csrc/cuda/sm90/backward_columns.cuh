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

template <int DP>
struct BackwardColumnsShared : ColumnsShared<DP> {
  uint32_t lists[1];  // kLists > 1: list_words
};

// A tile of 64 keys. `block`: the first of its kLists blocks, or the one that it is a part of.
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
};

// Of one query head the rows that attend a tile of keys, 64 a tile.
template <int kLists>
struct ColumnRows {
  List list;       // kLists = 1
  uint32_t* lists;  // else: list_words
  int entries, tiles;

  __device__ ColumnRows(const BackwardParams& p, uint32_t* lists, const KeyTile& at, int64_t head)
      : lists(lists) {
    if constexpr (kLists == 1) {
      list = list_of(p.column_lists, head, at.block);
      entries = list.count;
    } else {
      entries = read_lists<kLists>(p.column_lists, head, at.block, p.row_lists.lists, lists);
    }
    tiles = static_cast<int>((static_cast<int64_t>(entries) * p.list_rows + 63) / 64);
  }
  // Block and lists of entry i; out of range where there is none.
  __device__ MergedEntry entry(const BackwardParams& p, int i) const {
    if (i >= entries) return {0xffffffu};
    if constexpr (kLists == 1) return {static_cast<uint32_t>(list.entries[i])};
    return {lists[kLists * ((p.row_lists.lists + 31) / 32) + i]};
  }
};

// Run by one warp: the rows, head by head.
template <int DP, int kLists>
__device__ void fetch_rows(const BackwardColumnsMaps& p, BackwardColumnsShared<DP>& s,
                           const KeyTile& at) {
  constexpr int kStages = ColumnsShared<DP>::kStages;
  const int lane = threadIdx.x % 32, run = min(p.list_rows, 64), runs = 64 / run;
  const int group = p.H / p.Hk, first_head = at.hk * group;
  const int64_t batch = static_cast<int64_t>(at.b) * p.H;
  ColumnRows<kLists> rows(p, s.lists, at, batch + first_head);
  int tiles = rows.tiles;
  if (group > 1) {
    for (int h = first_head + 1; h < first_head + group; ++h) {
      tiles += ColumnRows<kLists>(p, s.lists, at, batch + h).tiles;
    }
    rows = ColumnRows<kLists>(p, s.lists, at, batch + first_head);
  }
  if (lane == 0) {
    s.tiles = tiles;
    s.fetch_keys(p.k_map, p.v_map, at.first_key, at.hk, at.b);
  }
  __syncwarp();
  const int log2_rows = __ffs(p.list_rows) - 1;
  int fetched = 0;
#pragma unroll 1
  for (int h = first_head;;) {
    const float* sums = p.sums + (batch + h) * sum_chunks(p.rows) * 64;
    // Of this lane's run of a tile.
    const auto entry_of = [&](int tile) {
      return lane < runs ? rows.entry(p, 64 * tile + run * lane >> log2_rows)
                         : MergedEntry{0xffffffu};
    };
    MergedEntry entry = entry_of(0);
#pragma unroll 1
    for (int tile = 0; tile < rows.tiles; ++tile) {
      const uint32_t block = kLists == 1 ? entry.bits : entry.block();
      // Beyond the end: zeros, without weight.
      int first = (p.rows + 63) / 64 * 64;
      if (block < static_cast<uint32_t>(p.row_lists.lists)) {
        first = min(first, static_cast<int>(block << log2_rows) +
                               (64 * tile + run * lane & p.list_rows - 1));
      }
      const uint32_t wanted = kLists > 1 ? wanted_sixteens(entry.lists(), run) : 0;
      if (tile + 1 < rows.tiles) entry = entry_of(tile + 1);
      const int stage = fetched % kStages;
      if (fetched >= kStages) barrier_wait(&s.empty[stage], fetched / kStages - 1 & 1);
      if (p.causal) {
        const int at = 16 * lane & 63, sixteen = __shfl_sync(0xffffffffu, first, at / run) + at % run;
        if (lane < 4) s.first[stage][lane] = sixteen;
        __syncwarp();
      }
      if (lane == 0) {
        if (kLists > 1) s.wanted[stage] = wanted;
        announce_tile(s, stage);
      }
      __syncwarp();
      if (lane < runs) {
        fetch_run(s, p.q_map, p.grad_out_map, sums, stage, run * lane, run, first, h, at.b);
      }
      __syncwarp();
      ++fetched;
    }
    if (++h == first_head + group) return;
    rows = ColumnRows<kLists>(p, s.lists, at, batch + h);
  }
}

template <typename T, int DP, int kLists>
__global__ void __launch_bounds__(256, 2)
    backward_columns_kernel(const __grid_constant__ BackwardColumnsMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = BackwardColumnsShared<DP>;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);

  if (threadIdx.x == 0) {
    s.init();
    barrier_init_done();
  }
  __syncthreads();
  const KeyTile at(p);
  if (warp_index() >= 4) {
    give_registers<DP == 64 ? 56 : 32>();
    if (warp_index() == 4) fetch_rows<DP, kLists>(p, s, at);
    return;
  }
  take_registers<DP == 64 ? 200 : 224>();

  const int key = 16 * warp_index(), g = threadIdx.x % 32 / 4;
  float dk[DP / 8][4] = {}, dv[DP / 8][4] = {};
  barrier_wait(&s.keys_full, 0);
  const int tiles = uniform(s.tiles);
  const float none[2] = {};
  attend_rows<T, DP, false, kLists>(dk, dv, s, tiles, p.scale, p.causal, at.first_key, none);

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
  const int own_block = min(own.block + warp_index() * kLists / 4, p.nk - 1);
  const int64_t block = ((static_cast<int64_t>(own.b) * p.Hk + own.hk) * p.nk + own_block) * p.D;
  const float k_scale[2] = {p.scale, p.scale}, v_scale[2] = {1.f, 1.f};
  finish_rows(dk, k_scale, live, p.k_block == nullptr ? nullptr : p.k_block + block, 0, p.D);
  finish_rows(dv, v_scale, live, p.v_block == nullptr ? nullptr : p.v_block + block, 0, p.D);
  // Out through the place of the keys and values, once every warp is done with them.
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

template <typename T, int DP, int kLists>
cudaError_t launch_backward_columns_lists(const BackwardColumnsMaps& p, const Device& device,
                                          cudaStream_t stream) {
  const int words = kLists > 1 ? list_words(kLists, p.row_lists.lists) : 0;
  const size_t bytes = sizeof(BackwardColumnsShared<DP>) + 1024 + words * sizeof(uint32_t);
  if (bytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
  const int64_t blocks = (p.M + 63) / 64 * static_cast<int64_t>(p.B) * p.Hk;
  return launch(backward_columns_kernel<T, DP, kLists>, p, blocks, 256 / 32, bytes, stream);
}

template <typename T, int DP>
cudaError_t launch_backward_columns(const BackwardParams& params, const Device& device,
                                    cudaStream_t stream) {
  const bool merged = params.block_k < 64;
  if (params.list_rows < 32 || params.sums == nullptr ||
      (merged && params.row_lists.lists > kMaxMerged)) {
    return cudaErrorNotSupported;
  }
  BackwardColumnsMaps p{params};
  constexpr Dtype dtype = kDtype<T>;
  const int run = p.list_rows < 64 ? p.list_rows : 64;
  const bool maps =
      tensor_map(&p.q_map, dtype, p.q, p.q_strides, p.B, p.H, p.rows, p.D, run) &&
      tensor_map(&p.grad_out_map, dtype, p.grad_out, p.grad_out_strides, p.B, p.H, p.rows, p.D,
                 run) &&
      tensor_map(&p.k_map, dtype, p.k, p.k_strides, p.B, p.Hk, p.M, p.D, 64) &&
      tensor_map(&p.v_map, dtype, p.v, p.v_strides, p.B, p.Hk, p.M, p.D, 64) &&
      tensor_map(&p.grad_k_map, dtype, p.grad_k, p.grad_k_strides, p.B, p.Hk, p.M, p.D, 64) &&
      tensor_map(&p.grad_v_map, dtype, p.grad_v, p.grad_v_strides, p.B, p.Hk, p.M, p.D, 64);
  if (!maps) return cudaErrorNotSupported;
  switch (p.block_k) {
    case 16:
      return launch_backward_columns_lists<T, DP, 4>(p, device, stream);
    case 32:
      return launch_backward_columns_lists<T, DP, 2>(p, device, stream);
    default:
      return launch_backward_columns_lists<T, DP, 1>(p, device, stream);
  }
}

}  // namespace mra::cuda::sm90
