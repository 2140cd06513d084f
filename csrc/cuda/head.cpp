// All stages of a forward in one launch, where a block of threads can hold a whole head.
#include "head.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/budget.h"
#include "problem.h"

namespace mra::cuda {

#ifdef MRA_SM90A
namespace {

// nullopt where no kernel serves the call.
std::optional<HeadForm> form_of(const Inputs& in, const Options& o, const Launch& launch) {
  const int64_t longer = std::max(in.query.size(2), in.key.size(2));
  if (launch.device.major != 9 || in.query.scalar_type() == at::kFloat || o.causal ||
      in.query.size(3) > 64 || o.block_q != o.block_k || longer > 32 * sm90::kHeadRuns ||
      !(o.scale > 0)) {
    return std::nullopt;
  }
  const bool by_row = o.selection == Selection::row;
  if (o.block_q != 32 && (o.block_q != 64 || !by_row)) return std::nullopt;
  if (o.coarse != Coarse::row) {
    return has_order1(o) ? std::nullopt : std::optional(HeadForm::state);
  }
  if (!by_row) return std::nullopt;
  if (o.pool == Pool::even) return has_order1(o) ? HeadForm::order1 : HeadForm::row;
  // The mean query is that of all heads of a group.
  const bool own_keys = in.query.size(1) == in.key.size(1);
  if (!has_order1(o) || !own_keys) return std::nullopt;
  return o.pool == Pool::centred ? HeadForm::centred : HeadForm::sampled;
}

template <typename T, int DP>
cudaError_t launch_form(HeadForm form, const HeadParams& p, const Launch& launch) {
  const auto run = [&](auto constant) {
    return sm90::launch_forward_head<T, DP, constant()>(p, launch.device, launch.stream);
  };
  if (form == HeadForm::state) {
    return run(std::integral_constant<HeadForm, HeadForm::state>{});
  }
  if (form == HeadForm::row) return run(std::integral_constant<HeadForm, HeadForm::row>{});
  if (form == HeadForm::order1) return run(std::integral_constant<HeadForm, HeadForm::order1>{});
  if (form == HeadForm::centred) return run(std::integral_constant<HeadForm, HeadForm::centred>{});
  return run(std::integral_constant<HeadForm, HeadForm::sampled>{});
}

template <typename T>
cudaError_t launch_form(HeadForm form, const HeadParams& p, const Launch& launch) {
  return p.fine.D <= 32 ? launch_form<T, 32>(form, p, launch) : launch_form<T, 64>(form, p, launch);
}

}  // namespace
#endif

std::optional<HeadResult> forward_head(const Inputs& in, const Options& o) {
#ifdef MRA_SM90A
  const Launch launch(in.query);
  const std::optional<HeadForm> form = form_of(in, o, launch);
  if (!form) return std::nullopt;
  const int64_t B = in.query.size(0), H = in.query.size(1), N = in.query.size(2);
  const int64_t Hk = in.key.size(1), M = in.key.size(2), D = in.query.size(3);
  const int64_t nq = ceil_div(N, o.block_q), nk = ceil_div(M, o.block_k);
  const int64_t capacity = nq * row_capacity(o, nk);
  const auto acc = in.query.options().dtype(at::kFloat), ints = acc.dtype(at::kInt);
  HeadResult r;
  BlockList& rows = r.rows = {allocate({B, H, nq}, ints), allocate({B, H, nq}, ints),
                              allocate({B, H, capacity}, ints)};
  HeadParams p{};
  fill(p.fine, in, rows, {}, {}, {}, o);
  r.fine.out = empty_heads_last(in.query);
  r.fine.lse = allocate({B, H, N}, acc);
  p.fine.out = r.fine.out.mutable_data_ptr();
  p.fine.out_strides = strides_of(r.fine.out);
  p.fine.lse = r.fine.lse.mutable_data_ptr<float>();
  if (has_order1(o)) {
    r.fine.share = allocate({B, H, N}, acc);
    r.fine.order1 = true;
    p.fine.share = r.fine.share.mutable_data_ptr<float>();
  }

  p.plan = plan_params(B, H, Hk, nq, nk, D, N, o);
  p.plan.start = rows.start.mutable_data_ptr<int32_t>();
  p.plan.count = rows.count.mutable_data_ptr<int32_t>();
  p.plan.index = rows.index.mutable_data_ptr<int32_t>();
  p.global = o.selection == Selection::global;
  p.budget = p.global ? map_budget(o, N, nk) : 0;
  for (int h = 0; p.fine.by_head && h < H; ++h) {
    p.head_budget[h] = static_cast<uint8_t>(row_budget(o, N, nk, h, 0));
  }
  p.run_shift = log2_of(o.block_q / 32);

  // What backward reads again.
  p.coarse = o.coarse == Coarse::block;
  if (o.keep && keeps_means(o)) {
    if (p.coarse) r.pooled.query = allocate({B, H, nq, D}, acc);
    if (p.coarse || keeps_weights(o)) r.pooled.query_count = allocate({B, nq}, ints);
    if (keeps_weights(o)) {
      r.pooled.centre = allocate({B, Hk, D}, acc);
      r.pooled.weights = allocate({B, Hk, nk * o.block_k}, acc);
      r.pooled.mass = allocate({B, Hk, nk}, acc);
    }
    r.pooled.key = allocate({B, Hk, nk, D}, acc);
    r.pooled.value = allocate({B, Hk, nk, D}, acc);
    r.pooled.key_count = allocate({B, nk}, ints);
    if (keeps_moments(o)) {
      const int64_t P = moments_dim(D);
      r.pooled.moments =
          allocate({B, Hk, 2, P, P}, acc.dtype(moments_type(in.query.scalar_type())));
    }
  }
  p.q_mean = data_of<float>(r.pooled.query);
  p.k_mean = data_of<float>(r.pooled.key);
  p.v_mean = data_of<float>(r.pooled.value);
  p.q_count = data_of<int>(r.pooled.query_count);
  p.k_count = data_of<int>(r.pooled.key_count);
  if (r.pooled.moments.defined()) p.moments = r.pooled.moments.mutable_data_ptr();
  p.centre = data_of<float>(r.pooled.centre);
  p.weights = data_of<float>(r.pooled.weights);
  p.mass = data_of<float>(r.pooled.mass);
  const cudaError_t error = in.query.scalar_type() == at::kHalf
                                ? launch_form<__half>(*form, p, launch)
                                : launch_form<__nv_bfloat16>(*form, p, launch);
  if (error == cudaErrorNotSupported) return std::nullopt;
  launch.check(error);
  return r;
#else
  return std::nullopt;
#endif
}

}  // namespace mra::cuda
