// Scores of pairs of blocks, L = scale * q_mean . k_mean, in float32, as keys.
//
// One block of kScoreThreads threads makes kRows query blocks against tiles of 128 key blocks (all
// warps share out the rows) or 256 (half of them each half). The pooled queries stay in shared
// memory; the pooled keys come through a ring of two stages of kDepth dimensions by cp.async.
#pragma once

#include "plan_select.cuh"

namespace mra::cuda {

constexpr int kScoreThreads = 256;
constexpr int kScoreWarps = kScoreThreads / 32;
constexpr int kDepth = 16;
// Blocks of threads a multiprocessor that the registers of a kernel leave room for.
template <int kRows, int kTileCols>
inline constexpr int kScoreBlocks = kTileCols == 128 || kRows < 32 ? 2 : 1;
// 4 times an odd number: eight lanes that read 16 bytes of eight rows hit all 32 banks.
constexpr int kKeyPitch = 20;

// Key blocks a tile: more where there are more.
__host__ __device__ constexpr int tile_cols(int nk) { return nk <= 128 ? 128 : 256; }

// Floats of shared memory for the pooled queries and the ring.
__host__ __device__ constexpr int query_pitch(int D) { return (D + kDepth - 1) / kDepth * kDepth; }
__host__ __device__ constexpr int score_floats(int rows, int D, int tile_cols) {
  return rows * query_pitch(D) + 2 * tile_cols * kKeyPitch;
}

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
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group 0;\n" ::: "memory");
}

// acc[i][j] += q[row + i] . k[col + 32 j] over one stage.
template <int kRowTile, int kColTile>
__device__ __forceinline__ void score_stage(const float* q, int q_pitch, const float* k,
                                            float (&acc)[kRowTile][4]) {
#pragma unroll
  for (int d = 0; d < kDepth; d += 4) {
    float4 key[kColTile];
#pragma unroll
    for (int j = 0; j < kColTile; ++j) {
      key[j] = *reinterpret_cast<const float4*>(k + 32 * j * kKeyPitch + d);
    }
#pragma unroll
    for (int i = 0; i < kRowTile; ++i) {
      const float4 query = *reinterpret_cast<const float4*>(q + i * q_pitch + d);
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
// Ends without a barrier after the last write.
template <int kRows, int kTileCols>
__device__ int score_rows(const PlanParams& p, int b, int h, int x0, float* smem, uint32_t* keys,
                          int64_t pitch, int width) {
  constexpr int kRowWarps = 8 / (kTileCols / 128), kRowTile = kRows / kRowWarps;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int row = warp % kRowWarps * kRowTile;    // first of this thread's rows
  const int col = warp / kRowWarps * 128 + lane;  // first of its columns, in steps of 32
  const int q_pitch = query_pitch(p.D);
  float* q_smem = smem;                    // [kRows][q_pitch]
  float* k_smem = smem + kRows * q_pitch;  // [2][kTileCols][kKeyPitch]
  const float* q_mean = p.q_mean + ((int64_t{b} * p.H + h) * p.nq + x0) * p.D;
  const float* k_mean = p.k_mean + (int64_t{b} * p.Hk + h / (p.H / p.Hk)) * p.nk * p.D;

  // The last row sees most.
  const int cols = visible_blocks(p, min(x0 + kRows, p.nq) - 1);
  const int written = min(width, (cols + 31) / 32 * 32);
  const int depths = q_pitch / kDepth;
  const int stages = (cols + kTileCols - 1) / kTileCols * depths;

  const auto load_keys = [&](int stage) {
    float* to = k_smem + stage % 2 * kTileCols * kKeyPitch;
    const int y0 = stage / depths * kTileCols, d0 = stage % depths * kDepth;
#pragma unroll
    for (int i = 0; i < kTileCols * kDepth / 4 / kScoreThreads; ++i) {
      const int id = tid + i * kScoreThreads;
      const int c = id / 4, d = id % 4 * 4;
      const bool inside = y0 + c < cols && d0 + d < p.D;
      const float* from = inside ? k_mean + int64_t{y0 + c} * p.D + d0 + d : k_mean;
      copy_async16(to + c * kKeyPitch + d, from, inside);
    }
    copy_commit();
  };

  for (int id = tid; id < kRows * q_pitch / 4; id += kScoreThreads) {
    const int r = id / (q_pitch / 4), d = id % (q_pitch / 4) * 4;
    const bool inside = x0 + r < p.nq && d < p.D;
    copy_async16(q_smem + r * q_pitch + d, inside ? q_mean + int64_t{r} * p.D + d : q_mean, inside);
  }
  load_keys(0);  // committed together with the queries

  int seen[kRowTile];  // key blocks that exist for each of this thread's rows end here
#pragma unroll
  for (int i = 0; i < kRowTile; ++i) {
    const int x = x0 + row + i;
    const bool exists = x < p.nq && p.q_count[int64_t{b} * p.nq + x] > 0;
    seen[i] = exists ? visible_blocks(p, x) : 0;
  }

  float acc[kRowTile][4];
  for (int stage = 0; stage < stages; ++stage) {
    const int y0 = stage / depths * kTileCols, depth = stage % depths;
    copy_wait();
    __syncthreads();  // this stage is here, and no warp reads the other one any more
    if (stage + 1 < stages) load_keys(stage + 1);
    if (depth == 0) {
#pragma unroll
      for (int i = 0; i < kRowTile; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = 0.f;
      }
    }
    const float* q = q_smem + row * q_pitch + depth * kDepth;
    const float* k = k_smem + stage % 2 * kTileCols * kKeyPitch + col * kKeyPitch;
    const int left = cols - y0 - (col - lane);  // columns that this warp has in the tile
    if (left > 64) {
      score_stage<kRowTile, 4>(q, q_pitch, k, acc);
    } else if (left > 32) {
      score_stage<kRowTile, 2>(q, q_pitch, k, acc);
    } else if (left > 0) {
      score_stage<kRowTile, 1>(q, q_pitch, k, acc);
    }
    if (depth < depths - 1) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int y = y0 + col + 32 * j;
      if (y >= written) continue;
      const bool has_key = y < cols && p.k_count[int64_t{b} * p.nk + y] > 0;
#pragma unroll
      for (int i = 0; i < kRowTile; ++i) {
        if (x0 + row + i >= p.nq) continue;
        const bool exists = has_key && y < seen[i];
        keys[(row + i) * pitch + y] = exists ? key_of(p.scale * acc[i][j]) : kAbsent;
      }
    }
  }
  return written;
}

}  // namespace mra::cuda
