// Pool and the moments of order 1 in one reading of the keys and values, on Hopper; see forward.h.
#pragma once

#include <algorithm>

#include "../plan.h"
#include "../pool.h"

namespace mra::cuda::sm90 {

// How keys weigh within their blocks where the kernel makes it of their logits.
struct KeyWeights {
  const void* sample;  // [B, Hk, kSampleRows, D] T: as WeightsParams.rows; null: not made
  // As there, of `parts_chunks` parts of a head. Null: weights of the mean query alone.
  const float2* parts;
  const float* offsets;
  int parts_chunks;
  float scale;
  float* weights;   // [B, Hk, nk << log2_block_k]
  float* mass;      // [B, Hk, nk]
  float* key_bias;  // [B, Hk, nk] or null
  float* k_plain;   // [B, Hk, nk, D] or null: means of keys that weigh alike, for a plan
};

// The other stages before fine, made along with the moments where a block of threads has all keys
// of a head. There is a key head for each query head.
struct WholeHead {
  PoolTensor query;    // mean null: none of this
  PlanParams plan;     // index null: none
  float* centre;       // [B, Hk, D], or null where keys weigh alike
  float* centre_term;  // [B, Hk, 2, dim]: the centre times C and Sigma
};
// The most blocks of keys and of queries that such a head has.
constexpr int kWholeKeyBlocks = 32, kWholeQueryBlocks = 64;

struct Moments {
  Dtype dtype;        // T: bf16, or f16 with sums
  const void *k, *v;  // [B, Hk, M, D] T
  Strides k_strides, v_strides;
  const uint8_t* mask;  // [B, M] or null
  int B, Hk, M, D, nk, log2_block_k;

  float *k_mean, *v_mean;       // [B, Hk, nk, D], or null: not written
  void *k_rounded, *v_rounded;  // [B, Hk, nk, D] T: the same rounded, or null
  int* key_count;               // [B, nk], or null
  // [B, Hk, nk << log2_block_k], or null: of each key within its block. The means are weighted with
  // them, and the sums with them and the count of the block.
  const float* weights;
  KeyWeights made;  // or so
  WholeHead whole;  // with one chunk a head; its centre then stands for made.sample
  int chunks;       // parts of a head that are summed apart: see tile_chunks
  int unit_tiles;   // a chunk starts at a multiple of so many tiles of 64
  float* sums;      // [B, Hk, chunks, 2, dim, dim], or null for one chunk:
  void* matrices;   // then [B, Hk, 2, dim, dim] bfloat16, over the number of valid keys
};

// As many chunks as make the last wave of blocks of threads end soonest; a block costs some four
// tiles besides its own. `resident`: blocks of threads that a multiprocessor holds.
inline int tile_chunks(int heads, int M, int resident, const Device& device) {
  const int64_t slots = int64_t{device.sms} * resident;
  const int64_t tiles = (M + 63) / 64;
  int best = 1;
  int64_t least = tiles * heads * 8;
  for (int chunks = 1; chunks <= std::min<int64_t>(tiles, 64); ++chunks) {
    const int64_t each = (tiles + chunks - 1) / chunks;
    if (chunks > 1 && (tiles + each - 1) / each != chunks) continue;
    const int64_t waves = (static_cast<int64_t>(heads) * chunks + slots - 1) / slots;
    const int64_t cost = waves * (each + 4);
    if (cost < least) least = cost, best = chunks;
  }
  return best;
}

// Tiles of 64 rows of each of `chunks` chunks but the last, which may have fewer.
inline int chunk_tiles(int rows, int chunks, int unit_tiles) {
  const int tiles = (rows + 63) / 64, each = (tiles + chunks - 1) / chunks;
  return (each + unit_tiles - 1) / unit_tiles * unit_tiles;
}

// As tile_chunks, of chunks that start at a multiple of unit_tiles tiles, and none of them empty.
inline int unit_chunks(int heads, int rows, int unit_tiles, int resident, const Device& device) {
  const int tiles = (rows + 63) / 64;
  const int each = chunk_tiles(rows, tile_chunks(heads, rows, resident, device), unit_tiles);
  return (tiles + each - 1) / each;
}

// Blocks of threads that a multiprocessor holds; `even`: without weights.
constexpr int moments_resident(int dim, bool even) { return dim > 64 ? 1 : even ? 3 : 2; }

// Head dims up to DP = 64 or 128, key blocks of 16, 32 or 64.
template <int DP>
cudaError_t launch_moments(const Moments&, const Device&, cudaStream_t);

}  // namespace mra::cuda::sm90
