// How the keys of a tile weigh within their blocks, from their logits with the mean query: the same
// products and sums as of centred_weights.cu, of keys that have come for the moments anyway.
#pragma once

#include "../centred_keys.cuh"
#include "../centred_logits.cuh"
#include "key_tiles.cuh"
#include "moments.h"

namespace mra::cuda::sm90 {

// By one warp: the weights of every tile to its place, to p.made, and what comes with them.
template <int kBlocks, class Tiles>
__device__ __forceinline__ void weigh_tiles(const Moments& p, Tiles& s, int head, int first,
                                            int tiles) {
  using T = typename Tiles::T;
  constexpr int kPieces = 2 * Tiles::kPanels;  // of 64 bytes
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint4 mean[kPieces];  // rounded to T in row 0, what that lost in row 1
  const T* const sample = static_cast<const T*>(p.made.sample) +
                          (static_cast<int64_t>(head) * kSampleRows + kSampledQueries + g) * p.D;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int d = 32 * i + 8 * t;
    mean[i] = d < p.D ? load16(sample + d) : uint4{};
  }
  const float scale = p.made.scale * kLog2e;
  float* const weights = p.made.weights + (static_cast<int64_t>(head) * p.nk << p.log2_block_k);
  const int listed = p.nk << p.log2_block_k;

#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % Tiles::kStages;
    barrier_wait(&s.full[stage], tile / Tiles::kStages & 1);
#pragma unroll(4 / Tiles::kPanels)
    for (int row = g; row < 64; row += 16) {
      float c[1][4] = {};
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const auto piece = [&](int r) {
          const int chunk = i % 2 * 4 + t ^ r % 8;
          return *reinterpret_cast<const uint4*>(&s.x[stage][0][i / 2][r][chunk * 8]);
        };
        multiply_piece<T>(c[0], piece(row), piece(row + 8), mean[i], false);
      }
      const auto counts = [&](int r) { return (s.valid[stage][r / 32] >> r % 32 & 1) != 0; };
      const bool valid[2] = {counts(row), counts(row + 8)};
      to_logits(c, scale, valid);
      if (t == 0) {
        s.weight[stage][row] = c[0][0];
        s.weight[stage][row + 8] = c[0][2];
      }
    }
    __syncwarp();

    // A block of 64, two of 32, or two times two of 16 in the halves of the warp.
    constexpr int kGroups = kBlocks == 1 ? 1 : 2, kTurns = 2 / kGroups;
    constexpr int kLanes = kBlocks == 4 ? 16 : 32;
    using Logits = BlockLogits<kTurns, kLanes>;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      typename Logits::Values l;
      const int key = 32 * kTurns * group + lane;
#pragma unroll
      for (int i = 0; i < kTurns; ++i) l.x[i] = s.weight[stage][key + 32 * i];
      Logits x(l);
      const float bias = p.made.key_bias == nullptr ? 0.f : x.bias(), mass = x.finish();
      const int y = (first + tile) * kBlocks + group * (32 / kLanes) + lane / kLanes;
      if (lane % kLanes == 0 && y < p.nk) {
        const int64_t at = static_cast<int64_t>(head) * p.nk + y;
        p.made.mass[at] = mass;
        if (p.made.key_bias != nullptr) p.made.key_bias[at] = bias;
      }
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        s.weight[stage][key + 32 * i] = x.w[i];
        const int j = 64 * (first + tile) + key + 32 * i;
        if (j < listed) weights[j] = x.w[i];
      }
    }
    barrier_arrive(&s.weighed[stage]);
  }
}

}  // namespace mra::cuda::sm90
