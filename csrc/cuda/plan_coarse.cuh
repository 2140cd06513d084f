// The block-coarse state of rows whose scores are in shared memory: softmax over the key blocks
// that the selection left, and the mean of their values.
#pragma once

#include "plan_select.cuh"
#include "sm80/mma.cuh"

namespace mra::cuda {

// Words of a row of `blocks` scores, a multiple of 4: eight rows at the same column pair lie in
// different banks.
__host__ __device__ constexpr int score_pitch(int blocks) { return (blocks + 31) / 32 * 32 + 8; }

// A row of scores [32 * steps], -inf for what isn't left -> weights c_y exp(score - top), in place,
// by one warp. Writes the row's lse, to which `offset` is added, and returns 1 / sum of weights, 0
// where there is none.
__device__ __forceinline__ float weigh_row(const PlanParams& p, int b, float* row, int steps,
                                           float offset, float* lse) {
  const int lane = threadIdx.x % 32;
  const int32_t* k_count = p.k_count + int64_t{b} * p.nk;
  float top = -INFINITY;
#pragma unroll 4
  for (int t = 0; t < steps; ++t) top = fmaxf(top, row[t * 32 + lane]);
  top = score_of(__reduce_max_sync(kFullWarp, key_of(top)));
  if (top == -INFINITY) top = 0.f;
  float sum = 0.f;
#pragma unroll 4
  for (int t = 0; t < steps; ++t) {
    const int y = t * 32 + lane;
    const auto count = static_cast<float>(y < p.nk ? k_count[y] : 0);
    const float weight = count * exp2_approx((row[y] - top) * 1.44269504f);
    row[y] = weight;
    sum += weight;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  const bool weight = !(sum == 0.f);  // NaN in, NaN out
  if (lane == 0) *lse = weight ? offset + (top + logf(sum)) : -INFINITY;
  return weight ? 1.f / sum : 0.f;
}

// mean[r] = inverse[r] * sum_y weights[r * pitch + y] v_mean[y] over the first `keys` key blocks,
// for rows r < `rows`, which are query blocks x0 + r. Weights are there, or zeros, for `keys`
// rounded up to 8, in rows rounded up to 16 kTiles. All warps of the block call this; where there
// are more of them than columns to share out they split the keys and add up through `parts`, 256
// kTiles floats a warp. The values of kBatch steps of 8 keys are on their way at once.
template <int kTiles, int kBatch>
__device__ __forceinline__ void mean_of_values(const PlanParams& p, int b, int h, int x0,
                                               const float* weights, int pitch,
                                               const float* inverse, int rows, int keys,
                                               float* parts) {
  using M = Mma<float>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const float* v_mean = p.v_mean + (int64_t{b} * p.Hk + h / (p.H / p.Hk)) * p.nk * p.D;
  float* mean = p.mean + ((int64_t{b} * p.H + h) * p.nq + x0) * p.D;

  // A unit: 16 kTiles rows and 16 columns; columns 2g, 2g + 1 are column g of two tiles.
  const int groups = (p.D + 15) / 16, units = (rows + 16 * kTiles - 1) / (16 * kTiles) * groups;
  const int splits = units < warps ? warps / units : 1;
  const int steps = (keys + 7) / 8, share = (steps + splits - 1) / splits;
#pragma unroll 1
  for (int job = warp; job - warp < units * splits; job += warps) {
    const bool active = job < units * splits;
    const int unit = job % units, split = job / units;
    const int row = unit / groups * (16 * kTiles), column = unit % groups * 16;
    const int begin = split * share;
    const int count = active ? min(steps - begin, share) : 0;
    // Blocks of threads of the same head start at different keys: all at the same ones would ask
    // the same few slices of the L2 cache at the same time.
    const int from = static_cast<int>(int64_t{x0} * count / p.nq);
    const bool inside = column + 2 * g < p.D;
    const float* values = v_mean + (inside ? column + 2 * g : 0);

    float c[kTiles][2][4] = {};
    const auto add_up = [&](auto tf32) {  // a constant: one product does not split its operands
#pragma unroll 1
      for (int done = 0; done < count; done += kBatch) {
        const auto step_of = [&](int i) {
          const int step = from + done + i;
          return begin + (step < count ? step : step - count);
        };
        float2 v[kBatch][2];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int step = step_of(min(i, count - 1 - done));
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            // Behind the last key its own values again, with weight zero.
            const int y = min(step * 8 + 2 * t + k, keys - 1);
            v[i][k] = *reinterpret_cast<const float2*>(values + y * p.D);
          }
        }
        // Behind the last step zeros, not a branch: the compiler would move each step's loads
        // behind it, where one waits for the other.
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const bool there = done + i < count;
          const M::B fb[1] = {{{there ? v[i][0].x : 0.f, there ? v[i][1].x : 0.f,
                                there ? v[i][0].y : 0.f, there ? v[i][1].y : 0.f}}};
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            const M::A fa = M::load_a(weights, pitch, row + 16 * n, step_of(there ? i : 0) * 8);
            M::mma(c[n], 0, fa, fb, decltype(tf32)::value);
          }
        }
      }
    };
    if (p.tf32) {
      add_up(std::true_type{});
    } else {
      add_up(std::false_type{});
    }
    if (splits > 1) {  // then this is the only turn
      float* part = parts + warp * (256 * kTiles) + lane;
#pragma unroll
      for (int i = 0; i < 8 * kTiles; ++i) part[32 * i] = c[i / 8][i / 4 % 2][i % 4];
      __syncthreads();
      for (int other = 1; active && split == 0 && other < splits; ++other) {
        part += units * (256 * kTiles);
#pragma unroll
        for (int i = 0; i < 8 * kTiles; ++i) c[i / 8][i / 4 % 2][i % 4] += part[32 * i];
      }
    }
    if (!active || split > 0 || column + 4 * t >= p.D) continue;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 16 * n + g + 8 * half;
        if (r >= rows) continue;
        const float scale = inverse[r];
        const float(&even)[4] = c[n][0], (&odd)[4] = c[n][1];
        *reinterpret_cast<float4*>(mean + int64_t{r} * p.D + column + 4 * t) =
            make_float4(even[2 * half] * scale, odd[2 * half] * scale, even[2 * half + 1] * scale,
                        odd[2 * half + 1] * scale);
      }
    }
  }
}

}  // namespace mra::cuda
