#include "coarse.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../common/budget.h"
#include "delta.h"
#include "problem.h"

namespace mra::cuda {

CoarseState coarse(const PooledInputs& in, const BlockList& rows, const Options& o) {
  const Launch launch(in.query);
  ForwardParams p{};
  fill(p, in, rows, o);
  CoarseState state{at::empty_like(in.query), at::empty({p.B, p.H, p.rows}, in.query.options())};
  p.out = state.mean.mutable_data_ptr();
  p.out_strides = strides_of(state.mean);
  p.lse = state.lse.mutable_data_ptr<float>();
  launch.check(forward(p, Dtype::f32, launch.device, launch.stream));
  return state;
}

Grads coarse_backward(const PooledInputs& in, const BlockList& rows, const BlockList& columns,
                      const BlockRows& back, const Options& o) {
  const Launch launch(in.query);
  BackwardParams p{};
  fill(p, in, rows, o);
  p.column_lists = lists_of(columns);
  p.grad_out = back.grad.const_data_ptr();
  p.grad_out_strides = strides_of(back.grad);
  const Tensor lse2 = at::empty_like(back.lse);
  RowSumsParams sums{};
  sums.lse = back.lse.const_data_ptr<float>();
  sums.lse2 = lse2.mutable_data_ptr<float>();
  sums.heads = 1;
  sums.rows = lse2.numel();
  sums.chunks = ceil_div(sums.rows, 32);
  launch.check(row_sums(sums, launch.stream));
  p.lse2 = lse2.const_data_ptr<float>();
  p.delta = p.pooled_delta = back.delta.const_data_ptr<float>();

  const Tensor grad_query = at::empty_like(in.query);
  p.grad_q = grad_query.mutable_data_ptr();
  p.grad_q_strides = strides_of(grad_query);
  p.row_count = in.query_count.const_data_ptr<int>();
  launch.check(backward_rows(p, Dtype::f32, launch.device, launch.stream));
  const Tensor shares = pooled_shares(p, Dtype::f32, launch, in.query);
  return {grad_query, shares[0], shares[1]};
}

}  // namespace mra::cuda
