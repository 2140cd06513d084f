// What the moments' kernel has in shared memory, and the warps that say how keys weigh within their
// blocks.
#pragma once

#include "../centred_keys.cuh"
#include "../centred_logits.cuh"
#include "half_pairs.cuh"
#include "key_tiles.cuh"
#include "moments.h"
#include "warp_products.cuh"

namespace mra::cuda::sm90 {

// Of the keys within a block: alike, given, or made here of their logits with the mean query or
// with a sample of queries.
enum class Weights { even, given, centred, sampled };
constexpr bool makes(Weights weights) {
  return weights == Weights::centred || weights == Weights::sampled;
}
// Warps that weigh, a tile each in turns.
constexpr int weighers(Weights weights) {
  return makes(weights) ? 3 : weights == Weights::given ? 1 : 0;
}

// Tiles of 64 keys and values, in kBlocks blocks each.
template <typename T, int DP, int kPlaces, int kBlocks, Weights kWeights, bool kIsWhole>
struct MomentsTiles {
  static constexpr bool kWhole = kIsWhole;
  static constexpr int kStages = kPlaces, kPanels = DP / 64;
  static constexpr bool kWeighted = kWeights != Weights::even;
  static constexpr int kWeighers = weighers(kWeights);
  static constexpr int kBlocksAPanel = 16, kMeanRow = 72;  // values; no bank twice
  KeyTiles<DP, kStages, false, T> keys;
  // Means of keys and values, rounded, of 16 blocks of now, and of 16 of before.
  alignas(128) uint16_t mean[2][kPanels][2 * kBlocksAPanel][kMeanRow];
  // Weights of pairs of keys: rounded, what that lost, and times the share of their block's keys
  // that count.
  static constexpr int kKinds =
      kWeights == Weights::sampled ? 4 : 3;  // the fourth: room for logits
  uint32_t weights[kWeighted ? kStages : 1][kKinds][32];
  uint64_t weighed[kWeighted ? kStages : 1];
  // Of a whole head.
  alignas(16) float centre[kWhole && kWeighted ? DP : 4];
  int32_t query_count[kWhole ? kWholeQueryBlocks : 1], key_count[kWhole ? kWholeKeyBlocks : 1];

  // By all threads; `warps` multiply.
  __device__ void init(int warps) {
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(mean) / 16); i += blockDim.x) {
      reinterpret_cast<uint4*>(mean)[i] = uint4{};  // no NaN where there are no blocks
    }
    if (threadIdx.x == 0) {
      keys.init(warps);
      for (auto& barrier : weighed) barrier_init(&barrier, 1);
      barrier_init_done();
    }
    __syncthreads();
  }
};

// The mean query as rows of a sample, rounded (0) and what that lost (1): columns d to d + 7 of row
// g.
template <typename T>
__device__ __forceinline__ uint4 centre_row(const float* centre, int g, int d) {
  if (g >= kMeanRows) return uint4{};
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const SplitPair<T> pair(centre[d + 2 * i], centre[d + 2 * i + 1]);
    words[i] = g == 0 ? pair.high : pair.low;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// One of the warps that weigh: tile `own` of the chunk, and every kWeighers-th one from there.
template <typename T, int DP, int kBlocks, Weights kWeights, class Tiles>
struct KeyWeigher {
  static constexpr bool kMade = makes(kWeights), kSampled = kWeights == Weights::sampled;
  static constexpr int kPanels = DP / 64, kStages = Tiles::kStages;
  static constexpr int kTiles = kSampled ? kSampleRows / 8 : 1;  // of rows of the sample
  // Those rows, as right operands, and what is taken off the logits of this thread's columns.
  struct Sample {
    uint4 rows[kTiles][2 * kPanels];
    float less[kTiles][2];
  };
  const Moments& p;
  Tiles& s;
  const int head, first;  // first: tile of the head
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  __device__ __forceinline__ KeyWeigher(const Moments& p, Tiles& s, int head, int first)
      : p(p), s(s), head(head), first(first) {}

  __device__ __forceinline__ void run(int own, int tiles) const {
    constexpr int kWeighers = Tiles::kWeighers;
    float given[2];  // weights of keys lane and lane + 32 of the next tile, on their way
    Sample sample;
    if constexpr (kMade) {
      load_sample(sample);
    } else {
      look_up(given, own);
    }
#pragma unroll 1
    for (int tile = own; tile < tiles; tile += kWeighers) {
      const int stage = tile % kStages;
      barrier_wait(&s.keys.full[stage], tile / kStages & 1);
      const uint32_t valid[2] = {s.keys.valid[stage][0], s.keys.valid[stage][1]};
      float weight[2];
      if constexpr (kMade) {
        make_weights(weight, sample, tile, stage, valid);
      } else {
        weight[0] = given[0], weight[1] = given[1];
        look_up(given, tile + kWeighers);
      }
      place_weights(weight, stage, valid);
      barrier_arrive(&s.weighed[stage]);
    }
  }

  __device__ __forceinline__ int64_t weights_at() const {
    return static_cast<int64_t>(head) * p.nk << p.log2_block_k;
  }
  // Key of the head that this lane has as number i of a tile's.
  __device__ __forceinline__ int key_of(int tile, int i) const {
    return 64 * (first + tile) + 32 * i + lane;
  }
  __device__ __forceinline__ void look_up(float (&given)[2], int tile) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = key_of(tile, i);
      given[i] = j < p.M ? p.weights[weights_at() + j] : 0.f;
    }
  }

  __device__ __forceinline__ void load_sample(Sample& sample) const {
    if constexpr (Tiles::kWhole) {
      static_assert(kTiles == 1);
#pragma unroll
      for (int i = 0; i < 2 * kPanels; ++i) {
        sample.rows[0][i] = centre_row<T>(s.centre, g, 32 * i + 8 * t);
      }
      return;
    }
    const T* const rows =
        static_cast<const T*>(p.made.sample) + (static_cast<int64_t>(head) * kSampleRows + g) * p.D;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2 * kPanels; ++i) {
        const int d = 32 * i + 8 * t;
        sample.rows[n][i] = d < p.D ? load16(rows + 8 * n * p.D + d) : uint4{};
      }
    }
    if constexpr (kSampled) {
      static_assert(kSampleRows <= 32);
      const KeyWeights& made = p.made;
      const float lse = lane < kSampleRows
                            ? lse_of_row(made.parts, made.offsets, head, made.parts_chunks, lane)
                            : 0.f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sample.less[n][e] = __shfl_sync(kFullWarp, lse, 8 * n + 2 * t + e);
        }
      }
    }
  }

  // Weights of keys lane and lane + 32, by the products and sums of centred_weights.cu, and what
  // comes with them to memory.
  __device__ __forceinline__ void make_weights(float (&weight)[2], const Sample& sample, int tile,
                                               int stage, const uint32_t (&valid)[2]) const {
    // For now: log weights, and logits of the mean query if these are others.
    auto& logits = reinterpret_cast<float(&)[kSampled ? 2 : 1][64]>(s.weights[stage]);
    const float scale = p.made.scale * kLog2e;
    // Sixteens of keys whose products run beside each other.
    constexpr int kBeside = 4 / kPanels / kTiles;
#pragma unroll 1
    for (int first_row = 0; first_row < 64; first_row += 16 * kBeside) {
      float c[kBeside][kTiles][4] = {};
#pragma unroll
      for (int i = 0; i < 2 * kPanels; ++i) {
#pragma unroll
        for (int m = 0; m < kBeside; ++m) {
          const auto piece = [&](int half) {
            const int r = first_row + 16 * m + 8 * half + g, chunk = (i % 2 * 4 + t) ^ g;
            return *reinterpret_cast<const uint4*>(&s.keys.x[stage][0][i / 2][r][chunk * 8]);
          };
          const uint4 low = piece(0), high = piece(1);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            multiply_piece<T>(c[m][n], low, high, sample.rows[n][i], false);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kBeside; ++m) {
        const int row = first_row + 16 * m + g;
        const uint32_t bits = valid[row / 32] >> row % 32;
        const bool counts[2] = {(bits & 1) != 0, (bits >> 8 & 1) != 0};
        to_sample_logits(c[m], scale, counts);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float l = c[m][0][2 * half];
          if constexpr (kSampled) {
            if (t == 0) logits[1][row + 8 * half] = l;
            l = log_weight(c[m], sample.less, half);
          }
          if (t == 0) logits[0][row + 8 * half] = l;
        }
      }
    }
    __syncwarp();

    // A block of 64, two of 32, or two times two of 16 in the halves of the warp.
    constexpr int kGroups = kBlocks == 1 ? 1 : 2, kTurns = 2 / kGroups;
    constexpr int kLanes = kBlocks == 4 ? 16 : 32;
    using Logits = BlockLogits<kTurns, kLanes>;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const auto read = [&](const float(&from)[64]) {
        typename Logits::Values l;
#pragma unroll
        for (int i = 0; i < kTurns; ++i) l.x[i] = from[32 * (group + i) + lane];
        return Logits(l);
      };
      Logits x = read(logits[0]);
      const float bias = kSampled ? read(logits[kSampled]).bias() : x.bias();
      const float mass = x.finish();
      const int y = (first + tile) * kBlocks + group * (32 / kLanes) + lane / kLanes;
      if (lane % kLanes == 0 && y < p.nk) {
        const int64_t at = static_cast<int64_t>(head) * p.nk + y;
        p.made.mass[at] = mass;
        if (p.made.key_bias != nullptr) p.made.key_bias[at] = bias;
      }
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        weight[group + i] = x.w[i];
        const int j = key_of(tile, group + i);
        if (j < p.nk << p.log2_block_k) p.made.weights[weights_at() + j] = x.w[i];
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void place_weights(const float (&weight)[2], int stage,
                                                const uint32_t (&valid)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float next = __shfl_down_sync(kFullWarp, weight[i], 1);
      const int block = kBlocks == 4 ? 2 * i + lane / 16 : i;
      const float count = count_of_block<kBlocks>(block, valid) * (kBlocks / 64.f);
      if (lane % 2 != 0) continue;
      const SplitPair<T> pair(weight[i], next);
      auto& to = s.weights[stage];
      const int at = 16 * i + lane / 2;
      to[0][at] = pair.high;
      to[1][at] = pair.low;
      to[2][at] = Mma<T>::pack(weight[i] * count, next * count);
    }
  }
};

}  // namespace mra::cuda::sm90
