// Short heads (forward_head.cuh): what a block of threads holds of one, and the means of its
// blocks. A run is 32 neighbouring rows, which one warp pools and attends; a block has one run or
// two.
#pragma once

#include "../head.h"
#include "../plan_block.cuh"
#include "../sm80/tile.cuh"
#include "warp_products.cuh"

namespace mra::cuda::sm90 {

constexpr int kRun = 32;  // rows

// Two runs of a block have warps that are neighbours: `lead` is the first one's, whose number also
// says where shared memory keeps what belongs to the block.
struct HeadBlocks {
  int shift;  // log2 of runs in a block

  __device__ __forceinline__ int of_run(int run) const { return run >> shift; }
  __device__ __forceinline__ int lead(int block) const { return block << shift; }
  __device__ __forceinline__ bool leads(int run) const { return (run & shift) == 0; }
  // The other warp of a pair that leads has written what the leading one reads.
  __device__ __forceinline__ void join(int run) const {
    if (shift == 0) return;
    __syncwarp();
    const int barrier = 1 + of_run(run);
    if (leads(run)) {
      asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
    } else {
      asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory");
    }
  }
  // Both have written what the other one reads.
  __device__ __forceinline__ void meet(int run) const {
    __syncwarp();
    if (shift != 0) asm volatile("bar.sync %0, 64;" ::"r"(1 + of_run(run)) : "memory");
  }
};

// What the coarse forms need besides.
template <int kWarps, int DP, HeadForm kForm>
struct HeadCoarse {  // row: pooled keys are attended as keys are
  uint16_t k[1][16][DP], v[1][16][DP];
  uint16_t matrices[2][1][DP][DP];  // C, Sigma; before them, sums of values of second runs
  float log_mass[16];               // of a block's keys, log2 units; -inf where there are none
  uint32_t roots[kForm == HeadForm::centred ? 16 * kWarps : 1];  // of weights times counts, pairs
  float of_run[kForm == HeadForm::centred ? kWarps : 1][2];      // maximum and sum of logits
};
template <int kWarps, int DP>
struct HeadCoarse<kWarps, DP, HeadForm::state> {
  float v_mean[kWarps][DP + 4];
  alignas(16) float state_mean[kWarps][DP];
  float state_lse[kWarps];
};

// kWarps: the most runs of queries, and of keys.
template <int kWarps, int DP, HeadForm kForm>
struct HeadShared {
  static constexpr int kRows = kRun * kWarps;
  static_assert(kWarps <= kHeadRuns && kHeadRuns == 16, "half a warp has a row of pairs");
  struct Inputs {
    uint16_t q[1][kRows][DP], k[1][kRows][DP], v[1][kRows][DP];
  } in;
  HeadCoarse<kWarps, DP, kForm> coarse;
  // Of blocks, at their leading run. Rows of four words more: eight lanes that read 16 bytes of
  // eight rows hit all banks.
  alignas(16) float q_mean[kWarps][DP + 4];
  alignas(16) float k_mean[kWarps][DP + 4];
  alignas(16) uint32_t map[kWarps][kHeadRuns];  // keys of scores, a row for each warp
  uint32_t taken[kWarps];                       // bit y: query block x takes key block y
  uint32_t queries_there[kWarps];               // bit r: row r of the run counts
  uint32_t keys_there[kWarps];
  int pairs[kTiers];
  int queries_read;  // warps that are done with q
  uint64_t full[3];  // q, k, v
};

// The rows of a run that count, as bits: those before `rows` whose mask is not 0.
__device__ __forceinline__ uint32_t rows_there(int rows, const uint8_t* mask) {
  const int lane = threadIdx.x % 32;
  return __ballot_sync(kFullWarp, lane < rows && (mask == nullptr || mask[lane]));
}

// Bits of a pair of rows from `row` on -> all bits of those that count.
__device__ __forceinline__ uint32_t mask_pair(uint32_t there, int row) {
  return (there >> row & 1 ? 0xffffu : 0u) | (there >> row & 2 ? 0xffff0000u : 0u);
}

// Sums over the rows of a run that `there` says, weighted by left operands of 16 rows each, all
// equal but for rounding (rows 8 on may hold what rows 0 to 7 have lost): by the tensor cores, in
// float32. Thread 4 g + t has those of columns 8 n + 2 t, 8 n + 2 t + 1, whatever g.
template <typename T, int DP>
__device__ __forceinline__ void sum_run(float (&sum)[DP / 8][4], const uint16_t (&rows)[kRun][DP],
                                        uint32_t there, const typename Mma<T>::A (&weights)[2],
                                        const PanelLane<DP>& panel) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < DP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[n][i] = 0.f;
  }
  const uint32_t base = smem_address(rows);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    typename Mma<T>::B fb[DP / 16];
#pragma unroll
    for (int n = 0; n < DP / 16; ++n) {
      ldmatrix_x4<true>(fb[n].r, base + 16 * k * PanelLane<DP>::kRowBytes + panel.rows(n));
    }
    if (there != kFullWarp) {  // what lies elsewhere may be NaN
      const uint32_t low = mask_pair(there, 16 * k + 2 * t);
      const uint32_t high = mask_pair(there, 16 * k + 8 + 2 * t);
#pragma unroll
      for (int n = 0; n < DP / 16; ++n) {
        fb[n].r[0] &= low, fb[n].r[1] &= high, fb[n].r[2] &= low, fb[n].r[3] &= high;
      }
    }
    Mma<T>::mma(sum, 0, weights[k], fb, false);
  }
}

// One pair of columns of a run's sums a thread: columns 2 * (threadIdx.x % 4) on of the tile of
// eight that column_of says. Where there are fewer than eight tiles several threads have the same.
template <int DP>
__device__ __forceinline__ int column_of() {
  return threadIdx.x % 32 / 4 % (DP / 8) * 8 + threadIdx.x % 4 * 2;
}
template <int DP>
__device__ __forceinline__ bool writes_column(int D) {
  return threadIdx.x % 32 < DP / 2 && column_of<DP>() < D;
}
template <int DP>
__device__ __forceinline__ float2 of_column(const float (&sum)[DP / 8][4]) {
  const int tile = threadIdx.x % 32 / 4 % (DP / 8);
  float2 mine = make_float2(sum[0][0], sum[0][1]);
#pragma unroll
  for (int n = 1; n < DP / 8; ++n) {
    if (tile == n) mine = make_float2(sum[n][0], sum[n][1]);
  }
  return mine;
}

// Plain sums of a run.
template <typename T, int DP>
__device__ __forceinline__ float2 sum_run(const uint16_t (&rows)[kRun][DP], uint32_t there,
                                          const PanelLane<DP>& panel) {
  const uint32_t one = Mma<T>::pack(1.f, 1.f);
  const typename Mma<T>::A ones[2] = {{{one, one, one, one}}, {{one, one, one, one}}};
  float sum[DP / 8][4];
  sum_run<T>(sum, rows, there, ones, panel);
  return of_column<DP>(sum);
}

template <int DP>
__device__ __forceinline__ void put_pair(float* to, float2 pair) {
  if (threadIdx.x % 32 < DP / 2) *reinterpret_cast<float2*>(to + column_of<DP>()) = pair;
}
template <int DP>
__device__ __forceinline__ float2 get_pair(const float* from) {
  return *reinterpret_cast<const float2*>(from + column_of<DP>());
}
// As row `row` of a panel.
template <typename T, int DP>
__device__ __forceinline__ void round_pair(uint16_t (&to)[1][16][DP], int row, float2 pair) {
  if (threadIdx.x % 32 >= DP / 2) return;
  const int column = column_of<DP>(), chunk = swizzled<DP>(column / 8, row);
  *reinterpret_cast<uint32_t*>(&to[0][row][chunk * 8 + column % 8]) =
      Mma<T>::pack(pair.x, pair.y);
}
__device__ __forceinline__ float2 operator+(float2 a, float2 b) {
  return make_float2(a.x + b.x, a.y + b.y);
}
__device__ __forceinline__ float2 operator*(float a, float2 b) {
  return make_float2(a * b.x, a * b.y);
}

}  // namespace mra::cuda::sm90
