// Short heads (forward_head.cuh): the end of 16 rows of a warp.
#pragma once

#include "../sm80/softmax.cuh"

namespace mra::cuda::sm90 {

// Whether this warp is the last of `warps` to come here; the counter is then at zero again.
__device__ __forceinline__ bool last_to_leave(int& counter, int warps) {
  __syncwarp();
  int before = 0;
  if (threadIdx.x % 32 == 0) {
    __threadfence_block();
    before = atomicAdd(&counter, 1);
    if (before == warps - 1) counter = 0;
  }
  return __shfl_sync(kFullWarp, before, 0) == warps - 1;
}

// Scores of a run of keys -> logits in log2 units, -inf for keys whose bit is not set.
__device__ __forceinline__ void to_logits(float (&c)[4][4], uint32_t there, float scale) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c[n][i] = there >> (8 * n + 2 * t + i % 2) & 1 ? c[n][i] * scale : -INFINITY;
    }
  }
}

// Divides by the mass, and writes the lse of the rows whose bit in `there` is set, and -inf for
// others of the `present`; `lse` and `share_out` (or null) are those of the first of 16 rows.
template <class Softmax>
__device__ __forceinline__ void finish_rows(Softmax& s, float* lse, float* share_out, int present,
                                            uint32_t there, float (&share)[2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = g + 8 * half;
    const float pooled = quad_sum(s.pooled_sum[half]), sum = quad_sum(s.sum[half]);
    const float total = there >> r & 1 ? sum : 0.f;
    const bool weight = !(total == 0.f);  // NaN in, NaN out
    inverse[half] = weight ? __fdividef(1.f, total) : 0.f;
    share[half] = weight && pooled > 0.f
                      ? pooled * exp2_approx(s.pooled_max[half] - s.max[half]) * inverse[half]
                      : 0.f;
    if (t == 0 && r < present) {
      lse[r] = weight ? (s.max[half] + log2_approx(total)) * kLn2 : -INFINITY;
      if (share_out != nullptr) share_out[r] = share[half];
    }
  }
  s.rescale(inverse);
}

// A warp's 16 rows of accumulators to memory: four lanes that share a row trade columns until each
// has 16 bytes that lie together. `present` of the rows are there.
template <typename T, int kTiles>
__device__ __forceinline__ void store_rows(T* out, int64_t stride, int present, int D,
                                           const float (&acc)[kTiles][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[i] = Mma<T>::pack(acc[j + i][2 * half], acc[j + i][2 * half + 1]);
      }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const bool upper = t & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i & step) continue;
          const uint32_t got = __shfl_xor_sync(kFullWarp, upper ? w[i] : w[i + step], step);
          if (upper) {
            w[i] = got;
          } else {
            w[i + step] = got;
          }
        }
      }
      const int row = g + 8 * half, column = (j + t) * 8;
      if (row < present && column < D) {
        *reinterpret_cast<uint4*>(out + row * stride + column) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
}

}  // namespace mra::cuda::sm90
