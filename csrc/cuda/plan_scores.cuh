// Scores of pairs of blocks, L = scale * q_mean . k_mean, in float32, as keys.
//
// A block of threads makes tiles of query blocks against key blocks. Both come through a ring of
// stages of kDepth dimensions by cp.async, two ahead, all of a small head at once. The same pair
// has the same bits whatever the tile: ScoreTile multiplies on the tensor cores, three TF32
// products whose stages are added up as floats; ShortScoreTile, for up to 32 key blocks, sums
// dimension by dimension, as short heads do for themselves (sm90/head_plan.cuh).
#pragma once

#include "plan_select.cuh"
#include "sm80/async_copy.cuh"
#include "sm80/mma.cuh"

namespace mra::cuda {

constexpr int kDepth = 32;

// Until the stage that was asked for before the last one, or, unless there are `more`, the last one
// is there, by all threads.
__device__ __forceinline__ void wait_for_stage(bool more) {
  if (more) {
    wait_for_copies<1>();
  } else {
    wait_for_copies<0>();
  }
  __syncthreads();
}

// The means and what else belongs to the scores of query blocks x0 .. x0 + rows of a head.
struct ScoreInputs {
  const float *q_mean, *k_mean, *key_bias;
  const int32_t *q_count, *k_count;
  int rows, cols;  // query blocks, and key blocks that the last of them, which sees most, sees

  __device__ __forceinline__ ScoreInputs(const PlanParams& p, int b, int h, int x0, int most_rows) {
    const int64_t first_key = (int64_t{b} * p.Hk + h / (p.H / p.Hk)) * p.nk;
    q_mean = p.q_mean + ((int64_t{b} * p.H + h) * p.nq + x0) * p.D;
    k_mean = p.k_mean + first_key * p.D;
    key_bias = p.key_bias == nullptr ? nullptr : p.key_bias + first_key;
    q_count = p.q_count + int64_t{b} * p.nq + x0;
    k_count = p.k_count + int64_t{b} * p.nk;
    rows = min(most_rows, p.nq - x0);
    cols = visible_blocks(p, x0 + rows - 1);
  }
  __device__ __forceinline__ bool has_key(int y) const { return y < cols && k_count[y] > 0; }
  __device__ __forceinline__ float bias(int y) const {
    return key_bias != nullptr && y < cols ? key_bias[y] : 0.f;
  }
  // Where the key blocks end that exist for query block x0 + r.
  __device__ __forceinline__ int seen(const PlanParams& p, int x0, int r) const {
    return r < rows && q_count[r] > 0 ? visible_blocks(p, x0 + r) : 0;
  }
};

// kRowWarps x kColWarps warps, each of 16 kRowTiles rows and 8 kColTiles columns. Of the rows only
// the first kHeldRows exist. A ring of three stages spares a barrier a stage.
template <int kRowTiles, int kColTiles, int kRowWarps, int kColWarps,
          int kHeldRows = 16 * kRowTiles* kRowWarps, int kStages = 2>
struct ScoreTile {
  static constexpr int kRows = kHeldRows, kCols = 8 * kColTiles * kColWarps;
  static constexpr int kWarps = kRowWarps * kColWarps, kThreads = 32 * kWarps;
  static constexpr int kRingRows = 16 * kRowTiles * kRowWarps;
  static constexpr int kStageWords = (kRingRows + kCols) * kDepth;
  static constexpr int kRingWords = kStages * kStageWords;

  // Where 16 bytes of a row lie in a stage: eight rows' hit all 32 banks.
  static __device__ __forceinline__ int chunk_at(int row, int chunk) {
    return (chunk ^ row % 8) * 4;
  }

  // What x leaves, as an operand of TF32, of which the tensor cores ignore the low 13 bits.
  static __device__ __forceinline__ uint32_t low_part(uint32_t x) {
    return __float_as_uint(__uint_as_float(x) - __uint_as_float(x & 0xffffe000u));
  }

  // acc += q k^T over one stage, from the first of this warp's rows of both on.
  static __device__ __forceinline__ void add_stage(const float* q, const float* k,
                                                   float (&acc)[kRowTiles][kColTiles][4]) {
    const int lane = threadIdx.x % 32;
    // Where this lane's row of what ldmatrix loads begins at step 0: of four matrices of 8 rows and
    // 4 dimensions, rows 8 on second and dimensions 4 on third for q, the other way round for k.
    // Other steps lie 8 step away, by the exclusive or of chunk_at.
    const int r = lane % 8, m = lane / 8;
    const int q_at = (m % 2 * 8 + r) * kDepth + chunk_at(r, m / 2);
    const int k_at = (m / 2 * 8 + r) * kDepth + chunk_at(r, m % 2);
    float part[kRowTiles][kColTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kDepth / 8; ++step) {
      uint32_t qh[kRowTiles][4], ql[kRowTiles][4], kh[kColTiles][2], kl[kColTiles][2];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ldmatrix_x4<false>(qh[i], smem_address(q + (q_at ^ 8 * step) + 16 * i * kDepth));
#pragma unroll
        for (int e = 0; e < 4; ++e) ql[i][e] = low_part(qh[i][e]);
      }
      if constexpr (kColTiles == 1) {
        ldmatrix_x2(kh[0], smem_address(k + (k_at ^ 8 * step)));
      } else {
#pragma unroll
        for (int j = 0; j < kColTiles; j += 2) {
          uint32_t both[4];
          ldmatrix_x4<false>(both, smem_address(k + (k_at ^ 8 * step) + 8 * j * kDepth));
#pragma unroll
          for (int e = 0; e < 4; ++e) kh[j + e / 2][e % 2] = both[e];
        }
      }
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) kl[j][e] = low_part(kh[j][e]);
      }
      const auto products = [&](const auto& a, const auto& b) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int j = 0; j < kColTiles; ++j) Mma<float>::product(part[i][j], a[i], b[j]);
        }
      };
      products(ql, kh);
      products(qh, kl);
      products(qh, kh);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) add_part(acc[i], 0, part[i]);
  }

  // Writes the keys of query blocks x0 .. x0 + kRows against key blocks 0 .. written (returned; at
  // most `width`) to keys[r * pitch + y]; pairs that do not exist get kAbsent. What the rest of
  // those rows would hold does not exist either. Rows from nq on are left alone.
  // Begins with copies into the ring [kRingWords], ends without a barrier after the last write.
  static __device__ int write(const PlanParams& p, int b, int h, int x0, float* ring,
                              uint32_t* keys, int64_t pitch, int width) {
    const bool pairs = pitch % 2 == 0;  // which then lie within 8 bytes
    const auto store = [&](int row) {
      return [&, row](int i, int y, uint32_t even, uint32_t odd) {
        uint32_t* const to = keys + (row + 8 * i) * pitch + y;
        if (pairs) {
          *reinterpret_cast<uint2*>(to) = make_uint2(even, odd);
        } else {
          to[0] = even;
          if (y + 1 < width) to[1] = odd;
        }
      };
    };
    return each(p, b, h, x0, ring, width, store, [](int) {});
  }

  // The same with what store(row) returns for this thread's rows, row + 8 i, and calls with (i, y,
  // key, next key) once for every two keys, y even; and done(y0) by all threads once this one has
  // stored its keys of columns y0 .. y0 + kCols. A barrier lies between done and the next store,
  // and one before the first.
  template <class Store, class Done>
  static __device__ __forceinline__ int each(const PlanParams& p, int b, int h, int x0, float* ring,
                                             int width, const Store& store, const Done& done) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp % kRowWarps * 16 * kRowTiles;
    const int warp_col = warp / kRowWarps * 8 * kColTiles;
    const int row = warp_row + lane / 4, col = warp_col + lane % 4 * 2;  // first of this thread's
    const ScoreInputs in(p, b, h, x0, kRows);
    const int written = min(width, (in.cols + 31) / 32 * 32);
    const int depths = (p.D + kDepth - 1) / kDepth;
    const int stages = (in.cols + kCols - 1) / kCols * depths;

    // Eight threads copy a row of a stage; this one the same 16 bytes of some rows.
    constexpr int kPass = kThreads / 8;
    const int copy_row = threadIdx.x / 8, copy_dim = threadIdx.x % 8 * 4;
    const int copy_to = copy_row * kDepth + chunk_at(copy_row, threadIdx.x % 8);
    int load_y = 0, load_dim = 0;  // of the next stage to load
    const auto load = [&](float* to) {
      const int dim = load_dim + copy_dim;
      const bool there = dim < p.D;
#pragma unroll
      for (int r = 0; r < kRows; r += kPass) {
        const int x = r + copy_row;
        if (kRows - r < kPass && x >= kRows) break;
        const bool inside = there && x < in.rows;
        copy_16_bytes(to + r * kDepth + copy_to, in.q_mean + (inside ? x * p.D + dim : 0), inside);
      }
      to += kRingRows * kDepth;
#pragma unroll
      for (int r = 0; r < kCols; r += kPass) {
        const int y = load_y + r + copy_row;
        if (kCols - r < kPass && r + copy_row >= kCols) break;
        const bool inside = there && y < in.cols;
        copy_16_bytes(to + r * kDepth + copy_to, in.k_mean + (inside ? y * p.D + dim : 0), inside);
      }
      commit_copies();
      load_dim += kDepth;
      if (load_dim >= p.D) load_dim = 0, load_y += kCols;
    };
    load(ring);
    if (stages > 1) load(ring + kStageWords);

    int seen[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) seen[i / 2][i % 2] = in.seen(p, x0, row + 8 * i);

    float acc[kRowTiles][kColTiles][4];
    bool has_key[kColTiles][2];
    float bias[kColTiles][2];
    int y0 = 0, depth = 0;
    float *here = ring, *ahead = ring + 2 % kStages * kStageWords;
    const auto next_place = [&](float*& at) {
      at += kStageWords;
      if (at == ring + kRingWords) at = ring;
    };
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      if (depth == 0) {
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            has_key[j][e] = in.has_key(y0 + col + 8 * j + e);
            bias[j][e] = 0.f;
          }
#pragma unroll
          for (int i = 0; i < 4 * kRowTiles; ++i) acc[i / 4][j][i % 4] = 0.f;
        }
        if (in.key_bias != nullptr) {
#pragma unroll
          for (int j = 0; j < 2 * kColTiles; ++j) {
            bias[j / 2][j % 2] = in.bias(y0 + col + 8 * (j / 2) + j % 2);
          }
        }
      }
      wait_for_stage(stage + 1 < stages);
      const auto load_ahead = [&] {
        if (stage + 2 < stages) load(ahead);
        next_place(ahead);
      };
      if constexpr (kStages > 2) load_ahead();
      // Not where all columns of the warp are in the future, or its rows beyond the end.
      if (y0 + warp_col < in.cols && warp_row < in.rows) {
        add_stage(here + warp_row * kDepth, here + (kRingRows + warp_col) * kDepth, acc);
      }
      next_place(here);
      if constexpr (kStages == 2) {
        if (stage + 2 < stages) __syncthreads();  // no warp reads this stage any more
        load_ahead();
      }
      if (++depth < depths) continue;
      depth = 0;
      uint32_t keys[kColTiles][2 * kRowTiles][2], highest = kAbsent;
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float score = fmaf(p.scale, acc[i / 2][j][i % 2 * 2 + e], bias[j][e]);
            const bool exists = has_key[j][e] && y0 + col + 8 * j + e < seen[i / 2][i % 2];
            keys[j][i][e] = exists ? key_of(score) : kAbsent;
            highest = max(highest, keys[j][i][e]);
          }
        }
      }
      const auto put = store(row);
      if (highest != key_of(NAN)) {
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
          const int y = y0 + col + 8 * j;
          if (y >= written) break;
#pragma unroll
          for (int i = 0; i < 2 * kRowTiles; ++i) {
            if (row + 8 * i < in.rows) put(i, y, keys[j][i][0], keys[j][i][1]);
          }
        }
      } else {
        // Infinite operands have no low part: again, sums in the order of the dimensions.
#pragma unroll 1
        for (int i = 0; i < 2 * kRowTiles * kColTiles; ++i) {
          const int r = row + i % (2 * kRowTiles) * 8, y = y0 + col + i / (2 * kRowTiles) * 8;
          if (r >= in.rows || y >= written) continue;
          const int end = in.seen(p, x0, r);
          uint32_t key[2];
#pragma unroll 1
          for (int e = 0; e < 2; ++e) {
            key[e] = kAbsent;
            if (!in.has_key(y + e) || y + e >= end) continue;
            float sum = 0.f;
            for (int d = 0; d < p.D; ++d) {
              sum = fmaf(in.q_mean[r * p.D + d], in.k_mean[(y + e) * p.D + d], sum);
            }
            key[e] = key_of(fmaf(p.scale, sum, in.bias(y + e)));
          }
          put(i % (2 * kRowTiles), y, key[0], key[1]);
        }
      }
      done(y0);
      y0 += kCols;
    }
    return written;
  }
};

// Up to 32 key blocks, one a lane; four warps have four rows each.
struct ShortScoreTile {
  static constexpr int kRows = 16, kCols = 32, kWarps = 4, kThreads = 128, kRowsEach = 4;
  // 4 times an odd number: eight lanes that read 16 bytes of eight rows hit all 32 banks.
  static constexpr int kPitch = kDepth + 4;
  static constexpr int kStageWords = (kRows + kCols) * kPitch, kRingWords = 2 * kStageWords;

  // As ScoreTile::write.
  static __device__ int write(const PlanParams& p, int b, int h, int x0, float* ring,
                              uint32_t* keys, int64_t pitch, int width) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kRowsEach;
    const ScoreInputs in(p, b, h, x0, kRows);
    const int stages = (p.D + kDepth - 1) / kDepth;
    const auto load = [&](int stage) {
      float* const to = ring + stage % 2 * kStageWords;
#pragma unroll
      for (int i = 0; i < kStageWords / kPitch * 8 / kThreads; ++i) {
        const int r = static_cast<int>(threadIdx.x) / 8 + i * (kThreads / 8);
        const int d = threadIdx.x % 8 * 4, dim = stage * kDepth + d;
        const bool query = r < kRows;
        const int from_row = query ? r : r - kRows;
        const bool inside = from_row < (query ? in.rows : in.cols) && dim < p.D;
        const float* const from = query ? in.q_mean : in.k_mean;
        copy_16_bytes(to + r * kPitch + d, from + (inside ? from_row * p.D + dim : 0), inside);
      }
      commit_copies();
    };
    load(0);
    if (stages > 1) load(1);

    int seen[kRowsEach];
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) seen[i] = in.seen(p, x0, row + i);
    const bool has_key = in.has_key(lane);
    const float bias = in.bias(lane);
    float acc[kRowsEach] = {};
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      wait_for_stage(stage + 1 < stages);
      const float* const q = ring + stage % 2 * kStageWords + row * kPitch;
      const float* const k = ring + stage % 2 * kStageWords + (kRows + lane) * kPitch;
      if (row < in.rows) {
#pragma unroll 4
        for (int d = 0; d < kDepth; d += 4) {
          const float4 key = *reinterpret_cast<const float4*>(k + d);
#pragma unroll
          for (int i = 0; i < kRowsEach; ++i) {
            const float4 query = *reinterpret_cast<const float4*>(q + i * kPitch + d);
            acc[i] = fmaf(query.x, key.x, acc[i]);
            acc[i] = fmaf(query.y, key.y, acc[i]);
            acc[i] = fmaf(query.z, key.z, acc[i]);
            acc[i] = fmaf(query.w, key.w, acc[i]);
          }
        }
      }
      if (stage + 2 < stages) {
        __syncthreads();  // no warp reads this stage any more
        load(stage + 2);
      }
    }
    const int written = min(width, (in.cols + 31) / 32 * 32);
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      if (row + i >= in.rows || lane >= written) continue;
      const bool exists = has_key && lane < seen[i];
      keys[(row + i) * pitch + lane] = exists ? key_of(fmaf(p.scale, acc[i], bias)) : kAbsent;
    }
    return written;
  }
};

}  // namespace mra::cuda
