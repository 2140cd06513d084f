// A forward of short heads in one launch: persistent blocks of threads, each of which takes heads
// whole. Queries, keys and values of a head arrive by bulk copies and are read once from memory;
// warp w pools run w of each, makes the row of scores of the query block that holds it, selects,
// and attends the 32 rows of the run to what the block has selected. Under order 1 all warps make
// the moments of the head between.
#pragma once

#include "head_order1.cuh"
#include "head_plan.cuh"
#include "head_rows.cuh"
#include "tma.cuh"

namespace mra::cuda::sm90 {

struct HeadMaps : HeadParams {
  CUtensorMap q_map, k_map, v_map;
};

template <int kWarps, int DP>
inline constexpr int kHeadCtas = 16 / kWarps * (64 / DP);  // blocks of threads a multiprocessor

template <typename T, int DP, int kWarps, HeadForm kForm, bool kGlobal>
__global__ void __launch_bounds__(32 * kWarps, kHeadCtas<kWarps, DP>)
    forward_head_kernel(const __grid_constant__ HeadMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = HeadShared<kWarps, DP, kForm>;
  constexpr bool kCentred = kForm == HeadForm::centred, kRow = kForm != HeadForm::state;
  constexpr bool kOrder1 = kCentred || kForm == HeadForm::order1;
  constexpr int kRows = Shared::kRows, kCopy = kRows < 256 ? kRows : 256, kSteps = DP / 16;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  const ForwardParams& f = p.fine;
  const PlanParams& plan = p.plan;
  const int lane = threadIdx.x % 32, t = lane % 4, run = warp_index(), heads = f.B * f.H;
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : s.full) barrier_init(&barrier, 1);
    barrier_init_done();
    s.queries_read = 0;
  }
  if constexpr (kRow) {
    for (int i = threadIdx.x; i < 16 * DP; i += 32 * kWarps) {
      (&s.coarse.k[0][0][0])[i] = (&s.coarse.v[0][0][0])[i] = 0;
    }
    if (threadIdx.x < 16) s.coarse.log_mass[threadIdx.x] = -INFINITY;
  }
  __syncthreads();

  const auto fetch = [&](int which, const CUtensorMap& map, uint16_t(&to)[1][kRows][DP], int h,
                         int b) {
    barrier_expect(&s.full[which], sizeof(to));
    if (lane != 0) return;
    for (int r = 0; r < kRows; r += kCopy) {
      copy_panel(to[0][r], map, &s.full[which], 0, r, h, b);
    }
  };
  const int group = f.H / f.Hk;
  const auto key_head_of = [&](int h) { return group == 1 ? h : h / group; };
  const auto fetch_queries = [&](int item, int h, int b) {
    if (item < heads) fetch(0, p.q_map, s.in.q, h, b);
  };
  const auto fetch_keys = [&](int item, int h, int b) {
    if (item >= heads) return;
    fetch(1, p.k_map, s.in.k, key_head_of(h), b);
    fetch(2, p.v_map, s.in.v, key_head_of(h), b);
  };
  int b = blockIdx.x / f.H, h = blockIdx.x - b * f.H;
  const int step_b = gridDim.x / f.H, step_h = gridDim.x - step_b * f.H;
  if (run == 0) {
    fetch_queries(blockIdx.x, h, b);
    fetch_keys(blockIdx.x, h, b);
  }

  const PanelLane<DP> panel;
  const HeadBlocks blocks{p.run_shift};
  const int first = kRun * run, x = blocks.of_run(run);
  const bool leads = blocks.leads(run);
  const auto of_run = [&](const uint16_t(&from)[1][kRows][DP]) -> const uint16_t(&)[kRun][DP] {
    return reinterpret_cast<const uint16_t(&)[kRun][DP]>(from[0][first]);
  };
  // Sums of values, and weighted ones of keys, of second runs.
  [[maybe_unused]] const auto of_second = [&](int which) {
    if constexpr (kRow) {
      return reinterpret_cast<float*>(s.coarse.matrices) + (8 * which + x % 8) * DP;
    } else {
      return static_cast<float*>(nullptr);
    }
  };
#pragma unroll 1
  for (int item = blockIdx.x, phase = 0; item < heads; phase ^= 1) {
    const int hk = key_head_of(h), next = item + gridDim.x;
    int next_b = b + step_b, next_h = h + step_h;
    if (next_h >= f.H) next_h -= f.H, ++next_b;
    const int64_t key_head = int64_t{b} * f.Hk + hk;
    // One of the query heads that share it writes what belongs to a key head.
    const bool writes_keys = h - hk * group == 0;
    const auto write_mean = [&](float* means, int64_t head, int count, float2 mean) {
      if (means == nullptr || x >= count || !writes_column<DP>(f.D)) return;
      put_pair<DP>(means + (head * count + x) * f.D, mean);
    };

    // pool
    barrier_wait(&s.full[0], phase);
    const uint32_t q_there = rows_there(
        f.rows - first, f.row_mask ? f.row_mask + int64_t{b} * f.rows + first : nullptr);
    float2 q_sum = sum_run<T>(of_run(s.in.q), q_there, panel);
    barrier_wait(&s.full[1], phase);
    const uint32_t k_there =
        rows_there(f.M - first, f.key_mask ? f.key_mask + int64_t{b} * f.M + first : nullptr);
    float2 k_sum = sum_run<T>(of_run(s.in.k), k_there, panel);
    if (lane == 0) {
      s.queries_there[run] = q_there;
      s.keys_there[run] = k_there;
    }
    if (threadIdx.x < kTiers) s.pairs[threadIdx.x] = 0;
    float2 v_sum{};
    if constexpr (kRow && !kCentred) {
      barrier_wait(&s.full[2], phase);
      v_sum = sum_run<T>(of_run(s.in.v), k_there, panel);
    }
    int q_count = __popc(q_there), k_count = __popc(k_there);
    if (kRow && !leads) {
      put_pair<DP>(s.q_mean[run], q_sum);
      put_pair<DP>(s.k_mean[run], k_sum);
      if (!kCentred) put_pair<DP>(of_second(0), v_sum);
    }
    if constexpr (kRow) blocks.join(run);
    if (leads) {
      if (kRow && blocks.shift != 0) {
        q_count += __popc(s.queries_there[run + 1]);
        k_count += __popc(s.keys_there[run + 1]);
        q_sum = q_sum + get_pair<DP>(s.q_mean[run + 1]);
        k_sum = k_sum + get_pair<DP>(s.k_mean[run + 1]);
        if (!kCentred) v_sum = v_sum + get_pair<DP>(of_second(0));
      }
      const float over_q = 1.f / static_cast<float>(max(q_count, 1));
      const float over_k = 1.f / static_cast<float>(max(k_count, 1));
      q_sum = over_q * q_sum;
      k_sum = over_k * k_sum;
      put_pair<DP>(s.q_mean[run], q_sum);
      put_pair<DP>(s.k_mean[run], k_sum);
      write_mean(p.q_mean, item, plan.nq, q_sum);
      if (writes_keys) write_mean(p.k_mean, key_head, plan.nk, k_sum);
      if (h == 0 && lane == 0) {
        if (p.q_count != nullptr && x < plan.nq) p.q_count[b * plan.nq + x] = q_count;
        if (p.k_count != nullptr && x < plan.nk) p.k_count[b * plan.nk + x] = k_count;
      }
      if constexpr (kRow && !kCentred) {
        v_sum = over_k * v_sum;
        if (writes_keys) write_mean(p.v_mean, key_head, plan.nk, v_sum);
        round_pair<T>(s.coarse.k, x, k_sum);
        round_pair<T>(s.coarse.v, x, v_sum);
        if (lane == 0) s.coarse.log_mass[x] = log2_approx(static_cast<float>(k_count));
      }
    }
    __syncthreads();

    [[maybe_unused]] float centre[DP / 32];
    if constexpr (kCentred) {
      mean_query<DP>(centre, s, blocks, kWarps);
      float logit =
          logit_of_key<T>(of_run(s.in.k), centre, f.scale * kLog2e, panel);
      if (!(k_there >> lane & 1)) logit = -INFINITY;
      float mass;
      const float weight = weight_of_key<T>(s, blocks, run, logit, mass);
      typename Mma<T>::A weights[2];
      as_operands<T>(weights, weight);
      k_sum = weighted_sum<T>(of_run(s.in.k), k_there, weights, panel);
      barrier_wait(&s.full[2], phase);
      v_sum = weighted_sum<T>(of_run(s.in.v), k_there, weights, panel);
      if (!leads) {
        put_pair<DP>(of_second(0), v_sum);
        put_pair<DP>(of_second(1), k_sum);
      }
      blocks.join(run);
      if (leads) {
        if (blocks.shift != 0) {
          v_sum = v_sum + get_pair<DP>(of_second(0));
          k_sum = k_sum + get_pair<DP>(of_second(1));
        }
        round_pair<T>(s.coarse.k, x, k_sum);
        round_pair<T>(s.coarse.v, x, v_sum);
        if (lane == 0) s.coarse.log_mass[x] = mass;
      }
    }

    // plan
    const int y_lane = lane % kHeadRuns;
    const int lead_q = blocks.lead(x), lead_k = blocks.lead(y_lane) % kWarps;
    uint32_t queries = s.queries_there[lead_q], keys = s.keys_there[lead_k];
    if (kRow && blocks.shift != 0) {
      queries |= s.queries_there[lead_q + 1];
      keys |= s.keys_there[lead_k + 1];
    }
    const bool exists = queries != 0 && y_lane < plan.nk && keys != 0;
    uint32_t key = score_key<DP>(s.q_mean[lead_q], s.k_mean[lead_k], plan.scale);
    if (!exists) key = kAbsent;
    const uint32_t taken = select_blocks<kGlobal>(p, s, item, run, x, leads, key);

    // coarse
    if constexpr (!kRow) {
      if (p.coarse) {
        barrier_wait(&s.full[2], phase);
        v_sum = 1.f / static_cast<float>(max(k_count, 1)) *
                sum_run<T>(of_run(s.in.v), k_there, panel);
        put_pair<DP>(s.coarse.v_mean[run], v_sum);
        if (writes_keys) write_mean(p.v_mean, key_head, plan.nk, v_sum);
        __syncthreads();
        make_state<DP>(s, x, plan.nk, key, lane < kHeadRuns && exists && !(taken >> lane & 1));
      } else {
        barrier_wait(&s.full[2], phase);
      }
      if (p.coarse && kGlobal) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    } else {
      if (kCentred) __syncthreads();  // all pooled keys are there
      if constexpr (kOrder1) {
        T* const out = p.moments == nullptr || !writes_keys
                           ? nullptr
                           : static_cast<T*>(p.moments) + key_head * 2 * DP * DP;
        make_matrices<T, kCentred>(s, blocks, (f.M + kRun - 1) / kRun, run, out, panel);
        __syncthreads();
      }
    }

    // fine: 16 rows of this warp's run, 16 of another one
    [[maybe_unused]] float bias[2][2];  // of this thread's pooled keys
    [[maybe_unused]] uint32_t centre_pairs[kSteps][2];
    if constexpr (kRow) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int y = 8 * n + 2 * t + e;
          bias[n][e] = taken >> y & 1 ? -INFINITY : s.coarse.log_mass[y];
        }
      }
    }
    if constexpr (kCentred) {
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        const int d = 8 * i + 2 * t;
        centre_pairs[i / 2][i % 2] =
            Mma<T>::pack(__shfl_sync(kFullWarp, centre[d / 32], d % 32),
                         __shfl_sync(kFullWarp, centre[d / 32], d % 32 + 1));
      }
    }
    const auto centred = [&](typename Mma<T>::A(&a)[kSteps]) {
      if constexpr (kCentred) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            a[i].r[r] = Pairs<T>::less(a[i].r[r], centre_pairs[i][r / 2]);
          }
        }
      }
    };
    const float scale = f.scale * kLog2e;
    const int other = kGlobal && x < plan.nq ? evened_out(s.taken, plan.nq, x) : run;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int own = half == 0 ? run : other, row = kRun * own + 16 * half;
      typename Mma<T>::A q[kSteps];
      load_rows<T>(q, s.in.q, row, panel);
      // The next queries come as soon as every warp has its last rows in registers.
      if (half == 1 && last_to_leave(s.queries_read, kWarps)) fetch_queries(next, next_h, next_b);
      if (row >= f.rows) continue;
      OnlineSoftmax<T, DP, kOrder1> softmax;
      [[maybe_unused]] float variance[2];
      if constexpr (kRow) {
        softmax.start(nullptr, nullptr, DP);
        float c[2][4] = {}, due[2];
        multiply_nt<T>(c, q, s.coarse.k, panel);
        float row_bias[2] = {};
        if constexpr (kCentred) {
          typename Mma<T>::A u[kSteps];
#pragma unroll
          for (int i = 0; i < kSteps; ++i) u[i] = q[i];
          centred(u);
          multiply_sigma<T>(variance, u, s.coarse.matrices[1], panel);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            variance[i] *= f.scale * f.scale;
            row_bias[i] = log2_approx(3.f - __fdividef(2.f, 1.f + variance[i] / 4));
          }
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            c[n][i] = fmaf(c[n][i], scale, bias[n][i % 2] + row_bias[i / 2]);
          }
        }
        softmax.weigh(c, 1.f, due);  // nothing is there yet to be due
        softmax.keep_pooled();
        multiply_pn<T>(softmax.acc, c, s.coarse.v, panel);
      } else {
        softmax.start(p.coarse ? s.coarse.state_mean[own] : nullptr, &s.coarse.state_lse[own], DP);
      }
#pragma unroll 1
      for (uint32_t left = kGlobal && half == 1 ? s.taken[own] : taken; left != 0;
           left &= left - 1) {
        const int lead = blocks.lead(__ffs(left) - 1);
#pragma unroll 1
        for (int r = lead; r <= lead + blocks.shift; ++r) {
          const uint32_t there = s.keys_there[r];
          if (kRow && there == 0) continue;
          const auto keys_of = [&](auto& from) -> const uint16_t(&)[1][kRun][DP] {
            return reinterpret_cast<const uint16_t(&)[1][kRun][DP]>(from[0][kRun * r]);
          };
          float c[4][4] = {};
          multiply_nt<T>(c, q, keys_of(s.in.k), panel);
          float factor = scale;
          if (there != kFullWarp) {
            to_logits(c, there, scale);
            factor = 1.f;
          }
          softmax.update(c, factor);
          multiply_pn<T>(softmax.acc, c, keys_of(s.in.v), panel);
        }
      }
      const int64_t at = int64_t{item} * f.rows + row;
      const int present = min(16, f.rows - row);
      float share[2];
      finish_rows(softmax, f.lse + at, f.share == nullptr ? nullptr : f.share + at, present,
                  s.queries_there[own] >> 16 * half, share);
      if constexpr (kOrder1) {
        centred(q);
        if constexpr (!kCentred) {
          multiply_sigma<T>(variance, q, s.coarse.matrices[1], panel);
#pragma unroll
          for (int i = 0; i < 2; ++i) variance[i] *= f.scale * f.scale;
        }
        float u[DP / 8][4];
        multiply_matrix<T>(u, q, s.coarse.matrices[0], panel);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (share[i] == 0.f) continue;
          const float factor = share[i] * f.scale * __fdividef(1.f, 1.f + variance[i] / 4);
#pragma unroll
          for (int n = 0; n < DP / 8; ++n) {
            softmax.acc[n][2 * i] = fmaf(factor, u[n][2 * i], softmax.acc[n][2 * i]);
            softmax.acc[n][2 * i + 1] = fmaf(factor, u[n][2 * i + 1], softmax.acc[n][2 * i + 1]);
          }
        }
      }
      store_rows<T>(static_cast<T*>(f.out) + b * f.out_strides.b + h * f.out_strides.h +
                        row * f.out_strides.l,
                    f.out_strides.l, present, f.D, softmax.acc);
    }
    __syncthreads();
    if (run == 0) fetch_keys(next, next_h, next_b);
    item = next, b = next_b, h = next_h;
  }
#endif
}

template <typename T, int DP, int kWarps, HeadForm kForm, bool kGlobal>
cudaError_t launch_head(const HeadParams& params, const Device& device, cudaStream_t stream) {
  using Shared = HeadShared<kWarps, DP, kForm>;
  const ForwardParams& f = params.fine;
  HeadMaps p{params};
  constexpr int kCopy = Shared::kRows < 256 ? Shared::kRows : 256;
  const bool maps =
      tensor_map(&p.q_map, kDtype<T>, f.q, f.q_strides, f.B, f.H, f.rows, f.D, kCopy, DP) &&
      tensor_map(&p.k_map, kDtype<T>, f.k, f.k_strides, f.B, f.Hk, f.M, f.D, kCopy, DP) &&
      tensor_map(&p.v_map, kDtype<T>, f.v, f.v_strides, f.B, f.Hk, f.M, f.D, kCopy, DP);
  constexpr size_t kBytes = sizeof(Shared) + 1024;
  if (!maps || kBytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
  const int64_t heads = int64_t{f.B} * f.H;
  const int64_t grid = std::min<int64_t>(heads, int64_t{kHeadCtas<kWarps, DP>} * device.sms);
  return launch_grid(forward_head_kernel<T, DP, kWarps, kForm, kGlobal>, grid, 32 * kWarps, kBytes,
                     stream, p);
}

// The instance for a form and the padded head dim: by the runs of the longer side.
template <typename T, int DP, HeadForm kForm>
cudaError_t launch_forward_head(const HeadParams& p, const Device& device, cudaStream_t stream) {
  const int runs = (std::max(p.fine.rows, p.fine.M) + kRun - 1) / kRun;
  if (runs > kHeadRuns) return cudaErrorNotSupported;
  const auto launch = [&](auto warps) {
    if constexpr (kForm == HeadForm::state) {
      if (p.global) return launch_head<T, DP, warps(), kForm, true>(p, device, stream);
    }
    return launch_head<T, DP, warps(), kForm, false>(p, device, stream);
  };
  if constexpr (kForm == HeadForm::state) {
    if (runs <= 4) return launch(std::integral_constant<int, 4>{});
  }
  if (runs <= 8) return launch(std::integral_constant<int, 8>{});
  return launch(std::integral_constant<int, 16>{});
}

}  // namespace mra::cuda::sm90
