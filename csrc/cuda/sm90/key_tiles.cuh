// Tiles of 64 keys and values on their way from memory, and what centres them: the part that the
// kernels of the order-1 term share.
#pragma once

#include "../sm80/tile.cuh"
#include "half_pairs.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace mra::cuda::sm90 {

// What comes with a tile of keys besides: nothing.
struct NothingElse {
  __device__ __forceinline__ int bytes(int) const { return 0; }
  __device__ __forceinline__ void copy(int, int, uint64_t*) const {}
};

template <int DP, int kPlaces, bool kWeighted, typename Value = __nv_bfloat16>
struct KeyTiles {
  using T = Value;
  static constexpr int kStages = kPlaces, kPanels = DP / 64;
  static constexpr int kUnits = 4 * kPanels;  // a warp's share of columns: 32, or 16 of 32
  uint16_t x[kStages][2][kPanels][64][64];    // keys, values
  uint32_t valid[kStages][2];                 // one bit a key
  uint64_t full[kStages], empty[kStages];
  float weight[kWeighted ? kStages : 1][64];  // within the block of the key

  __device__ __forceinline__ auto& panel(int stage, int which, int i) { return x[stage][which][i]; }

  // By one thread; `warps` give a place back.
  __device__ void init(int warps) { barrier_init_ring(full, empty, warps); }

  // By one warp: `tiles` tiles from key `first` on, `step` keys apart, but for the first `done`.
  // mask: [B, M] or null; weights: of the M keys. `also` fetches `bytes(tile)` more into its own
  // `stage`, by one lane.
  template <class Also = NothingElse>
  __device__ void fetch(const CUtensorMap& k_map, const CUtensorMap& v_map, const uint8_t* mask,
                        const float* weights, int M, int b, int h, int first, int tiles,
                        int step = 64, const Also& also = {}, int done = 0) {
    const int lane = threadIdx.x % 32;
    float next[2];  // weights of the next tile, on their way
    const auto look_up = [&](int key) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = key + 32 * half + lane;
        next[half] = j >= 0 && j < M ? weights[j] : 0.f;
      }
    };
    if constexpr (kWeighted) look_up(first);
#pragma unroll 1
    for (int tile = done; tile < tiles; ++tile) {
      const int stage = tile % kStages, key = first + step * tile;
      uint32_t bits[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = key + 32 * half + lane;
        const bool there = j < M && (mask == nullptr || mask[static_cast<int64_t>(b) * M + j]);
        bits[half] = __ballot_sync(0xffffffffu, there);
      }
      if (tile >= kStages) barrier_wait(&empty[stage], tile / kStages - 1 & 1);
      if constexpr (kWeighted) {
        weight[stage][lane] = next[0];
        weight[stage][lane + 32] = next[1];
        look_up(key + step);
      }
      if (lane == 0) {
        valid[stage][0] = bits[0];
        valid[stage][1] = bits[1];
      }
      barrier_expect(&full[stage], 2 * 64 * DP * 2 + also.bytes(tile));
      if (lane == 0) {
        also.copy(tile, stage, &full[stage]);
        for (int i = 0; i < kPanels; ++i) {
          copy_panel(x[stage][0][i], k_map, &full[stage], 64 * i, key, h, b);
          copy_panel(x[stage][1][i], v_map, &full[stage], 64 * i, key, h, b);
        }
      }
      __syncwarp();
    }
  }
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

// Keys of a block that count: block `block` of kBlocks of a tile.
template <int kBlocks>
__device__ __forceinline__ int count_of_block(int block, const uint32_t (&valid)[2]) {
  if (kBlocks == 1) return __popc(valid[0]) + __popc(valid[1]);
  if (kBlocks == 2) return __popc(block == 0 ? valid[0] : valid[1]);
  return __popc((block < 2 ? valid[0] : valid[1]) & 0xffffu << block % 2 * 16);
}

// Columns `unit` of the tile at `stage`: 32 of keys or values or, where all from 32 on are zeros
// (kNarrow), 16; 16 bytes of some rows for each lane of a warp.
template <bool kNarrow, class Tiles>
struct TileUnit {
  static constexpr int kChunks = kNarrow ? 2 : 4;
  static constexpr int kReads = 2 * kChunks, kStep = 64 / kReads;  // reads of a lane; rows at once
  int row, which, chunk;  // the first row; of keys (0) or values; which 16 bytes of a panel's
  uint16_t (*rows)[64];
  uint32_t valid[2];

  __device__ __forceinline__ TileUnit(Tiles& s, int stage, int unit) {
    // Lanes of a quarter warp read four chunks of two rows that lie four apart, or two chunks of
    // four rows that lie two apart: no bank twice.
    const int lane = threadIdx.x % 32, panel = unit / 2 % Tiles::kPanels;
    row = kNarrow ? lane / 2 % 4 * 2 + lane / 8 % 2 + lane / 16 * 8 : lane / 4 % 2 * 4 + lane / 8;
    which = unit / (2 * Tiles::kPanels);
    chunk = unit % 2 * kChunks + lane % kChunks;
    rows = s.panel(stage, which, panel);
    valid[0] = s.valid[stage][0], valid[1] = s.valid[stage][1];
  }
  __device__ __forceinline__ uint4* place(int i) const {
    return reinterpret_cast<uint4*>(&rows[row + kStep * i][(chunk ^ row % 8) * 8]);
  }
  __device__ __forceinline__ bool counts(int i) const {
    return valid[kStep * i / 32] >> (kStep * i % 32 + row) & 1;
  }
};

// Rows of columns `unit` less the means of their blocks, to where they were, zeros for rows that
// don't count, by one warp. means: of keys and of values, [kBlocks][D] of the tile each.
template <int kBlocks, bool kNarrow, class Tiles, class Means>
__device__ __forceinline__ void take_means(Tiles& s, int stage, int unit, const Means& means,
                                           int D) {
  using T = typename Tiles::T;
  const TileUnit<kNarrow, Tiles> at(s, stage, unit);
  constexpr int kRows = at.kReads / kBlocks;
  const int d = 64 * (unit / 2 % Tiles::kPanels) + 8 * at.chunk;
  const bool all = (at.valid[0] & at.valid[1]) == kFullWarp;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t high[4], low[4];  // a mean in two parts
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      float4 mean{};
      if (d < D) {
        mean = *reinterpret_cast<const float4*>(&means[at.which][block * D + d + 2 * e]);
      }
      const SplitPair<T> u(mean.x, mean.y), w(mean.z, mean.w);
      high[e] = u.high, high[e + 1] = w.high;
      low[e] = u.low, low[e + 1] = w.low;
    }
#pragma unroll
    for (int i = block * kRows; i < (block + 1) * kRows; ++i) {
      uint4 x = *at.place(i);
      const auto deviation = [&](uint32_t pair, int e) {
        return less<T>(less<T>(pair, high[e]), low[e]);
      };
      x = make_uint4(deviation(x.x, 0), deviation(x.y, 1), deviation(x.z, 2), deviation(x.w, 3));
      *at.place(i) = all || at.counts(i) ? x : uint4{};
    }
  }
}

// The same with means that are made here, plain or by the tile's weights; kRooted: times the root
// of weight and count, so that products of two have the weight. Returns the number of rows that
// count.
template <int kBlocks, bool kWeighted, bool kNarrow, bool kRooted = false, class Tiles>
__device__ __forceinline__ int centre(Tiles& s, int stage, int unit) {
  using T = typename Tiles::T;
  const TileUnit<kNarrow, Tiles> at(s, stage, unit);
  constexpr int kReads = at.kReads, kStep = at.kStep;
  const auto& valid = at.valid;
  const int row = at.row;

  uint4 bits[kReads];
#pragma unroll
  for (int i = 0; i < kReads; ++i) bits[i] = at.counts(i) ? *at.place(i) : uint4{};
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    constexpr int kRows = kReads / kBlocks;  // of this lane
    float sum[8] = {}, x[8];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      unpack16<T>(bits[block * kRows + i], x);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if constexpr (kWeighted) {
          sum[e] = fmaf(s.weight[stage][row + kStep * (block * kRows + i)], x[e], sum[e]);
        } else {
          sum[e] += x[e];
        }
      }
    }
    const int count = count_of_block<kBlocks>(block, valid);
    float mean = reduce_scatter(sum);
    if constexpr (kNarrow) mean += __shfl_xor_sync(0xffffffffu, mean, 2);
    if constexpr (!kWeighted) mean /= static_cast<float>(max(count, 1));
    all_gather(sum, mean);
#pragma unroll
    for (int i = block * kRows; i < (block + 1) * kRows; ++i) {
      unpack16<T>(bits[i], x);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = at.counts(i) ? x[e] - sum[e] : 0.f;
      if constexpr (kRooted) {
        const float root = sqrtf(s.weight[stage][row + kStep * i] * static_cast<float>(count));
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] *= root;
      }
      using M = Mma<T>;
      *at.place(i) = make_uint4(M::pack(x[0], x[1]), M::pack(x[2], x[3]), M::pack(x[4], x[5]),
                                M::pack(x[6], x[7]));
    }
  }
  return __popc(valid[0]) + __popc(valid[1]);
}

}  // namespace mra::cuda::sm90
