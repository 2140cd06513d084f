// Scores of pairs of blocks, L = scale * q_mean . k_mean, in float32, as keys.
//
// A block of threads makes tiles of query blocks against key blocks. Both come through a ring of
// two stages of kDepth dimensions by cp.async, all of a small head at once. Every sum runs over the
// dimensions in order, so that a score has the same bits whatever the tile.
#pragma once

#include "plan_select.cuh"

namespace mra::cuda {

constexpr int kDepth = 32;
// 4 times an odd number: eight lanes that read 16 bytes of eight rows hit all 32 banks.
constexpr int kDepthPitch = kDepth + 4;

// 16 bytes from global to shared memory, or zeros.
__device__ __forceinline__ void copy_async16(float* to, const float* from, bool inside) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits for all groups but the last `kPending`.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// kRowWarps x kColWarps warps; a lane has kRowTile rows, and kColTile columns in steps of 32.
template <int kRowTile, int kColTile, int kRowWarps, int kColWarps>
struct ScoreTile {
  static constexpr int kRows = kRowTile * kRowWarps, kCols = 32 * kColTile * kColWarps;
  static constexpr int kWarps = kRowWarps * kColWarps, kThreads = 32 * kWarps;
  static constexpr int kStageWords = (kRows + kCols) * kDepthPitch;
  static constexpr int kRingWords = 2 * kStageWords;

  // acc[i][j] += q[i] . k[32 j] over one stage.
  static __device__ __forceinline__ void add_stage(const float* q, const float* k,
                                                   float (&acc)[kRowTile][kColTile]) {
#pragma unroll(kRowTile* kColTile > 16 ? 2 : 4)
    for (int d = 0; d < kDepth; d += 4) {
      float4 key[kColTile];
#pragma unroll
      for (int j = 0; j < kColTile; ++j) {
        key[j] = *reinterpret_cast<const float4*>(k + 32 * j * kDepthPitch + d);
      }
#pragma unroll
      for (int i = 0; i < kRowTile; ++i) {
        const float4 query = *reinterpret_cast<const float4*>(q + i * kDepthPitch + d);
#pragma unroll
        for (int j = 0; j < kColTile; ++j) {
          acc[i][j] = fmaf(query.x, key[j].x, acc[i][j]);
          acc[i][j] = fmaf(query.y, key[j].y, acc[i][j]);
          acc[i][j] = fmaf(query.z, key[j].z, acc[i][j]);
          acc[i][j] = fmaf(query.w, key[j].w, acc[i][j]);
        }
      }
    }
  }

  // Writes the keys of query blocks x0 .. x0 + kRows against key blocks 0 .. written (returned; at
  // most `width`) to keys[r * pitch + y]; pairs that do not exist get kAbsent. What the rest of
  // those rows would hold does not exist either. Rows from nq on are left alone.
  // Begins with copies into the ring [kRingWords], ends without a barrier after the last write.
  static __device__ int write(const PlanParams& p, int b, int h, int x0, float* ring,
                              uint32_t* keys, int64_t pitch, int width) {
    const auto store = [&](int r, int y, uint32_t key) { keys[r * pitch + y] = key; };
    return each(p, b, h, x0, ring, width, store, [](int) {});
  }

  // The same with store(r, y, key) for every key, and done(y0) by all threads once this one has
  // stored its keys of columns y0 .. y0 + kCols. A barrier lies between done and the next store.
  template <class Store, class Done>
  static __device__ __forceinline__ int each(const PlanParams& p, int b, int h, int x0, float* ring,
                                             int width, const Store& store, const Done& done) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp % kRowWarps * kRowTile;                // first of this thread's rows
    const int col = warp / kRowWarps * (32 * kColTile) + lane;  // first of its columns
    const float* q_mean = p.q_mean + ((int64_t{b} * p.H + h) * p.nq + x0) * p.D;
    const int64_t first_key = (int64_t{b} * p.Hk + h / (p.H / p.Hk)) * p.nk;
    const float* k_mean = p.k_mean + first_key * p.D;
    const float* key_bias = p.key_bias == nullptr ? nullptr : p.key_bias + first_key;
    const int32_t* k_count = p.k_count + int64_t{b} * p.nk;

    const int rows = min(kRows, p.nq - x0);
    const int cols = visible_blocks(p, x0 + rows - 1);  // the last row sees most
    const int written = min(width, (cols + 31) / 32 * 32);
    const int depths = (p.D + kDepth - 1) / kDepth;
    const int stages = (cols + kCols - 1) / kCols * depths;

    const auto load = [&](int stage) {
      float* to = ring + stage % 2 * kStageWords;
      const int y0 = stage / depths * kCols, d0 = stage % depths * kDepth;
      constexpr int kCopies = (kRows + kCols) * (kDepth / 4);
#pragma unroll
      for (int i = 0; i < (kCopies + kThreads - 1) / kThreads; ++i) {
        const int id = static_cast<int>(threadIdx.x) + i * kThreads;
        if (kCopies % kThreads != 0 && id >= kCopies) break;
        const int r = id / (kDepth / 4), d = id % (kDepth / 4) * 4;
        const bool query = r < kRows;
        const int from_row = query ? r : y0 + r - kRows;
        const bool inside = from_row < (query ? rows : cols) && d0 + d < p.D;
        const float* from = query ? q_mean : k_mean;
        if (inside) from += int64_t{from_row} * p.D + d0 + d;
        copy_async16(to + r * kDepthPitch + d, from, inside);
      }
      copy_commit();
    };
    load(0);
    if (stages > 1) load(1);

    int seen[kRowTile];  // key blocks that exist for each of this thread's rows end here
#pragma unroll
    for (int i = 0; i < kRowTile; ++i) {
      const int x = x0 + row + i;
      const bool exists = row + i < rows && p.q_count[int64_t{b} * p.nq + x] > 0;
      seen[i] = exists ? visible_blocks(p, x) : 0;
    }

    float acc[kRowTile][kColTile];
    bool has_key[kColTile];
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      const int y0 = stage / depths * kCols, depth = stage % depths;
      if (depth == 0) {
#pragma unroll
        for (int j = 0; j < kColTile; ++j) {
          const int y = y0 + col + 32 * j;
          has_key[j] = y < cols && k_count[y] > 0;
#pragma unroll
          for (int i = 0; i < kRowTile; ++i) acc[i][j] = 0.f;
        }
      }
      if (stage + 1 < stages) {
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      __syncthreads();
      const float* q = ring + stage % 2 * kStageWords;
      // Not where all columns of the warp are in the future, or its rows beyond the end.
      if (y0 + col - lane < cols && row < rows) {
        add_stage(q + row * kDepthPitch, q + (kRows + col) * kDepthPitch, acc);
      }
      if (stage + 2 < stages) {
        __syncthreads();  // no warp reads this stage any more
        load(stage + 2);
      }
      if (depth < depths - 1) continue;
      float bias[kColTile];
#pragma unroll
      for (int j = 0; j < kColTile; ++j) {
        bias[j] = key_bias != nullptr && has_key[j] ? key_bias[y0 + col + 32 * j] : 0.f;
      }
#pragma unroll
      for (int j = 0; j < kColTile; ++j) {
        const int y = y0 + col + 32 * j;
        if (y >= written) continue;
#pragma unroll
        for (int i = 0; i < kRowTile; ++i) {
          if (row + i >= rows) continue;
          const bool exists = has_key[j] && y < seen[i];
          store(row + i, y, exists ? key_of(fmaf(p.scale, acc[i][j], bias[j])) : kAbsent);
        }
      }
      done(y0);
    }
    return written;
  }
};

}  // namespace mra::cuda
