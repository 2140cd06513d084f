#include "fine.h"

#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <climits>

#include "../common/budget.h"
#include "centred_grads.h"
#include "delta.h"
#include "level_stages.h"
#include "moments.h"
#include "pooled_keys.h"
#include "problem.h"

namespace mra::cuda {
namespace {

// For Hopper's columns; undefined where a block of threads gets so many items that order matters
// little.
Tensor order_columns(BackwardParams& p, ColumnOrder& c, const BlockList& columns,
                     const Device& device) {
  constexpr int64_t kFew = 128;                           // lists of items, a multiprocessor
  const int64_t keys = std::min<int64_t>(p.block_k, 64);  // of an item
  const int64_t items = ceil_div(p.M, keys), all = items * p.B * p.Hk, group = p.H / p.Hk;
  if (device.major != 9 || keys < 32 || all * group > kFew * device.sms) return {};
  c.count = p.column_lists.count;
  c.lists = p.column_lists.lists;
  c.group = static_cast<int>(group);
  c.items = static_cast<int>(items);
  c.all = static_cast<int>(all);
  c.items_block = static_cast<int>(p.block_k / keys);
  const int64_t mean = std::max<int64_t>(ceil_div(group * p.column_lists.capacity, c.lists), 1);
  const bool long_lists = mean >= ColumnOrder::kLongLists * group;
  const int64_t above[] = {
      8 * mean, 4 * mean, 2 * mean, long_lists ? 7 * mean / 8 : -1, long_lists ? 5 * mean / 8 : -1,
      -1};
  std::transform(std::begin(above), std::end(above), c.above,
                 [](int64_t n) { return static_cast<int>(std::min<int64_t>(n, INT_MAX)); });
  const Tensor order = allocate({all}, columns.count.options());
  p.order = c.order = order.mutable_data_ptr<int>();
  return order;
}

// What the kernels read of each row, into `p`.
struct RowSums {
  Tensor lse2, pooled_lse2, sums, pooled_sums, order;

  // pooled_delta: of pooled keys; with levels, of those of the coarsest resolution.
  RowSums(BackwardParams& p, const FineBackward& back, const Tensor& pooled_delta,
          const Tensor& row_bias, const BlockList& columns, bool levels, const Launch& launch)
      : lse2(allocate_like(back.lse)),
        pooled_lse2(row_bias.defined() ? allocate_like(lse2) : lse2) {
    const bool bulk = launch.device.major == 9 && back.grad_out.scalar_type() != at::kFloat;
    const bool same = !row_bias.defined() && pooled_delta.is_same(back.delta);
    RowSumsParams r{};
    r.heads = int64_t{p.B} * p.H;
    r.rows = p.rows;
    r.chunks = sum_chunks(r.rows);
    if (bulk) sums = allocate({r.heads, r.chunks, 2, 32}, back.lse.options());
    pooled_sums = bulk && !same ? allocate_like(sums) : sums;
    r.lse = back.lse.const_data_ptr<float>();
    r.delta = p.delta = back.delta.const_data_ptr<float>();
    r.pooled_delta = p.pooled_delta = pooled_delta.const_data_ptr<float>();
    r.row_bias = data_of<float>(row_bias);
    p.lse2 = r.lse2 = data_of<float>(lse2);
    p.pooled_lse2 = r.pooled_lse2 = data_of<float>(pooled_lse2);
    p.sums = r.sums = data_of<float>(sums);
    p.pooled_sums = data_of<float>(pooled_sums);
    if (!same) r.pooled_sums = data_of<float>(pooled_sums);
    // What comes before it, under coarse = block, is coarse_backward; else order 1, and perhaps the
    // rounding of pooled keys.
    r.beside =
        launch.device.major == 9 && !levels && (back.query_block.defined() || back.held.defined());
    if (bulk) order = order_columns(p, r.columns, columns, launch.device);
    launch.check(row_sums(r, launch.stream));
  }
};

// Sums of the gradients of each row's pooled logits, where they are asked for: made by the kernel
// of the pooled keys' gradients, a part for each 64 of them, or else by that of the rows.
struct CoarseSums {
  Tensor parts;

  CoarseSums(BackwardParams& p, const FineBackward& back) : parts(back.coarse_sum) {
    const int64_t count = ceil_div(p.nk, 64);
    if (parts.defined() && count > 1) {
      parts = count <= kMaxParts ? allocate({count, p.B, p.H, p.rows}, parts.options()) : Tensor();
    }
    p.coarse_sum = data_of<float>(parts);
  }
  // Behind the kernel of the pooled keys: whether it made them. If not, that of the rows will.
  bool add_up(BackwardParams& p, const FineBackward& back) const {
    const bool made = p.coarse_sum != nullptr;
    Tensor sums = back.coarse_sum;
    if (made && parts.dim() == 4) at::sum_out(sums, parts, 0);
    p.coarse_sum = made ? nullptr : data_of<float>(sums);
    return made;
  }

 private:
  static constexpr int64_t kMaxParts = 16;  // of memory: 4 bytes of each a row
};

}  // namespace

FineResult fine(const Inputs& in, const BlockList& rows, const std::optional<CoarseState>& state,
                const std::optional<PooledInputs>& pooled, const Tensor& moments,
                const Options& o) {
  const Launch launch(in.query);
  const PooledKeys keys(pooled, in, o, launch);
  // With levels: exact attention first, or from the state of the coarse part.
  const bool levels = !o.levels.empty(), cells = levels && pooled;
  const BlockList exact = levels ? rows_of(rows, o.resolutions[0]) : rows;
  ForwardParams p{};
  fill(p, in, exact, cells ? Tensor() : keys.key, cells ? Tensor() : keys.value, keys.count, o);
  p.pooled_mass = data_of<float>(keys.mass);
  p.row_bias = data_of<float>(keys.row_bias);

  FineResult r;
  const auto acc = in.query.options().dtype(at::kFloat);
  r.out = empty_heads_last(in.query);
  r.lse = allocate({p.B, p.H, p.rows}, acc);
  if (has_order1(o)) {
    const auto count = static_cast<int64_t>(o.resolutions.size());
    r.share = cells ? allocate({p.B, p.H, count, p.rows}, acc) : allocate({p.B, p.H, p.rows}, acc);
  }
  if (state) {
    p.state_mean = state->mean.const_data_ptr<float>();
    p.state_lse = state->lse.const_data_ptr<float>();
  }
  p.out = r.out.mutable_data_ptr();
  p.out_strides = strides_of(r.out);
  p.lse = data_of<float>(r.lse);
  if (!cells) p.share = data_of<float>(r.share);
  FineMoments multiplied;
  if (moments.defined() && order1_in_fine(in.key, o, launch)) {
    if (pooled && pooled->fine_moments.defined()) {
      multiplied = {pooled->fine_moments, pooled->moment_scales};
    } else {
      multiplied = fine_moments(moments, in.key, launch);
    }
    p.moments = const_bytes_of(multiplied.matrices);
    p.moment_scales = data_of<float>(multiplied.scales);
  }
  if (p.moments != nullptr && pooled) {
    p.centre = data_of<float>(pooled->centre);
    p.centre_term = data_of<float>(pooled->centre_term);
  }
  if (pooled && pooled->term.defined()) {
    p.term = pooled->term.const_data_ptr();
    p.term_strides = strides_of(pooled->term);
  }
  // A plan that was given comes without one.
  Tensor queue = rows.queues;
  if (!queue.defined() && launch.device.major == 9 && in.query.scalar_type() != at::kFloat) {
    queue = at::zeros({1}, rows.index.options());
  }
  p.queue = reinterpret_cast<unsigned*>(data_of<int>(queue));
  cudaError_t error = forward(p, dtype_of(in.query), launch.device, launch.stream);
  Tensor row_bias;
  if (error == cudaErrorNotSupported && p.centre != nullptr) {
    row_bias = centred_row_bias(in, *pooled, o);
    p.row_bias = data_of<float>(row_bias);
    p.centre = p.centre_term = nullptr;
    error = forward(p, dtype_of(in.query), launch.device, launch.stream);
  }
  launch.check(error);
  r.order1 = p.moments != nullptr || p.term != nullptr;
  if (cells) {
    cells_forward(p, keys.key, keys.value, r.share, levels_of(rows, keys.count, o),
                  dtype_of(in.query), launch);
  } else if (levels && r.share.defined()) {
    r.share = split_shares(r.share, state->parts, o.block_q);
  }
  return r;
}

Grads fine_backward(const Inputs& in, const BlockList& rows, const BlockList& columns,
                    const std::optional<PooledInputs>& pooled, const FineBackward& back,
                    const Options& o) {
  const Launch launch(in.query);
  const Dtype dtype = dtype_of(in.query);
  // What pooled keys are to rows may be made already.
  const CoarseRows& coarse_rows = back.coarse_rows;
  const bool made_rows = coarse_rows.shares.defined();
  const PooledKeys keys(pooled, in, o, launch, launch.device.major == 9 && back.held.defined(),
                        !made_rows);
  const Tensor grad_out = with_aligned_rows(back.grad_out);
  const bool levels = !o.levels.empty(), cells = levels && pooled;
  const BlockList exact = levels ? rows_of(rows, o.resolutions[0]) : rows;
  BackwardParams p{};
  fill(p, in, exact, cells ? Tensor() : keys.key, cells ? Tensor() : keys.value, keys.count, o);
  p.pooled_mass = data_of<float>(keys.mass);
  p.column_lists = lists_of(columns);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_strides = strides_of(grad_out);
  Tensor pooled_delta = levels && !cells ? back.delta : back.coarse_delta;
  if (pooled_delta.dim() == 4) pooled_delta = pooled_delta.select(0, -1);
  const RowSums sums(p, back, pooled_delta, keys.row_bias, columns, levels, launch);
  back.held.reset();

  // Gradients that come from elsewhere lie as these do: the rest is added.
  const Grads g{back.query_extra.defined() ? back.query_extra : empty_query_grad(in),
                back.key_extra.defined() ? back.key_extra : empty_key_grad(in),
                back.value_extra.defined() ? back.value_extra : empty_value_grad(in)};
  // With weighted means the rows come last where they can: what every query of a head or block gets
  // of the centre then leaves with their gradients.
  const bool weighted = back.centred != nullptr;
  const CoarseSums coarse_sums(p, back);
  bool add_keys = back.key_extra.defined();
  Tensor key_block = back.key_block, value_block = back.value_block;
  Tensor shares = coarse_rows.shares, mass_grad = coarse_rows.mass_grad;
  if (made_rows) {
    add_keys = true;
  } else if (pooled) {
    shares = cells ? cells_columns(p, keys.key, keys.value, keys.count, back.coarse_delta, rows,
                                   columns, o, dtype, launch)
                   : pooled_shares(p, dtype, launch, in.query, weighted ? &mass_grad : nullptr);
    if (pooled->weights.defined()) {
      add_keys = true;
    } else {
      key_block = key_block.defined() ? key_block.add(shares[0]) : shares[0];
      value_block = value_block.defined() ? value_block.add(shares[1]) : shares[1];
    }
  }
  const bool made = coarse_sums.add_up(p, back);
  p.grad_q = g.query.mutable_data_ptr();
  p.grad_k = g.key.mutable_data_ptr();
  p.grad_v = g.value.mutable_data_ptr();
  p.grad_q_strides = strides_of(g.query);
  p.grad_k_strides = strides_of(g.key);
  p.grad_v_strides = strides_of(g.value);
  p.k_block = data_of<float>(key_block);
  p.v_block = data_of<float>(value_block);
  auto* const queues = reinterpret_cast<unsigned*>(data_of<int>(columns.queues));
  bool made_keys = false;
  const auto columns_with_order1 = [&](const sm90::Order1Keys& of_keys) {
    sm90::ColumnsOrder1 c{p, of_keys};
    if (weighted) {
      c.k_block = data_of<float>(shares);
      c.v_block = c.k_block + shares.numel() / 2;
    }
    c.queue = queues + 1;
    c.beside = !weighted;
    const cudaError_t error = backward_columns_order1(c, launch.device, launch.stream);
    if (error == cudaErrorNotSupported) return false;
    launch.check(error);
    return made_keys = true;
  };
  const bool rows_last = weighted && (made || made_rows || !has_order1(o));
  // What every query gets. `add`: g.query holds a part already.
  const auto through_weights = [&](bool add) {
    CentreGrads of_centre;
    if (has_order1(o)) {
      of_centre = centred_grads(g, shares, mass_grad, back, in, o, add, columns_with_order1);
    }
    return key_weights_grads(g, shares, mass_grad, of_centre, back, in, o);
  };
  const Tensor query_block = rows_last ? through_weights(false) : back.query_block;

  if (query_block.defined()) {
    p.q_block = query_block.const_data_ptr<float>();
    p.q_block_heads = static_cast<int>(query_block.size(1));
    p.q_block_lists = query_block.dim() == 4 ? static_cast<int>(query_block.size(2)) : 1;
  }
  p.queue = queues;
  p.add = back.query_extra.defined() || (rows_last && has_order1(o));
  if (cells) {
    cells_rows(p, keys.key, keys.value, back.coarse_delta, levels_of(rows, keys.count, o), dtype,
               launch);
    p.add = true;
  }
  // Made before the rows: nothing may be launched between them and what runs beside them.
  std::optional<Term> order1_of_keys;
  if (back.moment_grads.defined()) order1_of_keys.emplace(launch, in, *back.means, o);
  launch.check(backward_rows(p, dtype, launch.device, launch.stream));
  if (weighted && !rows_last) add_to_queries(g.query, through_weights(true), in, o);
  bool beside = !weighted || rows_last;
  if (order1_of_keys) {
    order1_key_grads(*order1_of_keys, back.moment_grads, nullptr, g, false, columns_with_order1);
    beside = false;
    add_keys = true;
  }
  if (made_keys) return g;
  p.queue = queues + 1;
  p.beside = launch.device.major == 9 && beside;
  p.add = add_keys;
  launch.check(backward_columns(p, dtype, launch.device, launch.stream));
  return g;
}

}  // namespace mra::cuda
