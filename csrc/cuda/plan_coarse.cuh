// The block-coarse state of rows whose scores are in shared memory: softmax over the key blocks
// that the selection left, and the mean of their values.
#pragma once

#include <type_traits>

#include "plan_select.cuh"
#include "sm80/mma.cuh"

namespace mra::cuda {

// Words of a row of `blocks` scores, a multiple of 4: eight rows at the same column pair lie in
// different banks.
__host__ __device__ constexpr int score_pitch(int blocks) { return (blocks + 31) / 32 * 32 + 8; }

// The shift of a row's softmax: its highest score, zero where there is none.
__device__ __forceinline__ float top_score(uint32_t highest) {
  const float top = score_of(highest);
  return highest == kAbsent || top == -INFINITY ? 0.f : top;
}

// The weight of a key block of `count` keys.
__device__ __forceinline__ float weight_of(float score, float top, float count) {
  return count * exp2_approx((score - top) * 1.44269504f);
}

// As mean_of_values takes it: rounded to TF32, of whose low 13 bits the tensor cores take no
// notice. A weight of NaN may get lost: its sum is NaN.
__device__ __forceinline__ float weight_operand(float weight, bool tf32) {
  return __uint_as_float(__float_as_uint(weight) + (tf32 ? 0x1000u : 0u));
}

// From a lane's sum of a row's weights: writes the row's lse and returns 1 / sum of weights, 0
// where there is none.
__device__ __forceinline__ float finish_weights(float sum, float offset, float* lse) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  const bool weight = !(sum == 0.f);  // NaN in, NaN out
  if (threadIdx.x % 32 == 0) *lse = weight ? offset + logf(sum) : -INFINITY;
  return weight ? 1.f / sum : 0.f;
}

// The products of kSteps steps of 8 keys with 16 columns and kTiles times 8 rows: c += v^T
// weights^T. `weights`: in shared memory, this lane's first, [.., pitch]; v[i]: of step i this
// lane's two columns of two keys.
template <bool kTf32, int kTiles, int kSteps>
__device__ __forceinline__ void add_values(float (&c)[kTiles][4], const float* weights, int pitch,
                                           const float2 (&v)[kSteps][2]) {
  using M = Mma<float>;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const float values[4] = {v[i][0].x, v[i][0].y, v[i][1].x, v[i][1].y};
    uint32_t high[4], low[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (kTf32) {
        high[k] = M::to_tf32(values[k]);
      } else {
        M::split(values[k], high[k], low[k]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 w = *reinterpret_cast<const float2*>(weights + 8 * n * pitch + 8 * i);
      uint32_t row[2] = {__float_as_uint(w.x), __float_as_uint(w.y)}, rest[2];
      if (!kTf32) {
        M::split(w.x, row[0], rest[0]);
        M::split(w.y, row[1], rest[1]);
        M::product(c[n], low, row);
        M::product(c[n], high, rest);
      }
      M::product(c[n], high, row);
    }
  }
}

// mean[r] = inverse[r] * sum_y weights[r * pitch + y] v_mean[y] over the first `keys` key blocks,
// for rows r < `rows`, which are query blocks x0 + r. Weights are there, or zeros, for `keys`
// rounded up to 8, in rows rounded up to 8 kTiles. All warps of the block call this; where there
// are more of them than columns to share out they split the keys and add up through `parts`, 128
// kTiles floats a warp. The values of kBatch steps of 8 keys are on their way at once.
template <int kTiles, int kBatch>
__device__ __forceinline__ void mean_of_values(const PlanParams& p, int b, int h, int x0,
                                               const float* weights, int pitch,
                                               const float* inverse, int rows, int keys,
                                               float* parts) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const float* v_mean = p.v_mean + (int64_t{b} * p.Hk + h / (p.H / p.Hk)) * p.nk * p.D;
  float* mean = p.mean + ((int64_t{b} * p.H + h) * p.nq + x0) * p.D;

  // A unit: 8 kTiles rows and 16 columns; columns 2g, 2g + 1 are rows g, g + 8 of the products.
  const int groups = (p.D + 15) / 16, units = (rows + 8 * kTiles - 1) / (8 * kTiles) * groups;
  const int splits = units < warps ? warps / units : 1;
  const int steps = (keys + 7) / 8, share = (steps + splits - 1) / splits;
#pragma unroll 1
  for (int job = warp; job - warp < units * splits; job += warps) {
    const bool active = job < units * splits;
    const int unit = job % units, split = job / units;
    const int row = unit / groups * (8 * kTiles), column = unit % groups * 16;
    const int begin = split * share, end = active ? min(steps, begin + share) : begin;
    const bool inside = column + 2 * g < p.D;
    const float* const values = v_mean + (inside ? column + 2 * g : 0);
    const float* const of_lane = weights + (row + g) * pitch + 2 * t;

    float c[kTiles][4] = {};
    const auto add_up = [&](auto tf32) {  // a constant: one product does not split its operands
      // Steps of 8 keys that are all there, kBatch at once. Blocks of threads of the same head
      // start at different ones: all at the same ones would ask the same few slices of the L2
      // cache at the same time.
      const int batches = max(0, min(end, keys / 8) - begin) / kBatch;
      int turn = static_cast<int>(int64_t{x0} * batches / p.nq);
#pragma unroll 1
      for (int i = 0; i < batches; ++i) {
        const int step = begin + turn * kBatch;
        const float* const from = values + int64_t{8 * step + 2 * t} * p.D;
        float2 v[kBatch][2];
#pragma unroll
        for (int k = 0; k < 2 * kBatch; ++k) {
          v[k / 2][k % 2] =
              *reinterpret_cast<const float2*>(from + int64_t{8 * (k / 2) + k % 2} * p.D);
        }
        add_values<decltype(tf32)::value>(c, of_lane + 8 * step, pitch, v);
        if (++turn == batches) turn = 0;
      }
      // The rest in fours. Behind the last key its own values again, with weight zero; behind the
      // last step zeros, not a branch: the compiler would move each step's loads behind it, where
      // one waits for the other.
#pragma unroll 1
      for (int step = begin + batches * kBatch; step < end; step += 4) {
        float2 v[4][2];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const int y = min(8 * (step + k / 2) + 2 * t + k % 2, keys - 1);
          v[k / 2][k % 2] = *reinterpret_cast<const float2*>(values + int64_t{y} * p.D);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool there = step + i < end;
          float2 only[1][2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            only[0][k] = make_float2(there ? v[i][k].x : 0.f, there ? v[i][k].y : 0.f);
          }
          add_values<decltype(tf32)::value>(c, of_lane + 8 * (there ? step + i : begin), pitch,
                                            only);
        }
      }
    };
    if (p.tf32) {
      add_up(std::true_type{});
    } else {
      add_up(std::false_type{});
    }
    if (splits > 1) {  // then this is the only turn
      float* part = parts + warp * (128 * kTiles) + lane;
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) part[32 * i] = c[i / 4][i % 4];
      __syncthreads();
      for (int other = 1; active && split == 0 && other < splits; ++other) {
        part += units * (128 * kTiles);
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) c[i / 4][i % 4] += part[32 * i];
      }
    }
    if (!active || split > 0 || !inside) continue;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = row + 8 * n + 2 * t + e;
        if (r >= rows) continue;
        *reinterpret_cast<float2*>(mean + int64_t{r} * p.D + column + 2 * g) =
            make_float2(c[n][e] * inverse[r], c[n][2 + e] * inverse[r]);
      }
    }
  }
}

}  // namespace mra::cuda
