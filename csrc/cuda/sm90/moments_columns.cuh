// What the warps of the moments' kernel that multiply do with a tile before: means of its blocks,
// and the left side of the products.
#pragma once

#include "head_half.cuh"
#include "moments_weights.cuh"

namespace mra::cuda::sm90 {

// *to = x where it `stores`. kPredicate: not by a branch, which the compiler makes of some such
// lines and which costs a warp that multiplies more than the store does. Takes registers.
template <bool kPredicate>
__device__ __forceinline__ void store_if(bool stores, float* to, float x) {
  if constexpr (!kPredicate) {
    if (stores) *to = x;
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.f32 [%1], %2;\n}" ::"r"(
                     static_cast<int>(stores)),
                 "l"(to), "f"(x)
                 : "memory");
  }
}
// kShared: of this address space.
template <bool kPredicate, bool kShared = false>
__device__ __forceinline__ void store_if(bool stores, uint16_t* to, uint16_t x) {
  if constexpr (!kPredicate) {
    if (stores) *to = x;
  } else if constexpr (kShared) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.shared.u16 [%1], %2;\n}" ::"r"(
                     static_cast<int>(stores)),
                 "r"(smem_address(to)), "h"(x)
                 : "memory");
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.u16 [%1], %2;\n}" ::"r"(
                     static_cast<int>(stores)),
                 "l"(to), "h"(x)
                 : "memory");
  }
}

// x / count, rounded as a division is but for overflow, without its branches.
__device__ __forceinline__ float divided(float x, float count) {
  const float inverse = __fdividef(1.f, count), quotient = x * inverse;
  return fmaf(fmaf(-quotient, count, x), inverse, quotient);
}

// A warp has 16 columns of keys and of values.
template <typename T, int DP, int kBlocks, Weights kWeights, class Tiles>
struct TileColumns {
  static constexpr bool kWeighted = kWeights != Weights::even, kMade = makes(kWeights);
  static constexpr int kPanels = DP / 64;
  // Plain means of keys come out of the product that makes the weighted ones, which has columns
  // left for them.
  static constexpr bool kBoth = kMade && kBlocks < 4;
  // Stores by predicates, and their conditions in one: measured, and where there are registers.
  static constexpr bool kPredicates = kBlocks == 1 && (DP == 64 || !kMade);
  static constexpr bool kFlat = kPredicates || DP == 64;
  using A = uint32_t[4][4];      // columns as left operands, over the tile's keys
  using Right = uint32_t[4][2];  // right operands
  static constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00 : 0x3f803f80;
  const Moments& p;
  Tiles& s;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32 % 4;
  const int group;
  const PanelLane<> panel{};
  // This thread's block of the tile: weighted means of it, or (kBoth) plain ones.
  const int block = t % kBlocks;
  const bool weighted = t < kBlocks;
  int y, blocks[2];  // that block; those of the head, if it stores column g, g + 8
  int64_t at;        // where it does
  int* key_count;
  // Of the sums of a block: weights and what rounding them has lost, or ones and zeros, in columns
  // 2 block and 2 block + 1, which thread t = block of four has; kBoth: and ones in those of thread
  // kBlocks + block.
  Right right;

  __device__ __forceinline__ TileColumns(const Moments& p, Tiles& s, int head, int first, int h,
                                         int group)
      : p(p), s(s), group(group), y(first * kBlocks + block) {
    const int d = 64 * group + 16 * warp + g;
    at = (static_cast<int64_t>(head) * p.nk + y) * p.D + d;
    const bool stores = !kFlat || (weighted ? p.k_mean : p.made.k_plain) != nullptr;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      blocks[half] = stores && t < (kBoth ? 2 : 1) * kBlocks && d + 8 * half < p.D ? p.nk : 0;
      if constexpr (kPredicates) asm volatile("" : "+r"(blocks[half]));  // or made anew at each use
    }
    const bool counts = h == 0 && threadIdx.x < kBlocks && p.key_count != nullptr;
    key_count = counts ? p.key_count + static_cast<int64_t>(head / p.Hk) * p.nk : nullptr;
    if constexpr (!kWeighted) load_ones(right);
  }
  // To the next tile.
  __device__ __forceinline__ void advance() {
    y += kBlocks;
    at += kBlocks * p.D;
  }

  static constexpr int block_of(int k) { return k * kBlocks / 4; }

  __device__ __forceinline__ void load_ones(Right& ones) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      ones[k][0] = ones[k][1] = g == 2 * block_of(k) ? kOnes : 0u;
    }
  }
  __device__ __forceinline__ void load_weights(int stage) {
    const uint32_t* const from = &s.weights[stage][g % 2][t];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = from[8 * k + 4 * i];
        const uint32_t other = kBoth && g == 2 * (kBlocks + block_of(k)) ? kOnes : 0u;
        right[k][i] = g / 2 == block_of(k) ? pair : other;
      }
    }
  }
  __device__ __forceinline__ void load(A& a, int stage, int which) const {
    const uint32_t base = smem_address(s.keys.x[stage][which][group]) + panel.keys(warp);
#pragma unroll
    for (int k = 0; k < 4; ++k) ldmatrix_x4<true>(a[k], base + 16 * k * 128);
  }

  // Zeros where a key does not count, whatever there is. By all who multiply.
  __device__ __forceinline__ void clear(int stage) const {
#pragma unroll 1
    for (int row = lane / 4; row < 64; row += 8) {
      if (s.keys.valid[stage][row / 32] >> row % 32 & 1) continue;
      const int chunk = (2 * warp + t % 2) ^ row % 8;
      *reinterpret_cast<uint4*>(&s.keys.x[stage][t / 2][group][row][chunk * 8]) = uint4{};
    }
    fence_for_copies();  // products read shared memory as copies do
    consumer_sync<DP>();
  }

  // Sums of columns g and g + 8 over the keys of block t.
  __device__ __forceinline__ void sum(float (&to)[2], const A& a, const Right& right) const {
    float c[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) Mma<T>::product(c, as_left(a[k]), right[k][0], right[k][1]);
    to[0] = c[0] + c[1];
    to[1] = c[2] + c[3];
  }
  static __device__ __forceinline__ typename Mma<T>::A as_left(const uint32_t (&x)[4]) {
    typename Mma<T>::A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.r[i] = x[i];
    return a;
  }
  // Means of this thread's block to memory and, but for plain ones, rounded to their panel;
  // returned as rounded.
  __device__ __forceinline__ uint32_t keep(int which, const float (&mean)[2]) const {
    const uint32_t pair = Mma<T>::pack(mean[0], mean[1]);
    const auto low = static_cast<uint16_t>(pair), high = static_cast<uint16_t>(pair >> 16);
    uint16_t* const row = &s.mean[which][group][y % (2 * Tiles::kBlocksAPanel)][16 * warp + g];
    store_if<kPredicates, true>(weighted, row, low);
    store_if<kPredicates, true>(weighted, row + 8, high);
    float* to = which == 0 ? p.k_mean : p.v_mean;
    if constexpr (kBoth) {
      if (!weighted) to = which == 0 ? p.made.k_plain : nullptr;
    }
    auto* const rounded = static_cast<uint16_t*>(which == 0 ? p.k_rounded : p.v_rounded);
    // kFlat: those that have nowhere to store have no blocks.
    const bool stores = kFlat ? which == 0 || !kBoth || weighted : to != nullptr;
    const bool rounds = rounded != nullptr && weighted;
    if (kFlat || stores) {
      store_if<kPredicates>(stores && y < blocks[0], to + at, mean[0]);
      store_if<kPredicates>(stores && y < blocks[1], to + at + 8, mean[1]);
    }
    if (kFlat || rounds) {
      store_if<kPredicates>(rounds && y < blocks[0], rounded + at, low);
      store_if<kPredicates>(rounds && y < blocks[1], rounded + at + 8, high);
    }
    return pair;
  }
  static __device__ __forceinline__ void divide(float (&sums)[2], float count) {
#pragma unroll
    for (float& x : sums) x = divided(x, count);
  }

  // Keys -> their deviations from the means of their blocks, times their weights.
  __device__ __forceinline__ void deviate(A& a, uint32_t kept, int stage,
                                          const uint32_t (&valid)[2]) const {
    uint32_t mean[kBlocks][2];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const uint32_t pair = __shfl_sync(kFullWarp, kept, lane / 4 * 4 + block);
      mean[block][0] = __byte_perm(pair, 0, 0x1010);
      mean[block][1] = __byte_perm(pair, 0, 0x3232);
    }
    [[maybe_unused]] const uint32_t* const weights = kWeighted ? &s.weights[stage][2][t] : nullptr;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        [[maybe_unused]] const uint32_t weight = kWeighted ? weights[8 * k + 4 * i] : 0u;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t& x = a[k][2 * i + half];
          x = less<T>(x, mean[block_of(k)][half]);
          if constexpr (kWeighted) x = times<T>(x, weight);
        }
      }
    }
    if constexpr (!kWeighted) {
      if ((valid[0] & valid[1]) == kFullWarp) return;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[k][i] &= mask_pair(valid[k / 2], 16 * k % 32 + i / 2 * 8 + 2 * t);
        }
      }
    }
  }

  // The left side of a tile, whose means are kept.
  __device__ __forceinline__ void load_deviations(A& a, int stage, const uint32_t (&valid)[2]) {
    load(a, stage, 0);
    if constexpr (kWeighted) load_weights(stage);
    float mean[2];
    sum(mean, a, right);
    const int own = count_of_block<kBlocks>(block, valid);
    const auto count = static_cast<float>(max(own, 1));
    if (kMade && !kBoth && p.made.k_plain != nullptr) {
      Right ones;
      load_ones(ones);
      float of_all[2];
      sum(of_all, a, ones);
      divide(of_all, count);
      if (y < blocks[0]) p.made.k_plain[at] = of_all[0];
      if (y < blocks[1]) p.made.k_plain[at + 8] = of_all[1];
    }
    if constexpr (kBoth && kPredicates) {
      divide(mean, weighted ? 1.f : count);
    } else if (kBoth ? !weighted : !kWeighted) {
      divide(mean, count);
    }
    deviate(a, keep(0, mean), stage, valid);
    if (key_count != nullptr && y < blocks[0]) key_count[y] = own;
    if constexpr (Tiles::kWhole) {
      if (threadIdx.x < kBlocks && y < p.nk) s.key_count[y] = own;
    }
  }
  __device__ __forceinline__ void keep_values(int stage, const uint32_t (&valid)[2]) const {
    A a;
    load(a, stage, 1);
    float mean[2];
    sum(mean, a, right);
    if constexpr (!kWeighted) {
      divide(mean, static_cast<float>(max(count_of_block<kBlocks>(block, valid), 1)));
    }
    keep(1, mean);
  }

  // c += rest times the means of its 16 blocks, of which `last` is one.
  template <int kTiles>
  __device__ __forceinline__ void take_off(float (&c)[kTiles][4], const float (&rest)[2][4],
                                           int which, int last) const {
    const typename Mma<T>::A a = Mma<T>::from_accumulator(rest, 0);
    constexpr int kRow = 2 * Tiles::kMeanRow;
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      const uint32_t base =
          smem_address(s.mean[which][i][last / 16 % 2 * 16]) + lane % 16 * kRow + lane / 16 * 16;
      typename Mma<T>::B b[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) ldmatrix_x4<true>(b[n].r, base + 32 * n);
      Mma<T>::mma(c, 8 * i, a, b, false);
    }
  }
};

}  // namespace mra::cuda::sm90
