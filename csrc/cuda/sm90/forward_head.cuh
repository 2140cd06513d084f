// A forward of short heads in one launch: persistent blocks of threads, each of which takes heads
// whole. Queries, keys and values of a head arrive by bulk copies and are read once from memory.
// Each warp has a run of 32 rows: it pools them, makes the row of scores of their query block,
// selects, and attends the rows to what the block has selected. Under order 1 all warps make the
// moments of the head between.
#pragma once

#include "head_plan.cuh"
#include "head_rows.cuh"
#include "head_weights.cuh"

namespace mra::cuda::sm90 {

struct HeadMaps : HeadParams {
  CUtensorMap q_map, k_map, v_map;
};

// Blocks of threads a multiprocessor.
template <int DP, int kRuns>
inline constexpr int kHeadCtas = (16 / kRuns) * (64 / DP);

template <typename T, int DP, int kRuns, HeadForm kForm, bool kGlobal>
__global__ void __launch_bounds__(32 * kRuns, kHeadCtas<DP, kRuns>)
    forward_head_kernel(const __grid_constant__ HeadMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = HeadShared<kRuns, DP, kForm, !kGlobal>;
  using At = typename Shared::At;
  constexpr bool kWeighted = is_weighted(kForm), kRow = kForm != HeadForm::state;
  constexpr bool kOrder1 = kWeighted || kForm == HeadForm::order1;
  constexpr bool kScaled = kOrder1 && std::is_same_v<T, __half>;
  constexpr int kRows = Shared::kRows, kCopy = kRows < 256 ? kRows : 256;
  extern __shared__ __align__(1024) char raw[];  // as panels must: no register for where it starts
  Shared& s = *reinterpret_cast<Shared*>(raw);
  if (smem_address(raw) % 1024 != 0) __trap();
  const ForwardParams& f = p.fine;
  const int lane = threadIdx.x % 32, heads = f.B * f.H;
  int run = warp_index();
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : s.full) barrier_init(&barrier, 1);
    barrier_init(&s.queries_read, kRuns);
    s.left = 0;
    if constexpr (kOrder1) barrier_init(&s.coarse.made, kRuns);
    barrier_init_done();
    s.at(0) = At(p, blockIdx.x);
  }
  if constexpr (kRow) s.coarse.clear(threadIdx.x, 32 * kRuns);
  __syncthreads();

  // Where there is room for one head only, the next one's keys come early.
  constexpr bool kTurns = DP == 64;
  HeadInputs<Shared, kTurns> in{s};
  const auto fetch = [&](int which, const CUtensorMap& map, typename Shared::Panel& to, int h,
                         const At& at) {
    if (at.item() >= heads) return;
    barrier_expect(&s.full[which], sizeof(to));
    if (lane != 0) return;
    for (int r = 0; r < kRows; r += kCopy) copy_panel(to[r], map, &s.full[which], 0, r, h, at.b);
  };
  const auto fetch_keys = [&](const auto& in, const At& at) {
    fetch(1, p.k_map, in.k(), at.hk, at);
  };
  const auto fetch_others = [&](const auto& in, const At& at) {
    fetch(0, p.q_map, in.q(), at.h, at);
    fetch(2, p.v_map, in.v(), at.hk, at);
  };
  if (run == 0) {
    fetch_keys(in, s.at(0));
    fetch_others(in, s.at(0));
  }

  const HeadBlocks blocks{p.run_shift};
#pragma unroll 1
  for (int phase = 0; s.at(phase).item() < heads; phase ^= 1) {
    // What follows from it then takes no registers from head to head.
    asm volatile("" : "+r"(run));
    const int x = blocks.of_run(run);
    const At &at = s.at(phase), &next = s.at(phase ^ 1);
    if (threadIdx.x == 0) s.at(phase ^ 1) = At(p, at.item() + gridDim.x);

    // pool
    pool_run<T, kForm, !kGlobal, DP>(p, s, in, at, blocks, run, phase);
    if constexpr (kRow && !kWeighted && !kTurns) {
      pool_values<T, kForm, !kGlobal, DP>(p, s, in, at, blocks, run, phase);
    }
    if constexpr (kScaled) {
      __syncwarp();
      const uint32_t there = s.keys_there[run];
      const auto panel = panel_here<DP>();
      take_most<T>(&s.coarse.most[phase][0], s.run_of(in.k(), run), there, panel);
      barrier_wait(&s.full[2], phase);
      take_most<T>(&s.coarse.most[phase][1], s.run_of(in.v(), run), there, panel);
    }
    if (threadIdx.x < kTiers) s.pairs[threadIdx.x] = 0;
    __syncthreads();
    if constexpr (kScaled) {
      if (threadIdx.x < 2) s.coarse.most[phase ^ 1][threadIdx.x] = 0;
    }
    const auto make_moments = [&] {
      if constexpr (kOrder1) {
        Kept<T>* const out = p.moments == nullptr || !at.writes_keys
                                 ? nullptr
                                 : static_cast<Kept<T>*>(p.moments) + at.key_head(f) * 2 * DP * DP;
        make_matrices<T, kWeighted, DP>(s, in, blocks, (f.M + kRun - 1) / kRun, run, phase, out);
      }
    };
    if constexpr (kWeighted) {  // scores depend on weights
      weigh_run<T, kForm, DP>(p, s, in, at, blocks, run, phase);
      __syncthreads();
    }

    // plan
    const uint32_t key = score_run<kForm, DP>(p, s, run, blocks);
    if constexpr (kWeighted) make_moments();  // their parts take the places of the means
    const uint32_t taken = select_blocks<kGlobal>(p, s, at, run, x, blocks.leads(run), key);

    // coarse
    if constexpr (!kRow) {
      if (p.coarse) {
        pool_values<T, kForm, !kGlobal, DP>(p, s, in, at, blocks, run, phase);
        __syncthreads();
        const bool left = lane < kHeadRuns && key != kAbsent && !(taken >> lane & 1);
        make_state<DP>(s, blocks, run, p.plan.nk, key, left);
      } else {
        barrier_wait(&s.full[2], phase);
      }
      if (p.coarse && kGlobal) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    } else {
      if constexpr (!kWeighted && kTurns) {
        pool_values<T, kForm, !kGlobal, DP>(p, s, in, at, blocks, run, phase);
        __syncthreads();  // all pooled keys are there
      }
      if constexpr (!kWeighted) make_moments();
    }

    // fine: sixteen rows of this warp's run, and of another one
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const bool moved = kGlobal && half == 1 && x < p.plan.nq;
      const int own = moved ? evened_out(s.taken, p.plan.nq, x) : run;
      const auto panel = panel_here<DP>();
      const uint32_t rows = smem_address(in.q()[kRun * own + 16 * half]);
      const auto read = [&](int i) {
        typename Mma<T>::A a;
        ldmatrix_x4<false>(a.r, rows + panel.rows(i));
        return a;
      };
      const auto attend = [&](const auto& queries) {
        attend_rows<T, kForm, DP>(p, s, in, at, blocks, own, half, queries,
                                  moved ? s.taken[own] : taken, phase);
      };
      if constexpr (kTurns) {
        typename Mma<T>::A q[DP / 16];
#pragma unroll
        for (int i = 0; i < DP / 16; ++i) q[i] = read(i);
        if (half == 1 && kGlobal) {  // rows are uneven: no warp waits for the others
          if (last_to_leave(s.left, kRuns)) fetch_keys(in.next(), next);
        } else if (half == 1) {
          barrier_arrive(&s.queries_read);
          if (run == 0) {
            barrier_wait(&s.queries_read, phase);
            fetch_keys(in.next(), next);
          }
        }
        attend([&](int i) { return q[i]; });
      } else {
        attend(read);
      }
    }
    __syncthreads();
    in.turn = in.next().turn;
    if (run == 0) {
      if (!kTurns) fetch_keys(in, next);
      fetch_others(in, next);
    }
  }
#endif
}

template <typename T, int DP, int kRuns, HeadForm kForm, bool kGlobal>
cudaError_t launch_head(const HeadParams& params, const Device& device, cudaStream_t stream) {
  using Shared = HeadShared<kRuns, DP, kForm, !kGlobal>;
  const ForwardParams& f = params.fine;
  HeadMaps p{params};
  constexpr int kCopy = Shared::kRows < 256 ? Shared::kRows : 256;
  const bool maps =
      tensor_map(&p.q_map, kDtype<T>, f.q, f.q_strides, f.B, f.H, f.rows, f.D, kCopy, DP) &&
      tensor_map(&p.k_map, kDtype<T>, f.k, f.k_strides, f.B, f.Hk, f.M, f.D, kCopy, DP) &&
      tensor_map(&p.v_map, kDtype<T>, f.v, f.v_strides, f.B, f.Hk, f.M, f.D, kCopy, DP);
  constexpr size_t kBytes = sizeof(Shared);
  if (!maps || kBytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
  const int64_t heads = int64_t{f.B} * f.H;
  const int64_t grid = std::min<int64_t>(heads, int64_t{kHeadCtas<DP, kRuns>} * device.sms);
  return launch_grid(forward_head_kernel<T, DP, kRuns, kForm, kGlobal>, grid, 32 * kRuns, kBytes,
                     stream, p);
}

// The instance for a form and the padded head dim: by the runs of the longer side.
template <typename T, int DP, HeadForm kForm>
cudaError_t launch_forward_head(const HeadParams& p, const Device& device, cudaStream_t stream) {
  const int runs = (std::max(p.fine.rows, p.fine.M) + kRun - 1) / kRun;
  if (runs > kHeadRuns) return cudaErrorNotSupported;
  const auto launch = [&](auto most) {
    if constexpr (kForm == HeadForm::state) {
      if (p.global) return launch_head<T, DP, most(), kForm, true>(p, device, stream);
    }
    return launch_head<T, DP, most(), kForm, false>(p, device, stream);
  };
  if constexpr (kForm == HeadForm::state) {
    if (runs <= 4) return launch(std::integral_constant<int, 4>{});
  }
  if (runs <= 8) return launch(std::integral_constant<int, 8>{});
  return launch(std::integral_constant<int, 16>{});
}

}  // namespace mra::cuda::sm90
