#include "coarse.h"

#include "../common/budget.h"
#include "delta.h"
#include "level_stages.h"
#include "problem.h"

namespace mra::cuda {

namespace {

void fill(CoarseProblem& p, const PooledInputs& in, const BlockList& rows, const Options& o) {
  p.B = in.query.size(0);
  p.H = in.query.size(1);
  p.Hk = in.key.size(1);
  p.nq = in.query.size(2);
  p.nk = in.key.size(2);
  p.D = in.query.size(3);
  p.block_q = o.block_q;
  p.block_k = o.block_k;
  p.scale = o.scale;
  p.causal = o.causal;
  p.q_mean = in.query.const_data_ptr<float>();
  p.k_mean = in.key.const_data_ptr<float>();
  p.v_mean = in.value.const_data_ptr<float>();
  p.q_count = in.query_count.const_data_ptr<int>();
  p.k_count = in.key_count.const_data_ptr<int>();
  p.row_lists = lists_of(rows);
}

// By the attention kernels, in float32.
Grads attention_backward(const PooledInputs& in, const BlockList& rows, const BlockList& columns,
                         const BlockRows& back, const Options& o, const Launch& launch) {
  BackwardParams p{};
  fill(p, in, rows, o);
  p.column_lists = lists_of(columns);
  p.grad_out = back.grad.const_data_ptr();
  p.grad_out_strides = strides_of(back.grad);
  const Tensor lse2 = allocate_like(back.lse);
  RowSumsParams sums{};
  sums.lse = back.lse.const_data_ptr<float>();
  sums.lse2 = lse2.mutable_data_ptr<float>();
  sums.heads = 1;
  sums.rows = lse2.numel();
  sums.chunks = ceil_div(sums.rows, 32);
  launch.check(row_sums(sums, launch.stream));
  p.lse2 = p.pooled_lse2 = lse2.const_data_ptr<float>();
  p.delta = p.pooled_delta = back.delta.const_data_ptr<float>();

  const Tensor grad_query = allocate_like(in.query);
  p.grad_q = grad_query.mutable_data_ptr();
  p.grad_q_strides = strides_of(grad_query);
  p.row_count = in.query_count.const_data_ptr<int>();
  launch.check(backward_rows(p, Dtype::f32, launch.device, launch.stream));
  const Tensor shares = pooled_shares(p, Dtype::f32, launch, in.query);
  return {grad_query, shares[0], shares[1]};
}

}  // namespace

CoarseState coarse(const PooledInputs& in, const BlockList& rows, const Options& o) {
  if (!o.levels.empty()) return coarse_levels(in, rows, o);
  const Launch launch(in.query);
  const int64_t B = in.query.size(0), H = in.query.size(1), nq = in.query.size(2);
  CoarseState state{allocate_like(in.query), allocate({B, H, nq}, in.query.options())};
  if (at::isReducedFloatingType(in.type)) {
    CoarseForwardParams p{};
    fill(p, in, rows, o);
    p.mean = state.mean.mutable_data_ptr<float>();
    p.lse = state.lse.mutable_data_ptr<float>();
    const cudaError_t error = coarse_forward(p, launch.device, launch.stream);
    if (error != cudaErrorNotSupported) {
      launch.check(error);
      return state;
    }
  }
  ForwardParams p{};
  fill(p, in, rows, o);
  p.out = state.mean.mutable_data_ptr();
  p.out_strides = strides_of(state.mean);
  p.lse = state.lse.mutable_data_ptr<float>();
  launch.check(forward(p, Dtype::f32, launch.device, launch.stream));
  return state;
}

Grads coarse_backward(const PooledInputs& in, const BlockList& rows, const BlockList& columns,
                      const BlockRows& back, const Options& o) {
  if (!o.levels.empty()) return coarse_levels_backward(in, rows, columns, back, o);
  const Launch launch(in.query);
  if (!at::isReducedFloatingType(in.type)) {
    return attention_backward(in, rows, columns, back, o, launch);
  }
  const Grads grads{allocate_like(in.query), allocate_like(in.key), allocate_like(in.value)};
  CoarseBackwardParams p{};
  fill(p, in, rows, o);
  p.lse = back.lse.const_data_ptr<float>();
  p.grad_out = back.grad.const_data_ptr<float>();
  p.delta = back.delta.const_data_ptr<float>();
  p.column_lists = lists_of(columns);
  p.grad_q = grads.query.mutable_data_ptr<float>();
  p.grad_k = grads.key.mutable_data_ptr<float>();
  p.grad_v = grads.value.mutable_data_ptr<float>();
  const cudaError_t error = coarse_backward(p, launch.device, launch.stream);
  if (error == cudaErrorNotSupported) {
    return attention_backward(in, rows, columns, back, o, launch);
  }
  launch.check(error);
  return grads;
}

}  // namespace mra::cuda
