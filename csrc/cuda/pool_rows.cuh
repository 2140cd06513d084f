// Block means of a window of rows, by one warp: the body of the stage pool.
#pragma once

#include "block_sum.cuh"
#include "pool.h"

namespace mra::cuda {

constexpr int kPoolWindow = 32;

// Rows of a window: of one block, or of as many neighbouring ones as have kPoolWindow rows; blocks
// of fewer rows than are read at once stay alone.
template <int kLanes>
__host__ __device__ constexpr int pool_window_rows(int log2_block) {
  const int block = 1 << log2_block;
  return block >= 32 / kLanes && block < kPoolWindow ? kPoolWindow : block;
}

// Means, and the counts of valid rows to counts_to [n] unless that is null, of the blocks in the
// `window` rows from `first` on of head h of batch b, which is `head` of all.
template <typename T, int kLanes, bool kWeighted>
__device__ __forceinline__ void pool_rows(const PoolTensor& t, int D, int head, int b, int h,
                                          int64_t first, int window, int32_t* counts_to) {
  constexpr int kRows = 32 / kLanes;  // read at once
  const int lane = threadIdx.x % 32;
  const int rows = static_cast<int>(min(int64_t{window}, t.L - first));

  // Bit g: whether row 32 g + lane counts.
  uint32_t counts = (1u << (rows - lane + 31) / 32) - 1;
  if (t.mask != nullptr) {
    const bool* const mask = t.mask + b * t.L + first + lane;
#pragma unroll
    for (int g = 0; g < kBlockWords; ++g) {
      if (counts >> g & 1 && !mask[32 * g]) counts ^= 1u << g;
    }
  }

  const int y0 = static_cast<int>(first >> t.log2_block);
  const int blocks = t.n - y0;  // from here on
  const int64_t mean_at = (int64_t{head} * t.n + y0) * D;
  const T* const x =
      static_cast<const T*>(t.x) + b * t.stride.b + h * t.stride.h + first * t.stride.l;
  const float* const weights =
      kWeighted ? t.weights + ((int64_t{head} * t.n + y0) << t.log2_block) : nullptr;
  const int chunks = D / kVec<T>;
  for (int c = 0; c < chunks; c += kLanes) {
    const int chunk = c + lane % kLanes;
    const T* next = x + lane / kLanes * t.stride.l + chunk * kVec<T>;
    // Where this lane's values go; negative: nowhere.
    const int column = chunk < chunks && lane < kLanes * kVec<T>
                           ? chunk * kVec<T> + first_kept<kVec<T>, kLanes>()
                           : -1;
    float sum[kVec<T>] = {}, before[kVec<T>] = {};  // of 32 rows, of those of the block before
    int count = 0;
    const auto finish = [&](int y) {
      constexpr int kKept = kept<kVec<T>, kLanes>;
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) sum[e] += before[e];
      scatter_sums<kLanes>(sum);
      if constexpr (!kWeighted) {
#pragma unroll
        for (int e = 0; e < kKept; ++e) sum[e] /= static_cast<float>(max(count, 1));
      }
      if (y < blocks) {
        if (column >= 0) {
          const int64_t at = mean_at + y * D + column;
          store_values<kKept>(t.mean + at, sum);
          if (t.rounded != nullptr) store_values<kKept>(static_cast<T*>(t.rounded) + at, sum);
        }
        if (c == 0 && lane == 0 && counts_to != nullptr) counts_to[y0 + y] = count;
      }
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) sum[e] = before[e] = 0.f;
      count = 0;
    };
#pragma unroll 1
    for (int g = 0; 32 * g < rows; ++g, next += 32 * t.stride.l) {
      const uint32_t live = __ballot_sync(kFullWarp, counts >> g & 1);
      const bool halves = kRows < 32 && t.log2_block == 4;
      count += __popc(halves ? live & 0xffff : live);
      add_rows<T, kLanes>(
          next, kRows * t.stride.l, chunk < chunks ? live : 0,
          [&](int r) {
            if constexpr (kWeighted) return 32 * g + r < rows ? weights[32 * g + r] : 0.f;
            return 1.f;
          },
          [&] {
            if (!halves) return;
            finish(2 * g);
            count = __popc(live >> 16);
          },
          sum);
      // The last row of these 32 that is in the window tells which block it is.
      const int last = min(32 * g + 31, window - 1), y = last >> t.log2_block;
      if (last + 1 == (y + 1) << t.log2_block || last + 1 >= rows) {
        finish(y);
        continue;
      }
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) {
        before[e] += sum[e];
        sum[e] = 0.f;
      }
    }
  }
}

}  // namespace mra::cuda
