// Short heads (forward_head.cuh): what a block of threads holds of one, and the means of its
// blocks. A run is 32 neighbouring rows, which one warp pools and attends; a block has one or two.
#pragma once

#include "../centred.h"
#include "../head.h"
#include "../plan_block.cuh"
#include "../sm80/tile.cuh"
#include "tma.cuh"
#include "warp_products.cuh"

namespace mra::cuda::sm90 {

constexpr int kRun = 32;  // rows

// Where a lane's parts of panels lie, made anew: the compiler would else hold what follows from it,
// addresses of every panel, in registers through all stages.
template <int DP>
__device__ __forceinline__ PanelLane<DP> panel_here() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return PanelLane<DP>(lane);
}

// The runs of a block of two have warps that are neighbours. The number of its first run, the
// leading one, also says where shared memory keeps what belongs to the block.
struct HeadBlocks {
  int shift;  // log2 of runs in a block

  __device__ __forceinline__ int of_run(int run) const { return run >> shift; }
  __device__ __forceinline__ int lead(int block) const { return block << shift; }
  __device__ __forceinline__ bool leads(int run) const { return (run & shift) == 0; }
  // The warps of a block meet: what each has written before is seen by the other one.
  __device__ __forceinline__ void meet(int run) const {
    __syncwarp();
    if (shift != 0) asm volatile("bar.sync %0, 64;" ::"r"(1 + of_run(run)) : "memory");
  }
};

// What the coarse forms need besides.
template <int kRuns, int DP, HeadForm kForm>
struct HeadCoarse {  // row: pooled keys are attended as keys are
  uint16_t k[16][DP], v[16][DP];
  // What rounding has taken from them.
  uint16_t k_lost[kForm == HeadForm::order1 ? 16 : 1][DP];
  uint16_t v_lost[kForm == HeadForm::order1 ? 16 : 1][DP];
  uint16_t matrices[2][DP][DP];  // C, Sigma; before them of_second and of_sample
  uint64_t made;                 // passed once the matrices are there
  uint32_t most[2][2];           // float16, by turns: the largest key and value, bits
  float log_mass[16];            // of a block's keys, log2 units; -inf where there are none
  static constexpr bool kWeighted = is_weighted(kForm), kSampled = kForm == HeadForm::sampled;
  uint32_t weights[kWeighted ? 16 * kRuns : 1];  // times counts, as kept, pairs
  float4 of_run[kWeighted ? kRuns : 1];          // RunLogits of log weights
  float4 of_run_mean[kSampled ? kRuns : 1];      // and of logits with the mean query
  float score_bias[kWeighted ? 16 : 1];          // of a key block, natural units
  uint32_t centre[kWeighted ? DP / 2 : 1];       // the mean query, rounded, pairs

  // Blocks beyond the last one.
  __device__ __forceinline__ void clear(int thread, int threads) {
    for (int i = thread; i < 16 * DP; i += threads) {
      (&k[0][0])[i] = (&v[0][0])[i] = 0;
      if constexpr (kForm == HeadForm::order1) (&k_lost[0][0])[i] = (&v_lost[0][0])[i] = 0;
    }
    for (int i = thread; i < 16; i += threads) log_mass[i] = -INFINITY;
    if (thread < 4) most[thread / 2][thread % 2] = 0;
  }
  // Sums of block x's second run: of values, and weighted ones of keys.
  __device__ __forceinline__ float* of_second(int which, int x) {
    return reinterpret_cast<float*>(matrices[0]) + (8 * which + x % 8) * DP;
  }
  // Of a run, for each row of the sample of queries: greatest logit, sum of exponentials.
  __device__ __forceinline__ float2* of_sample(int run) {
    return reinterpret_cast<float2*>(matrices[1]) + run * kSampleRows;
  }
};
template <int kRuns, int DP>
struct HeadCoarse<kRuns, DP, HeadForm::state> {
  float v_mean[kRuns][DP + 4];
  alignas(16) float state_mean[kRuns][DP];  // of each run's block
  float state_lse[kRuns];

  __device__ __forceinline__ float* of_second(int /*which*/, int x) { return v_mean[2 * x + 1]; }
};

// A head that a block of threads is at. In shared memory, where it takes no registers.
struct HeadAt {
  int item, b, h, hk;
  bool writes_keys;  // one of the query heads that share it writes what belongs to a key head

  __device__ __forceinline__ HeadAt(const ForwardParams& f, int item) : item(item) {
    const int group = f.H / f.Hk;
    b = item / f.H;
    h = item - b * f.H;
    hk = h / group;
    writes_keys = h - hk * group == 0;
  }
  __device__ __forceinline__ int64_t key_head(const ForwardParams& f) const {
    return int64_t{b} * f.Hk + hk;
  }
};

template <int kRuns, int DP, HeadForm kForm>
struct HeadShared {
  static constexpr int kRows = kRun * kRuns;
  static_assert(kRuns <= kHeadRuns && kHeadRuns == 16, "half a warp has a row of pairs");
  using Panel = uint16_t[kRows][DP];
  Panel panels[3];  // queries, keys and values: see HeadInputs
  HeadCoarse<kRuns, DP, kForm> coarse;
  // Of blocks, at their leading run. Rows of four words more: eight lanes that read 16 bytes of
  // eight rows hit all banks.
  alignas(16) float q_mean[kRuns][DP + 4];
  alignas(16) float k_mean[kRuns][DP + 4];
  alignas(16) uint32_t map[kRuns][kHeadRuns];  // keys of scores, a row for each run
  uint32_t taken[kRuns];                       // bit y: query block x takes key block y
  uint32_t queries_there[kRuns];               // bit r: row r of the run counts
  uint32_t keys_there[kRuns];
  int pairs[kTiers];
  uint64_t full[3];       // q, k, v
  uint64_t queries_read;  // passed once every warp has its last queries in registers
  int left;               // or, under global selection, how many warps have
  alignas(HeadAt) char places[2][sizeof(HeadAt)];  // this head and the next one, by turns

  __device__ __forceinline__ HeadAt& at(int turn) {
    return reinterpret_cast<HeadAt&>(places[turn]);
  }

  template <int kLength>
  static __device__ __forceinline__ const uint16_t (&run_of(const uint16_t (&from)[kLength][DP],
                                                            int run))[kRun][DP] {
    return reinterpret_cast<const uint16_t(&)[kRun][DP]>(from[kRun * run]);
  }
};

// Which panels of shared memory hold a head. kTurns: keys of the next head go where this one's
// queries are, as soon as these are in registers, and what is left to the next queries and values.
template <class Shared, bool kTurns>
struct HeadInputs {
  Shared& s;
  int turn = 0;

  __device__ __forceinline__ auto& q() const { return s.panels[kTurns ? turn : 0]; }
  __device__ __forceinline__ auto& k() const { return s.panels[kTurns ? (turn + 1) % 3 : 1]; }
  __device__ __forceinline__ auto& v() const { return s.panels[kTurns ? (turn + 2) % 3 : 2]; }
  // Those of the next head.
  __device__ __forceinline__ HeadInputs next() const { return {s, kTurns ? (turn + 2) % 3 : 0}; }
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
// As row `row` of a panel; returns what rounding has taken.
template <typename T, int DP>
__device__ __forceinline__ float2 round_pair(uint16_t (&to)[16][DP], int row, float2 pair) {
  const uint32_t rounded = Mma<T>::pack(pair.x, pair.y);
  const float2 kept = unpack2(rounded, T{});
  if (threadIdx.x % 32 < DP / 2) {
    const int column = column_of<DP>(), chunk = swizzled<DP>(column / 8, row);
    *reinterpret_cast<uint32_t*>(&to[row][chunk * 8 + column % 8]) = rounded;
  }
  return make_float2(pair.x - kept.x, pair.y - kept.y);
}
// The mean of block x of `count` blocks of a head, unless there is no place for it.
template <int DP>
__device__ __forceinline__ void write_mean(const HeadParams& p, float* means, int64_t head,
                                           int count, int x, float2 mean) {
  const int D = p.fine.D;
  if (means == nullptr || x >= count || threadIdx.x % 32 >= DP / 2 || column_of<DP>() >= D) return;
  put_pair<DP>(means + (head * count + x) * D, mean);
}
__device__ __forceinline__ float2 operator+(float2 a, float2 b) {
  return make_float2(a.x + b.x, a.y + b.y);
}
// Divided as the kernels of the stage do it, with one product where that is the same.
__device__ __forceinline__ float2 over_count(float2 sum, int count) {
  const auto n = static_cast<float>(max(count, 1));
  if ((count & (count - 1)) == 0) return make_float2(sum.x * (1.f / n), sum.y * (1.f / n));
  return make_float2(sum.x / n, sum.y / n);
}

// pool: the sums of a run's queries and keys, and their means of the block that it leads. Second
// runs of blocks hand their sums over in shared memory.
template <typename T, HeadForm kForm, bool kPairs, int DP, class Shared, class Inputs>
__device__ __forceinline__ void pool_run(const HeadParams& p, Shared& s, const Inputs& in,
                                         const HeadAt& at, const HeadBlocks& blocks, int run,
                                         int phase) {
  const auto panel = panel_here<DP>();
  const ForwardParams& f = p.fine;
  const int x = blocks.of_run(run);
  const bool first_lane = threadIdx.x % 32 == 0;
  const auto there = [&](int rows, const uint8_t* mask) {
    return rows_there(rows - kRun * run, mask ? mask + int64_t{at.b} * rows + kRun * run : nullptr);
  };
  const uint32_t q_there = there(f.rows, f.row_mask), k_there = there(f.M, f.key_mask);
  barrier_wait(&s.full[1], phase);
  float2 k_mean = sum_run<T>(s.run_of(in.k(), run), k_there, panel);
  barrier_wait(&s.full[0], phase);
  float2 q_mean = sum_run<T>(s.run_of(in.q(), run), q_there, panel);
  if (first_lane) {
    s.queries_there[run] = q_there;
    s.keys_there[run] = k_there;
  }
  int q_count = __popc(q_there), k_count = __popc(k_there);
  if (kPairs && blocks.shift != 0) {
    if (!blocks.leads(run)) {
      put_pair<DP>(s.q_mean[run], q_mean);
      put_pair<DP>(s.k_mean[run], k_mean);
    }
    blocks.meet(run);
    if (!blocks.leads(run)) return;
    q_count += __popc(s.queries_there[run + 1]);
    k_count += __popc(s.keys_there[run + 1]);
    q_mean = q_mean + get_pair<DP>(s.q_mean[run + 1]);
    k_mean = k_mean + get_pair<DP>(s.k_mean[run + 1]);
  }
  q_mean = over_count(q_mean, q_count);
  k_mean = over_count(k_mean, k_count);
  put_pair<DP>(s.q_mean[run], q_mean);
  put_pair<DP>(s.k_mean[run], k_mean);
  write_mean<DP>(p, p.q_mean, at.item, p.plan.nq, x, q_mean);
  if (!is_weighted(kForm) && at.writes_keys) {
    write_mean<DP>(p, p.k_mean, at.key_head(f), p.plan.nk, x, k_mean);
  }
  if (at.h == 0 && first_lane) {
    if (p.q_count != nullptr && x < p.plan.nq) p.q_count[at.b * p.plan.nq + x] = q_count;
    if (p.k_count != nullptr && x < p.plan.nk) p.k_count[at.b * p.plan.nk + x] = k_count;
  }
}

// The same of the values; with those of the keys as pooled keys.
template <typename T, HeadForm kForm, bool kPairs, int DP, class Shared, class Inputs>
__device__ __forceinline__ void pool_values(const HeadParams& p, Shared& s, const Inputs& in,
                                            const HeadAt& at, const HeadBlocks& blocks, int run,
                                            int phase) {
  const auto panel = panel_here<DP>();
  const int x = blocks.of_run(run);
  __syncwarp();
  const uint32_t there = s.keys_there[run];
  barrier_wait(&s.full[2], phase);
  float2 mean = sum_run<T>(s.run_of(in.v(), run), there, panel);
  int count = __popc(there);
  if (kPairs && blocks.shift != 0) {
    if (!blocks.leads(run)) put_pair<DP>(s.coarse.of_second(0, x), mean);
    blocks.meet(run);
    if (!blocks.leads(run)) return;
    count += __popc(s.keys_there[run + 1]);
    mean = mean + get_pair<DP>(s.coarse.of_second(0, x));
  }
  mean = over_count(mean, count);
  if (at.writes_keys) write_mean<DP>(p, p.v_mean, at.key_head(p.fine), p.plan.nk, x, mean);
  if constexpr (kForm == HeadForm::state) {
    put_pair<DP>(s.coarse.v_mean[run], mean);
  } else {
    const float2 k_lost = round_pair<T>(s.coarse.k, x, get_pair<DP>(s.k_mean[run]));
    const float2 v_lost = round_pair<T>(s.coarse.v, x, mean);
    if constexpr (kForm == HeadForm::order1) {
      round_pair<T>(s.coarse.k_lost, x, k_lost);
      round_pair<T>(s.coarse.v_lost, x, v_lost);
    }
    if (threadIdx.x % 32 == 0) {
      s.coarse.log_mass[x] = log2_approx(static_cast<float>(count));
    }
  }
}

}  // namespace mra::cuda::sm90
