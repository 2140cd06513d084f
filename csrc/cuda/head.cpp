// All stages of a forward in one launch, where a block of threads can hold a whole head.
#include "head.h"

#include <ATen/ops/empty.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/budget.h"
#include "problem.h"

namespace mra::cuda {

std::optional<HeadResult> forward_head(const Inputs& in, const Options& o) {
#ifdef MRA_SM90A
  const Launch launch(in.query);
  const int64_t B = in.query.size(0), H = in.query.size(1), N = in.query.size(2);
  const int64_t Hk = in.key.size(1), M = in.key.size(2), D = in.query.size(3);
  const int64_t nq = ceil_div(N, o.block_q), nk = ceil_div(M, o.block_k);
  if (launch.device.major != 9 || in.query.scalar_type() == at::kFloat || o.causal ||
      o.coarse == Coarse::row || has_order1(o) || o.block_q != 32 || o.block_k != 32 ||
      std::max(nq, nk) > sm90::kHeadBlocks || D <= 16 || D > 64 || !(o.scale > 0)) {
    return std::nullopt;
  }
  const int64_t capacity = nq * row_capacity(o, nk);
  const auto acc = in.query.options().dtype(at::kFloat), ints = acc.dtype(at::kInt);
  HeadResult r;
  BlockList& rows = r.rows = {at::empty({B, H, nq}, ints), at::empty({B, H, nq}, ints),
                              at::empty({B, H, capacity}, ints)};
  HeadParams p{};
  fill(p.fine, in, rows, {}, {}, {}, o);
  r.fine.out = empty_heads_last(in.query);
  r.fine.lse = at::empty({B, H, N}, acc);
  p.fine.out = r.fine.out.mutable_data_ptr();
  p.fine.out_strides = strides_of(r.fine.out);
  p.fine.lse = r.fine.lse.mutable_data_ptr<float>();

  p.plan = plan_params(B, H, Hk, nq, nk, D, N, o);
  p.plan.start = rows.start.mutable_data_ptr<int32_t>();
  p.plan.count = rows.count.mutable_data_ptr<int32_t>();
  p.plan.index = rows.index.mutable_data_ptr<int32_t>();
  p.global = o.selection == Selection::global;
  p.budget = p.global ? map_budget(o, N, nk) : row_budget(o, N, nk, 0);

  p.coarse = o.coarse == Coarse::block;
  if (p.coarse) {
    r.pooled = {at::empty({B, H, nq, D}, acc),  at::empty({B, Hk, nk, D}, acc),
                at::empty({B, Hk, nk, D}, acc), at::empty({B, nk}, ints),
                at::empty({B, nq}, ints),       {}};
    p.q_mean = r.pooled.query.mutable_data_ptr<float>();
    p.k_mean = r.pooled.key.mutable_data_ptr<float>();
    p.v_mean = r.pooled.value.mutable_data_ptr<float>();
    p.k_count = r.pooled.key_count.mutable_data_ptr<int32_t>();
    p.q_count = r.pooled.query_count.mutable_data_ptr<int32_t>();
  }
  const cudaError_t error =
      in.query.scalar_type() == at::kHalf
          ? sm90::launch_forward_head<__half>(p, launch.device, launch.stream)
          : sm90::launch_forward_head<__nv_bfloat16>(p, launch.device, launch.stream);
  if (error == cudaErrorNotSupported) return std::nullopt;
  launch.check(error);
  return r;
#else
  return std::nullopt;
#endif
}

}  // namespace mra::cuda
