// What the operators return: results of the stages with empty tensors for what isn't there, and
// those of calls without a query.
#pragma once

#include <ATen/ops/zeros.h>

#include "allocate.h"
#include "budget.h"
#include "checks.h"
#include "levels.h"

namespace mra {

// Room for the row lists of a head.
inline int64_t head_capacity(const Options& o, int64_t N, int64_t nk) {
  if (!o.levels.empty()) return plan_capacity(o, o.resolutions);
  return ceil_div(N, o.block_q) * row_capacity(o, nk);
}

// Moments as the operator gives them.
inline Tensor kept_moments(const Tensor& made, at::ScalarType type) {
  const int64_t D = made.size(3), P = moments_dim(D);
  if (made.scalar_type() == moments_type(type) && D == P) return made;
  const Tensor kept =
      at::zeros({made.size(0), made.size(1), 2, P, P}, made.options().dtype(moments_type(type)));
  kept.narrow(3, 0, D).narrow(4, 0, D).copy_(made);
  return kept;
}

// The operator's results, with empty tensors for what isn't there. Backward reads the means of
// queries for coarse = block alone.
inline ForwardResult forward_result(const Tensor& out, const Tensor& lse, const Tensor& share,
                                    const BlockList& rows, const PooledInputs& means,
                                    const Options& o) {
  const auto acc = [&](const Tensor& x) {
    return x.defined() ? x : nothing_like(lse, lse.scalar_type());
  };
  const auto ints = [&](const Tensor& x) { return x.defined() ? x : nothing_like(lse, at::kInt); };
  const bool queries = o.coarse == Coarse::block;
  return {out,
          lse,
          acc(share),
          ints(rows.start),
          ints(rows.count),
          ints(rows.index),
          acc(queries ? means.query : Tensor()),
          acc(means.key),
          acc(means.value),
          ints(queries || keeps_weights(o) ? means.query_count : Tensor()),
          ints(means.key_count),
          means.moments.defined() && keeps_moments(o)
              ? means.moments
              : nothing_like(lse, moments_type(out.scalar_type())),
          acc(means.centre),
          acc(means.weights),
          acc(means.mass)};
}

// Lists of a plan without a row: no batch, or no query.
inline BlockList empty_plan(const Tensor& query, int64_t nk, const Options& o) {
  const int64_t B = query.size(0), H = query.size(1), N = query.size(2);
  const int64_t nq = o.levels.empty() ? ceil_div(N, o.block_q) : all_query_blocks(o.resolutions);
  const auto ints = query.options().dtype(at::kInt);
  const Tensor rows = at::zeros({B, H, nq}, ints);
  return {rows, rows.clone(), at::zeros({B, H, head_capacity(o, N, nk)}, ints)};
}

inline ForwardResult empty_forward(const Inputs& in, const PlanTensors& plan, const Options& o) {
  const int64_t B = in.query.size(0), H = in.query.size(1), N = in.query.size(2);
  const auto acc = in.query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor out = at::zeros({B, N, H, in.query.size(3)}, in.query.options()).transpose(1, 2);
  const Tensor lse = at::zeros({B, H, N}, in.query.options().dtype(acc));
  const int64_t levels = o.levels.empty() ? 0 : o.levels.size() + 1;
  Tensor share = has_order1(o) ? lse.clone() : Tensor();
  if (has_order1(o) && levels > 0) share = at::zeros({B, H, levels, N}, lse.options());
  const int64_t finest_k = ceil_div(in.key.size(2), o.block_k);
  const int64_t nq = levels > 0 ? all_query_blocks(o.resolutions) : ceil_div(N, o.block_q);
  const int64_t nk = levels > 0 ? all_key_blocks(o.resolutions) : finest_k;
  const auto zeros = [&](int64_t heads, int64_t n) {
    return at::zeros({B, heads, n, in.query.size(3)}, lse.options());
  };
  const auto counts = [&](int64_t n) { return at::zeros({B, n}, lse.options().dtype(at::kInt)); };
  PooledInputs means;
  if (o.keep && keeps_means(o)) {
    const int64_t Hk = in.key.size(1);
    means = {zeros(H, nq), zeros(Hk, nk), zeros(Hk, nk), counts(nk), counts(nq), {}};
    if (keeps_weights(o)) {
      const int64_t D = in.query.size(3);
      means.centre = o.causal ? at::zeros({B, Hk, nq + 1, D}, lse.options())
                              : at::zeros({B, Hk, D}, lse.options());
      means.weights = at::zeros({B, Hk, nk * o.block_k}, lse.options());
      means.mass = at::zeros({B, Hk, nk}, lse.options());
    }
    if (keeps_moments(o)) {
      const int64_t P = moments_dim(in.query.size(3));
      means.moments =
          at::zeros({B, Hk, 2, P, P}, lse.options().dtype(moments_type(in.query.scalar_type())));
    }
  }
  return forward_result(out, lse, share,
                        plan.given() ? BlockList{} : empty_plan(in.query, finest_k, o), means, o);
}

}  // namespace mra
