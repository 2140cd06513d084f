// A forward of short heads in one launch: persistent blocks of threads, each of which takes heads
// whole. Queries, keys and values of a head arrive by bulk copies and are read once from memory;
// warp x pools block x of each, makes the row of scores of query block x, selects, and attends the
// 32 rows of that block to what it has selected.
#pragma once

#include "../sm80/softmax.cuh"
#include "head_stages.cuh"
#include "tma.cuh"

namespace mra::cuda::sm90 {

struct HeadMaps : HeadParams {
  CUtensorMap q_map, k_map, v_map;
};

template <typename T, int kWarps, bool kGlobal>
__global__ void __launch_bounds__(32 * kWarps, 16 / kWarps)
    forward_head_kernel(const __grid_constant__ HeadMaps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = HeadShared<kWarps>;
  constexpr int kRows = Shared::kRows, kCopy = kRows < 256 ? kRows : 256;
  extern __shared__ char raw[];
  Shared& s = aligned<Shared>(raw);
  const ForwardParams& f = p.fine;
  const PlanParams& plan = p.plan;
  const int lane = threadIdx.x % 32, x = warp_index(), heads = f.B * f.H;
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : s.full) barrier_init(&barrier, 1);
    barrier_init_done();
    s.queries_read = 0;
  }
  __syncthreads();

  const auto fetch = [&](int which, const CUtensorMap& map, uint16_t(&to)[kRows][64], int h,
                         int b) {
    barrier_expect(&s.full[which], sizeof(to));
    if (lane != 0) return;
    for (int r = 0; r < kRows; r += kCopy) copy_panel(to[r], map, &s.full[which], 0, r, h, b);
  };
  const auto fetch_queries = [&](int item) {
    if (item < heads) fetch(0, p.q_map, s.in.q, item % f.H, item / f.H);
  };
  const auto fetch_keys = [&](int item) {
    if (item >= heads) return;
    const int b = item / f.H, hk = item % f.H / (f.H / f.Hk);
    fetch(1, p.k_map, s.in.k, hk, b);
    fetch(2, p.v_map, s.in.v, hk, b);
  };
  if (x == 0) {
    fetch_queries(blockIdx.x);
    fetch_keys(blockIdx.x);
  }

  const PanelLane panel;
  const int first = kHeadBlock * x;  // row and key of this warp's blocks
  const int rows = min(kHeadBlock, f.rows - first), keys = min(kHeadBlock, f.M - first);
#pragma unroll 1
  for (int item = blockIdx.x, phase = 0; item < heads; item += gridDim.x, phase ^= 1) {
    const int b = item / f.H, h = item - b * f.H, hk = h / (f.H / f.Hk);
    const int64_t key_head = int64_t{b} * f.Hk + hk;
    // One of the query heads that share it writes what belongs to a key head.
    const bool writes_keys = p.coarse && h % (f.H / f.Hk) == 0;
    const auto mean_of = [&](float* means, bool writes, int64_t head, int blocks) {
      return writes ? means + (head * blocks + x) * f.D : nullptr;
    };

    // pool
    barrier_wait(&s.full[0], phase);
    uint32_t rows_there = 0;
    if (x < plan.nq) {
      rows_there = pool_block<T>(s.in.q + first, rows,
                                 f.row_mask ? f.row_mask + int64_t{b} * f.rows + first : nullptr,
                                 s.q_mean[x], mean_of(p.q_mean, p.coarse, item, plan.nq), f.D);
      if (p.coarse && h == 0 && lane == 0) p.q_count[b * plan.nq + x] = __popc(rows_there);
    }
    barrier_wait(&s.full[1], phase);
    const uint8_t* const key_mask = f.key_mask ? f.key_mask + int64_t{b} * f.M + first : nullptr;
    if (x < plan.nk) {
      const uint32_t there = pool_block<T>(s.in.k + first, keys, key_mask, s.k_mean[x],
                                           mean_of(p.k_mean, writes_keys, key_head, plan.nk), f.D);
      if (lane == 0) s.keys_there[x] = there;
      if (p.coarse && h == 0 && lane == 0) p.k_count[b * plan.nk + x] = __popc(there);
    }
    if (threadIdx.x < kTiers) s.pairs[threadIdx.x] = 0;
    __syncthreads();

    // plan
    const bool exists = rows_there != 0 && lane < plan.nk && s.keys_there[lane % kWarps] != 0;
    const uint32_t key =
        exists ? score_key(s.q_mean[x], s.k_mean[lane % kWarps], plan.scale) : kAbsent;
    const uint32_t taken = select_blocks<kGlobal>(p, s, item, x, key);

    // coarse
    barrier_wait(&s.full[2], phase);
    if (p.coarse && x < plan.nk) {
      pool_block<T>(s.in.v + first, keys, key_mask, s.v_mean[x],
                    mean_of(p.v_mean, writes_keys, key_head, plan.nk), f.D);
    }
    if (p.coarse) {
      __syncthreads();
      make_state(s, x, plan.nk, key, exists && !(taken >> lane & 1));
    }
    if (p.coarse && kGlobal) {
      __syncthreads();
    } else {
      __syncwarp();
    }

    // fine: 16 rows of this warp's block, 16 of another one
    const int other = kGlobal ? evened_out(s.taken, plan.nq, x) : x;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int block = half == 0 ? x : other, row = kHeadBlock * block + 16 * half;
      typename Mma<T>::A q[4];
      load_rows<T>(q, reinterpret_cast<const uint16_t(&)[1][kRows][64]>(s.in.q), row, panel);
      // The next queries come as soon as every warp has its last rows in registers.
      if (half == 1 && last_to_leave(s.queries_read, kWarps)) fetch_queries(item + gridDim.x);
      if (x < plan.nq) {
        OnlineSoftmax<T, 64, false> softmax;
        softmax.start(p.coarse ? s.state_mean[block] : nullptr, &s.state_lse[block], 64);
#pragma unroll 1
        for (uint32_t left = kGlobal && half == 1 ? s.taken[block] : taken; left != 0;
             left &= left - 1) {
          const int y = __ffs(left) - 1;
          const auto keys_of = [&](auto& from) -> const uint16_t(&)[1][kHeadBlock][64] {
            return reinterpret_cast<const uint16_t(&)[1][kHeadBlock][64]>(from[kHeadBlock * y]);
          };
          float c[4][4] = {};
          multiply_nt<T>(c, q, keys_of(s.in.k), panel);
          float scale = f.scale * kLog2e;
          const uint32_t there = s.keys_there[y];
          if (there != kFullWarp) {
            to_logits(c, there, scale);
            scale = 1.f;
          }
          softmax.update(c, scale);
          multiply_pn<T>(softmax.acc, c, keys_of(s.in.v), panel);
        }
        float share[2];
        softmax.finish(f, b, h, row, min(16, f.rows - row), share);
        store_rows<T>(static_cast<T*>(f.out) + b * f.out_strides.b + h * f.out_strides.h +
                          row * f.out_strides.l,
                      f.out_strides.l, min(16, f.rows - row), f.D, softmax.acc);
      }
    }
    __syncthreads();
    if (x == 0) fetch_keys(item + gridDim.x);
  }
#endif
}

template <typename T>
cudaError_t launch_forward_head(const HeadParams& params, const Device& device,
                                cudaStream_t stream) {
  const ForwardParams& f = params.fine;
  const int blocks = std::max(params.plan.nq, params.plan.nk);
  const auto launch = [&](auto warps) {
    constexpr int kWarps = warps(), kRows = HeadShared<kWarps>::kRows;
    HeadMaps p{params};
    constexpr int kCopy = kRows < 256 ? kRows : 256;
    const bool maps =
        tensor_map(&p.q_map, kDtype<T>, f.q, f.q_strides, f.B, f.H, f.rows, f.D, kCopy) &&
        tensor_map(&p.k_map, kDtype<T>, f.k, f.k_strides, f.B, f.Hk, f.M, f.D, kCopy) &&
        tensor_map(&p.v_map, kDtype<T>, f.v, f.v_strides, f.B, f.Hk, f.M, f.D, kCopy);
    const size_t bytes = sizeof(HeadShared<kWarps>) + 1024;
    if (!maps || bytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
    const int64_t heads = int64_t{f.B} * f.H;
    const int64_t grid = std::min<int64_t>(heads, int64_t{16 / kWarps} * device.sms);
    const auto kernel =
        p.global ? forward_head_kernel<T, kWarps, true> : forward_head_kernel<T, kWarps, false>;
    return launch_grid(kernel, grid, 32 * kWarps, bytes, stream, p);
  };
  if (blocks <= 4) return launch(std::integral_constant<int, 4>{});
  if (blocks <= 8) return launch(std::integral_constant<int, 8>{});
  if (blocks <= kHeadBlocks) return launch(std::integral_constant<int, 16>{});
  return cudaErrorNotSupported;
}

}  // namespace mra::cuda::sm90
