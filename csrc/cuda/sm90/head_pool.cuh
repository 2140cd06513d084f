// Short heads (forward_head.cuh): what a block of threads holds of one, and the means of its
// blocks. A run is 32 neighbouring rows, which one warp pools and attends; a block has one or two.
#pragma once

#include "../centred.h"
#include "../head.h"
#include "../plan_select.cuh"
#include "../sm80/tile.cuh"
#include "tma.cuh"
#include "warp_products.cuh"

namespace mra::cuda::sm90 {

constexpr int kRun = 32;  // rows

// Where a lane's parts of panels lie, made anew: the compiler would else hold what follows from it,
// addresses of every panel, in registers through all stages.
__device__ __forceinline__ int lane_here() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
template <int DP>
__device__ __forceinline__ PanelLane<DP> panel_here() {
  return PanelLane<DP>(lane_here());
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
    if (shift != 0) sm90::meet<64>(1 + of_run(run));
  }
};

// What the coarse forms need besides.
template <int kRuns, int DP, HeadForm kForm>
struct HeadCoarse {  // row: pooled keys are attended as keys are
  uint16_t k[16][DP], v[16][DP];
  // What rounding has taken from them.
  uint16_t k_lost[kForm == HeadForm::order1 ? 16 : 1][DP];
  uint16_t v_lost[kForm == HeadForm::order1 ? 16 : 1][DP];
  uint16_t matrices[2][DP][DP];   // C, Sigma; before them of_second and of_sample
  uint64_t made;                  // passed once the matrices are there
  uint32_t most[2][2];            // float16, by turns: the largest key and value, bits
  alignas(8) float log_mass[16];  // of a block's keys, log2 units; -inf where there are none
  static constexpr bool kWeighted = is_weighted(kForm), kSampled = kForm == HeadForm::sampled;
  // Times counts, as kept: of each run pairs of keys, 4 t + i that of 8 i + 2 t.
  alignas(16) uint32_t weights[kWeighted ? 16 * kRuns : 1];
  float4 of_run[kWeighted ? kRuns : 1];      // RunLogits of log weights
  float4 of_run_mean[kSampled ? kRuns : 1];  // and of logits with the mean query
  float score_bias[kWeighted ? 16 : 1];      // of a key block, natural units
  uint32_t centre[kWeighted ? DP / 2 : 1];   // the mean query, rounded, pairs

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
struct HeadPlace {
  int head, b, h, hk;  // head = b * H + h
  bool writes_keys;    // one of the query heads that share it writes what belongs to a key head

  __device__ __forceinline__ int64_t key_head(const ForwardParams& f) const {
    return int64_t{b} * f.Hk + hk;
  }
};

// The item-th to be taken, in the order of the tensor; kByHead: of densities, where heads have
// theirs.
template <bool kByHead>
struct HeadAt : HeadPlace {
  __device__ __forceinline__ HeadAt(const HeadParams& p, int item) {
    const ForwardParams& f = p.fine;
    const int group = f.H / f.Hk;
    head = item;
    b = item / f.H;
    h = item - b * f.H;
    hk = h / group;
    writes_keys = h - hk * group == 0;
  }
  __device__ __forceinline__ int item() const { return head; }
};

template <>
struct HeadAt<true> : HeadPlace {
  int place;
  int budget;  // of each of its rows, in selection by row

  __device__ __forceinline__ HeadAt(const HeadParams& p, int item) : place(item) {
    const ForwardParams& f = p.fine;
    const int group = f.H / f.Hk;
    if (f.by_head) {
      b = item % f.B;
      h = f.head_order[min(item / f.B, f.H - 1)];
    } else {
      b = item / f.H;
      h = item - b * f.H;
    }
    head = b * f.H + h;
    budget = f.by_head ? p.head_budget[h] : p.plan.row_capacity;
    hk = h / group;
    writes_keys = h - hk * group == 0;
  }
  __device__ __forceinline__ int item() const { return place; }
};

template <int kRuns, int DP, HeadForm kForm, bool kByHead>
struct HeadShared {
  using At = HeadAt<kByHead>;
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
  alignas(At) char places[2][sizeof(At)];  // this head and the next one, by turns

  __device__ __forceinline__ At& at(int turn) { return reinterpret_cast<At&>(places[turn]); }

  // Where the threads of a warpgroup hand 16 bytes each over to another one: before the matrices
  // are there, behind the last use of the means of blocks.
  static constexpr int kPlaces = DP == 32 && kRuns == 16 ? 4 : 0;
  __device__ __forceinline__ float4& place(int i, int thread) {
    static_assert(kPlaces == 0 || (sizeof(q_mean) >= 128 * sizeof(float4) &&
                                   sizeof(coarse.matrices) == 2 * 128 * sizeof(float4)));
    float4* const at = i < 2    ? reinterpret_cast<float4*>(coarse.matrices) + 128 * i
                       : i == 2 ? reinterpret_cast<float4*>(q_mean)
                                : reinterpret_cast<float4*>(k_mean);
    return at[thread];
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

// Where quads have something of each of 32 rows or columns, thread 4 g + t of those g, g + 8, g +
// 16 and g + 24: the one that is this lane's own.
__device__ __forceinline__ int own_of_32() { return threadIdx.x % 4 * 8 + threadIdx.x % 32 / 4; }
__device__ __forceinline__ float own_of_32(const float (&x)[4]) {
  const int t = threadIdx.x % 4;
  const float low = t % 2 == 0 ? x[0] : x[1], high = t % 2 == 0 ? x[2] : x[3];
  return t < 2 ? low : high;
}

// Of a row's columns a lane has own_of_32(), and with 64 that and the one 32 behind.
template <int DP>
struct OwnColumns {
  float x[DP / 32];

  __device__ __forceinline__ void put(float* to) const {
#pragma unroll
    for (int i = 0; i < DP / 32; ++i) to[own_of_32() + 32 * i] = x[i];
  }
  __device__ __forceinline__ void add(const float* from) {
#pragma unroll
    for (int i = 0; i < DP / 32; ++i) x[i] += from[own_of_32() + 32 * i];
  }
  // Divided as the kernels of the stage do it, with one product where that is the same.
  __device__ __forceinline__ void divide(int count) {
    const auto n = static_cast<float>(max(count, 1));
    const bool exact = (count & (count - 1)) == 0;
#pragma unroll
    for (int i = 0; i < DP / 32; ++i) x[i] = exact ? x[i] * (1.f / n) : x[i] / n;
  }
  // As row `row` of a panel; what rounding takes is left.
  template <typename T>
  __device__ __forceinline__ void round(uint16_t (&to)[16][DP], int row) {
#pragma unroll
    for (int i = 0; i < DP / 32; ++i) {
      const uint32_t rounded = Mma<T>::pack(x[i], 0.f);
      const int chunk = swizzled<DP>(4 * i + own_of_32() / 8, row);
      to[row][chunk * 8 + own_of_32() % 8] = static_cast<uint16_t>(rounded);
      x[i] -= unpack2(rounded, T{}).x;
    }
  }
  // The mean of block y of `count` blocks of a head, unless there is no place for it.
  __device__ __forceinline__ void write(float* means, int64_t head, int count, int y, int D) const {
    if (means == nullptr || y >= count) return;
    float* const to = means + (head * count + y) * D;
#pragma unroll
    for (int i = 0; i < DP / 32; ++i) {
      if (own_of_32() + 32 * i < D) to[own_of_32() + 32 * i] = x[i];
    }
  }
};

// Sums over the rows of a run that `there` says, by the tensor cores, in float32. Their weights are
// right operands of 16 rows each, even columns of which are equal, and odd ones, which are added to
// these, or with kPlain all.
template <typename T, bool kPlain, int DP>
__device__ __forceinline__ OwnColumns<DP> sum_run(const uint16_t (&rows)[kRun][DP], uint32_t there,
                                                  const uint32_t (&weights)[2][2],
                                                  const PanelLane<DP>& panel) {
  OwnColumns<DP> own;
  const uint32_t base = smem_address(rows);
#pragma unroll
  for (int j = 0; j < DP / 32; ++j) {
    typename Mma<T>::A a[2][2];  // of 16 rows, 16 columns
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4<true>(a[k][i].r,
                          base + 16 * k * PanelLane<DP>::kRowBytes + panel.keys(2 * j + i));
      }
    }
    if (there != kFullWarp) {  // what lies elsewhere may be NaN
      const int t = lane_here() % 4;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t low = mask_pair(there, 16 * k + 2 * t);
        const uint32_t high = mask_pair(there, 16 * k + 8 + 2 * t);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t(&r)[4] = a[k][i].r;
          r[0] &= low, r[1] &= low, r[2] &= high, r[3] &= high;
        }
      }
    }
    float sums[2][4] = {}, of_four[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Mma<T>::product(sums[i], a[0][i], weights[0][0], weights[0][1]);
      Mma<T>::product(sums[i], a[1][i], weights[1][0], weights[1][1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      of_four[i] = sums[i / 2][i % 2 * 2] + (kPlain ? 0.f : sums[i / 2][i % 2 * 2 + 1]);
    }
    own.x[j] = own_of_32(of_four);
  }
  return own;
}

// Plain sums of a run.
template <typename T, int DP>
__device__ __forceinline__ OwnColumns<DP> sum_run(const uint16_t (&rows)[kRun][DP], uint32_t there,
                                                  const PanelLane<DP>& panel) {
  const uint32_t one = Mma<T>::pack(1.f, 1.f), ones[2][2] = {{one, one}, {one, one}};
  return sum_run<T, true>(rows, there, ones, panel);
}

// pool: the sums of a run's queries and keys, and their means of the block that it leads. Second
// runs of blocks hand their sums over in shared memory.
template <typename T, HeadForm kForm, bool kPairs, int DP, class Shared, class Inputs>
__device__ __forceinline__ void pool_run(const HeadParams& p, Shared& s, const Inputs& in,
                                         const HeadPlace& at, const HeadBlocks& blocks, int run,
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
  OwnColumns<DP> k_mean = sum_run<T>(s.run_of(in.k(), run), k_there, panel);
  barrier_wait(&s.full[0], phase);
  OwnColumns<DP> q_mean = sum_run<T>(s.run_of(in.q(), run), q_there, panel);
  if (first_lane) {
    s.queries_there[run] = q_there;
    s.keys_there[run] = k_there;
  }
  int q_count = __popc(q_there), k_count = __popc(k_there);
  if (kPairs && blocks.shift != 0) {
    if (!blocks.leads(run)) {
      q_mean.put(s.q_mean[run]);
      k_mean.put(s.k_mean[run]);
    }
    blocks.meet(run);
    if (!blocks.leads(run)) return;
    q_count += __popc(s.queries_there[run + 1]);
    k_count += __popc(s.keys_there[run + 1]);
    q_mean.add(s.q_mean[run + 1]);
    k_mean.add(s.k_mean[run + 1]);
  }
  q_mean.divide(q_count);
  k_mean.divide(k_count);
  q_mean.put(s.q_mean[run]);
  k_mean.put(s.k_mean[run]);
  q_mean.write(p.q_mean, at.head, p.plan.nq, x, f.D);
  if (!is_weighted(kForm) && at.writes_keys) {
    k_mean.write(p.k_mean, at.key_head(f), p.plan.nk, x, f.D);
  }
  if (at.h == 0 && first_lane) {
    if (p.q_count != nullptr && x < p.plan.nq) p.q_count[at.b * p.plan.nq + x] = q_count;
    if (p.k_count != nullptr && x < p.plan.nk) p.k_count[at.b * p.plan.nk + x] = k_count;
  }
}

// The same of the values; with those of the keys as pooled keys.
template <typename T, HeadForm kForm, bool kPairs, int DP, class Shared, class Inputs>
__device__ __forceinline__ void pool_values(const HeadParams& p, Shared& s, const Inputs& in,
                                            const HeadPlace& at, const HeadBlocks& blocks, int run,
                                            int phase) {
  const auto panel = panel_here<DP>();
  const int x = blocks.of_run(run);
  __syncwarp();
  const uint32_t there = s.keys_there[run];
  barrier_wait(&s.full[2], phase);
  OwnColumns<DP> mean = sum_run<T>(s.run_of(in.v(), run), there, panel);
  int count = __popc(there);
  if (kPairs && blocks.shift != 0) {
    if (!blocks.leads(run)) mean.put(s.coarse.of_second(0, x));
    blocks.meet(run);
    if (!blocks.leads(run)) return;
    count += __popc(s.keys_there[run + 1]);
    mean.add(s.coarse.of_second(0, x));
  }
  mean.divide(count);
  if (at.writes_keys) mean.write(p.v_mean, at.key_head(p.fine), p.plan.nk, x, p.fine.D);
  if constexpr (kForm == HeadForm::state) {
    mean.put(s.coarse.v_mean[run]);
  } else {
    OwnColumns<DP> k_mean = {};
    k_mean.add(s.k_mean[run]);
    k_mean.template round<T>(s.coarse.k, x);
    mean.template round<T>(s.coarse.v, x);
    if constexpr (kForm == HeadForm::order1) {
      k_mean.template round<T>(s.coarse.k_lost, x);
      mean.template round<T>(s.coarse.v_lost, x);
    }
    if (threadIdx.x % 32 == 0) {
      s.coarse.log_mass[x] = log2_approx(static_cast<float>(count));
    }
  }
}

}  // namespace mra::cuda::sm90
