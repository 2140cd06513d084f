// Shapes, dtypes and strides of the operators' results, from shapes alone. SymInt clean: sizes may
// be symbols while torch.compile or torch.export traces.
#include <ATen/ATen.h>
#include <c10/core/SymFloat.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "common/allocate.h"
#include "common/checks.h"
#include "common/levels.h"

namespace mra {
namespace {

using c10::SymInt;

SymInt ceil_div(const SymInt& a, int64_t b) { return (a + (b - 1)) / b; }

// ceil(factor * n)
SymInt ceil_of(double factor, const SymInt& n) {
  if (const auto known = n.maybe_as_int()) {
    return static_cast<int64_t>(std::ceil(factor * static_cast<double>(*known)));
  }
  const c10::SymFloat product = c10::SymFloat(factor) * c10::SymFloat(n);
  return SymInt(product.toSymNodeImpl()->ceil());
}

// row_capacity of common/budget.h. A density above 0 of one block or more is at least one:
// said again here, by max(1), torch.export could not prove it.
SymInt capacity(const CallOptions& call, const Options& o, const SymInt& nk) {
  SymInt m = call.blocks_per_row ? *call.blocks_per_row : ceil_of(*o.density, nk);
  if (call.is_causal) m = m.max(std::max<int64_t>(1, call.block_q / call.block_k));
  return nk.min(m);
}

// Blocks of all resolutions: common/levels.h.
SymInt all_blocks(const SymInt& length, int64_t block, const Options& o) {
  SymInt n = ceil_div(length, block);
  for (const Level& level : o.levels) n = n + ceil_div(length, level.block);
  return n;
}

// plan_capacity of common/levels.h, or nq * row_capacity: entries of a head's row lists.
SymInt all_capacity(const CallOptions& call, const Options& o, const SymInt& N, const SymInt& M) {
  SymInt total = 0;
  std::optional<SymInt> parents;  // room of a row one resolution up
  int64_t above = 0;
  const auto within = [&](const SymInt& room, int64_t block_k) {
    return parents ? room.min(*parents * (above / block_k)) : room;
  };
  for (const Level& level : o.levels) {
    parents = within(ceil_div(M, level.block).min(level_capacity(o, level)), level.block);
    above = level.block;
    total = total + ceil_div(N, level.block) * *parents;
  }
  const SymInt nk = ceil_div(M, call.block_k);
  return ceil_div(N, call.block_q) * within(capacity(call, o, nk), call.block_k) + total;
}

Tensor empty(c10::SymIntArrayRef shape, const Tensor& like, c10::ScalarType dtype) {
  return at::empty_symint(shape, like.options().dtype(dtype).layout(c10::kStrided));
}

c10::ScalarType acc_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::tuple<Tensor, Tensor, Tensor> empty_plan(const Tensor& query, const Tensor& key,
                                              const CallOptions& call, const Options& o) {
  const SymInt B = query.sym_size(0), H = query.sym_size(1);
  const SymInt nq = all_blocks(query.sym_size(2), o.block_q, o);
  const SymInt capacity = all_capacity(call, o, query.sym_size(2), key.sym_size(2));
  return {empty({B, H, nq}, query, at::kInt), empty({B, H, nq}, query, at::kInt),
          empty({B, H, capacity}, query, at::kInt)};
}

std::tuple<Tensor, Tensor> pool(const Tensor& input, const OptTensor& mask, int64_t block) {
  check_pool(input, mask, block);
  const SymInt n = ceil_div(input.sym_size(2), block);
  return {
      empty({input.sym_size(0), input.sym_size(1), n, input.sym_size(3)}, input, acc_dtype(input)),
      empty({input.sym_size(0), n}, input, at::kInt)};
}

std::tuple<Tensor, Tensor, Tensor> plan(
    const Tensor& query, const Tensor& key, const OptTensor& key_mask, const OptTensor& query_mask,
    std::optional<SymInt> blocks_per_row, OptDensity density, int64_t block_q, int64_t block_k,
    std::string_view selection, int64_t diagonal_blocks, int64_t first_blocks, bool is_causal,
    std::optional<double> scale, at::OptionalIntArrayRef levels, std::string_view pool) {
  const CallOptions call{blocks_per_row,
                         density,
                         block_q,
                         block_k,
                         plan_coarse(pool),
                         0,
                         selection,
                         diagonal_blocks,
                         first_blocks,
                         is_causal,
                         scale,
                         levels,
                         pool};
  const Options o = check_plan(query, key, key_mask, query_mask, call);
  return empty_plan(query, key, call, o);
}

ForwardResult forward(const Tensor& query, const Tensor& key, const Tensor& value,
                      const OptTensor& key_mask, const OptTensor& query_mask,
                      const OptTensor& row_start, const OptTensor& row_count,
                      const OptTensor& row_index, std::optional<SymInt> blocks_per_row,
                      OptDensity density, int64_t block_q, int64_t block_k, std::string_view coarse,
                      int64_t order, std::string_view selection, int64_t diagonal_blocks,
                      int64_t first_blocks, bool is_causal, std::optional<double> scale,
                      at::OptionalIntArrayRef levels, std::string_view pool, bool keep) {
  const CallOptions call{
      blocks_per_row,  density,      block_q,   block_k, coarse, order, selection,
      diagonal_blocks, first_blocks, is_causal, scale,   levels, pool,  keep};
  const PlanTensors plan{row_start, row_count, row_index};
  const Options o = check_forward({query, key, value, key_mask, query_mask}, plan, call);
  const SymInt B = query.sym_size(0), H = query.sym_size(1), N = query.sym_size(2);
  const auto acc = acc_dtype(query);
  const Tensor out =
      empty({B, N, H, query.sym_size(3)}, query, query.scalar_type()).transpose(1, 2);
  const Tensor lse = empty({B, H, N}, query, acc);
  const auto shares = [&] {
    if (!has_order1(o)) return empty({0}, query, acc);
    if (o.levels.empty()) return empty({B, H, N}, query, acc);
    return empty({B, H, SymInt(o.levels.size() + 1), N}, query, acc);
  };
  const SymInt Hk = key.sym_size(1), D = query.sym_size(3);
  const SymInt nq = all_blocks(N, o.block_q, o), nk = all_blocks(key.sym_size(2), o.block_k, o);
  const auto ints = [&](bool there, SymInt n) {
    return there ? empty({B, n}, query, at::kInt) : empty({0}, query, at::kInt);
  };
  const auto means = [&](bool there, SymInt heads, SymInt n) {
    return there ? empty({B, heads, n, D}, query, acc) : empty({0}, query, acc);
  };
  const bool keys = o.keep && keeps_means(o), queries = o.keep && o.coarse == Coarse::block;
  const bool weighted = o.keep && keeps_weights(o);
  const auto floats = [&](SymInt n) {
    return weighted ? empty({B, Hk, n}, query, acc) : empty({0}, query, acc);
  };
  const auto none = [&] { return empty({0}, query, at::kInt); };
  const auto moments = [&] {
    const auto dtype = moments_type(query.scalar_type());
    const SymInt P = moments_dim(query.sym_size(3).guard_int(__FILE__, __LINE__));
    return o.keep && keeps_moments(o) ? empty({B, Hk, 2, P, P}, query, dtype)
                                      : empty({0}, query, dtype);
  };
  auto [start, count, index] =
      plan.given() ? std::tuple(none(), none(), none()) : empty_plan(query, key, call, o);
  return {out,
          lse,
          shares(),
          start,
          count,
          index,
          means(queries, H, nq),
          means(keys, Hk, nk),
          means(keys, Hk, nk),
          ints(queries || weighted, nq),
          ints(keys, nk),
          moments(),
          weighted && o.causal ? empty({B, Hk, nq + 1, D}, query, acc) : floats(D),
          floats(nk * o.block_k),
          floats(nk)};
}

BackwardResult backward(const Tensor& grad_out, const OptTensor& grad_lse, const Tensor& query,
                        const Tensor& key, const Tensor& value, const OptTensor& key_mask,
                        const OptTensor& query_mask, const Tensor& out, const Tensor& lse,
                        const Tensor& coarse_share, const Tensor& row_start,
                        const Tensor& row_count, const Tensor& row_index, int64_t block_q,
                        int64_t block_k, std::string_view coarse, int64_t order, bool is_causal,
                        std::optional<double> scale, const OptTensor& query_mean,
                        const OptTensor& key_mean, const OptTensor& value_mean,
                        const OptTensor& query_count, const OptTensor& key_count,
                        const OptTensor& moments, const OptTensor& query_centre,
                        const OptTensor& key_weights, const OptTensor& block_mass,
                        at::OptionalIntArrayRef levels, std::string_view pool) {
  check_backward(grad_out, grad_lse, {query, key, value, key_mask, query_mask}, out, lse,
                 coarse_share, {row_start, row_count, row_index},
                 {query_mean, key_mean, value_mean, query_count, key_count, moments, query_centre,
                  key_weights, block_mass},
                 {std::nullopt, std::nullopt, block_q, block_k, coarse, order, "row", 0, 0,
                  is_causal, scale, levels, pool});
  const auto like = [](const Tensor& x) {
    if (grad_lies_alike(x)) {
      return at::empty_strided_symint(x.sym_sizes(), x.sym_strides(), x.options());
    }
    return empty({x.sym_size(0), x.sym_size(2), x.sym_size(1), x.sym_size(3)}, x, x.scalar_type())
        .transpose(1, 2);
  };
  return {like(query), like(key), like(value)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mra_attention, Meta, m) {
  m.impl("pool", pool);
  m.impl("plan", plan);
  m.impl("forward", forward);
  m.impl("backward", backward);
}

}  // namespace mra
