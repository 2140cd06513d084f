// MRA attention, in the order of the data, the same for every device:
//
//   pool (-> weigh keys) -> plan -> coarse -> fine (-> order 1)
//
// A device gives its `Stages`; the functions here are what the dispatcher calls.
#include <ATen/ATen.h>
#include <ATen/DeviceGuard.h>
#include <torch/library.h>

#include <cstdlib>
#include <limits>
#include <tuple>
#include <utility>

#include "common/allocate.h"
#include "common/budget.h"
#include "common/checks.h"
#include "common/levels.h"
#include "common/order1.h"
#include "common/results.h"

namespace mra {
namespace {

// Rows that a kernel can read: last stride 1 and, on a GPU, every row on a 16-byte boundary and
// less than 2^31 elements behind the one before.
Tensor readable(const Tensor& x) {
  bool fits = x.stride(-1) == 1;
  if (x.is_cuda()) {
    const int64_t bytes = x.element_size();
    fits = fits && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    for (int64_t d = 0; d < 3; ++d)
      fits = fits && (x.size(d) == 1 || x.stride(d) * bytes % 16 == 0);
    fits = fits && (x.size(2) == 1 || std::abs(x.stride(2)) <= std::numeric_limits<int>::max());
  }
  return fits ? x : x.clone(at::MemoryFormat::Contiguous);
}

OptTensor readable(const OptTensor& mask) {
  return mask ? OptTensor(mask->contiguous()) : std::nullopt;
}

Inputs readable(const Inputs& in) {
  return {readable(in.query),    readable(in.key),        readable(in.value),
          readable(in.key_mask), readable(in.query_mask), in.grad_strides};
}

// Lists whose rows lie inside row_index. On a GPU that can't be looked at without a host sync: the
// kernels skip what lies outside.
BlockList given_plan(const PlanTensors& plan) {
  BlockList rows{plan.row_start->contiguous(), plan.row_count->contiguous(),
                 plan.row_index->contiguous()};
  if (rows.start.is_cpu() && rows.start.numel() > 0) {
    const Tensor end = rows.start.to(at::kLong) + rows.count;
    TORCH_CHECK_VALUE(rows.start.min().item<int>() >= 0 && rows.count.min().item<int>() >= 0 &&
                          end.max().item<int64_t>() <= rows.index.size(2),
                      "row_start, row_count: got rows outside of row_index, which holds ",
                      rows.index.size(2), " entries for each head");
  }
  return rows;
}

// Of the row lists of all resolutions, those of block_q: the exact ones.
BlockList exact_rows(const BlockList& rows, const Options& o) {
  if (o.levels.empty()) return rows;
  const int64_t nq = o.resolutions[0].nq;
  return {rows.start.narrow(2, 0, nq), rows.count.narrow(2, 0, nq), rows.index};
}

// `coarse`: the pooled inputs for coarse = block; `key_bias`: of Centred, or undefined.
Planned make_plan(const Stages& stages, const PooledInputs& means, const Tensor& key_bias,
                  const std::optional<PooledInputs>& coarse, int64_t N, const Options& o) {
  const int64_t nk = o.levels.empty() ? means.key.size(2) : o.resolutions[0].nk;
  const int64_t pairs = head_capacity(o, N, nk);
  TORCH_CHECK_VALUE(pairs <= std::numeric_limits<int32_t>::max(),
                    "density, blocks_per_row, block_q, block_k: got a plan of up to ", pairs,
                    " pairs of blocks for each head, expected at most ",
                    std::numeric_limits<int32_t>::max());
  return stages.plan({means.query, means.query_count},
                     {means.key, means.key_count, means.beside, key_bias}, coarse, N, o);
}

// All stages before fine.
Prepared prepare(const Stages& stages, const Inputs& in, const PlanTensors& plan,
                 const Options& o) {
  const bool has_plan = plan.given();
  Prepared r;
  if (has_plan) r.planned.rows = given_plan(plan);

  // heads that a block of threads can hold: these stages at once
  if (o.levels.empty() && stages.prepare != nullptr) {
    if (auto made = stages.prepare(in, !has_plan, o)) {
      if (has_plan) made->planned = r.planned;
      return *made;
    }
  }

  // pool: means over the valid rows of each block
  const bool weighted = o.pool != Pool::even;
  r.pooled =
      stages.pool_inputs(in, o, !has_plan || o.coarse == Coarse::block || weighted, !has_plan);
  r.pooled.type = in.query.scalar_type();

  // weigh keys: as the queries do, where means are not even, and pool so; and what a plan makes of
  // it, which may run beside what comes last here
  if (weighted) {
    r.centred = stages.weigh_keys(in, r.pooled, !has_plan, o);
    stages.centre(*r.centred, in, false, o);
    r.pooled.beside |= r.centred->pooled.beside;
  }

  // plan: which pairs of blocks are exact, by scores of plain means; coarse, where it comes along
  if (!has_plan) {
    const Tensor key_bias = weighted ? r.centred->key_bias : Tensor();
    std::optional<PooledInputs> coarse;
    if (o.coarse == Coarse::block) coarse = r.pooled;
    r.planned = make_plan(stages, r.pooled, key_bias, coarse, in.query.size(2), o);
  }
  return r;
}

ForwardResult run_forward(const Stages& stages, const Inputs& in, const PlanTensors& plan,
                          const Options& o) {
  const bool has_plan = plan.given();

  // short heads: all stages at once
  if (!has_plan && o.levels.empty() && stages.forward_head != nullptr) {
    if (const auto head = stages.forward_head(in, o)) {
      return forward_result(head->fine.out, head->fine.lse, head->fine.share, head->rows,
                            head->pooled, o);
    }
  }

  Prepared ready = prepare(stages, in, plan, o);
  PooledInputs& pooled = ready.pooled;
  const std::optional<Centred>& centred = ready.centred;
  const BlockList& rows = ready.planned.rows;

  // coarse: the pairs that are not exact, unless the plan brought them along
  std::optional<CoarseState> state = ready.planned.coarse;
  if (o.coarse == Coarse::block && !state) state = stages.coarse(pooled, rows, o);

  // fine: the pairs that are, and one softmax over both
  std::optional<PooledInputs> coarse_keys;
  if (o.coarse == Coarse::row) coarse_keys = centred ? centred->pooled : pooled;
  const Tensor& moments = centred ? centred->pooled.moments : pooled.moments;
  FineResult result = stages.fine(in, rows, state, coarse_keys, moments, o);

  // order 1: what a block mean throws away
  if (has_order1(o) && centred) {
    if (!result.order1) stages.centred_term(result, in, *centred, o);
  } else if (has_order1(o) && !result.order1) {
    stages.order1(result, in, pooled, o);
  }

  const Tensor share = has_order1(o) ? result.share : Tensor();
  PooledInputs kept;
  if (o.keep && centred) {
    kept = centred->pooled;
    kept.centre = centred->centre;
    if (keeps_moments(o)) kept.moments = kept_moments(centred->moments, in.query.scalar_type());
  } else if (o.keep && keeps_means(o)) {
    kept = pooled;
  }
  return forward_result(result.out, result.lse, share, has_plan ? BlockList{} : rows, kept, o);
}

BackwardResult run_backward(const Stages& stages, const Tensor& grad_out, const Tensor& grad_lse,
                            const Inputs& in, const Tensor& out, const Tensor& lse,
                            const Tensor& share, const BlockList& rows, const MeanTensors& means,
                            const Options& o) {
  const int64_t nk = ceil_div(in.key.size(2), o.block_k);
  // plan, seen from the keys; on a GPU delta is computed meanwhile
  const BlockList columns = stages.transpose(exact_rows(rows, o), nk);

  FineBackward grads;
  grads.grad_out = grad_out;
  grads.lse = lse;
  grads.share = share;
  // Order 1 changes what block rows are summed from.
  std::optional<BlockRows> block_rows;
  if (o.coarse == Coarse::block && !has_order1(o) && o.levels.empty()) {
    std::tie(grads.delta, block_rows) =
        stages.delta_and_block_rows(grad_out, out, grad_lse, lse, o.block_q);
  } else if (!has_order1(o)) {  // else made along with coarse_delta
    grads.delta = stages.delta(grad_out, out, grad_lse);
  }
  grads.coarse_delta = grads.delta;

  // pool: what forward kept, or again
  PooledInputs pooled;
  if (o.coarse != Coarse::none && means.given()) {
    bool copied = false;
    const auto contiguous = [&](const OptTensor& x) {
      copied |= x && !x->is_contiguous();
      return x ? x->contiguous() : Tensor();
    };
    pooled = {contiguous(means.query),       contiguous(means.key),
              contiguous(means.value),       contiguous(means.key_count),
              contiguous(means.query_count), contiguous(means.moments)};
    pooled.weights = contiguous(means.weights);
    pooled.mass = contiguous(means.mass);
    pooled.centre = contiguous(means.centre);
    // What centred_delta and order1_backward read was there before the kernel launched last.
    pooled.beside = pooled.moments.defined() && !copied;
  } else if (o.coarse != Coarse::none) {
    const bool queries = o.coarse == Coarse::block || o.pool != Pool::even;
    pooled = stages.pool_inputs(in, o, queries, false);
  }
  pooled.type = in.query.scalar_type();

  std::optional<Centred> centred;
  if (o.pool != Pool::even) {
    if (means.given()) {
      centred = Centred{pooled, pooled.centre};
      centred->moments = std::exchange(centred->pooled.moments, {});
    } else {
      centred = stages.weigh_keys(in, pooled, false, o);
    }
    stages.centre(*centred, in, true, o);
  }

  // order 1
  if (centred) grads.centred = &*centred;
  if (has_order1(o) && centred) {
    stages.centred_delta(grads, out, grad_lse, in, *centred, rows, o);
    if (!grads.coarse_rows.shares.defined()) {
      grads.coarse_sum = allocate_beside(grads.delta, grads.delta.sizes());
    }
  } else if (has_order1(o)) {
    const Order1Grads first = stages.order1_backward(grad_out, share, out, grad_lse, in, pooled, o);
    grads.delta = first.delta;
    grads.coarse_delta = first.coarse_delta;
    grads.query_extra = first.query;
    grads.key_extra = first.key;
    grads.value_extra = first.value;
    grads.key_block = first.key_block;
    grads.value_block = first.value_block;
    grads.moment_grads = first.moment_grads;
    grads.held = first.held;
    grads.means = &pooled;
  }

  // coarse: gradients of the pooled inputs
  std::optional<PooledInputs> coarse_keys;
  if (o.coarse == Coarse::row) coarse_keys = centred ? centred->pooled : pooled;
  if (o.coarse == Coarse::block) {
    if (!block_rows) block_rows = all_block_rows(stages, grad_out, lse, grads.coarse_delta, o);
    const Grads shares = stages.coarse_backward(pooled, rows, columns, *block_rows, o);
    grads.query_block = shares.query;
    const auto plus = [](const Tensor& x, const Tensor& y) { return y.defined() ? x.add(y) : x; };
    grads.key_block = plus(shares.key, grads.key_block);
    grads.value_block = plus(shares.value, grads.value_block);
  }

  // fine
  if (centred && stages.centred_grads != nullptr) {
    const auto sizes = centred->pooled.key.sizes();
    grads.mass_grad = allocate_beside(grads.delta, sizes.slice(0, 3));
    grads.pooled_grads = allocate_beside(grads.delta, {2, sizes[0], sizes[1], sizes[2], sizes[3]});
  }
  const Grads result = stages.fine_backward(in, rows, columns, coarse_keys, grads, o);
  if (centred && stages.centred_grads != nullptr) stages.centred_grads(result, grads, in, o);
  return {result.query, result.key, result.value};
}

// The operators of registration.cpp, for the device of `device_stages`.
template <const Stages& (*device_stages)()>
struct Operators {
  static std::tuple<Tensor, Tensor> pool(const Tensor& input, const OptTensor& mask,
                                         int64_t block) {
    check_pool(input, mask, block);
    const at::DeviceGuard guard(input.device());
    if (input.numel() == 0) {
      const int64_t B = input.size(0), n = ceil_div(input.size(2), block);
      const auto acc = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      return {at::zeros({B, input.size(1), n, input.size(3)}, input.options().dtype(acc)),
              at::zeros({B, n}, input.options().dtype(at::kInt))};
    }
    const Pooled pooled = device_stages().pool(readable(input), readable(mask), block);
    return {pooled.mean, pooled.count};
  }

  static std::tuple<Tensor, Tensor, Tensor> plan(
      const Tensor& query, const Tensor& key, const OptTensor& key_mask,
      const OptTensor& query_mask, std::optional<c10::SymInt> blocks_per_row, OptDensity density,
      int64_t block_q, int64_t block_k, std::string_view selection, int64_t diagonal_blocks,
      int64_t first_blocks, bool is_causal, std::optional<double> scale,
      at::OptionalIntArrayRef levels, std::string_view pool) {
    Options o =
        check_plan(query, key, key_mask, query_mask,
                   {blocks_per_row, density, block_q, block_k, plan_coarse(pool), 0, selection,
                    diagonal_blocks, first_blocks, is_causal, scale, levels, pool});
    o.resolutions = resolutions(o, query.size(2), key.size(2));
    const at::DeviceGuard guard(query.device());
    const Stages& stages = device_stages();
    BlockList rows;
    if (query.numel() == 0) {
      rows = empty_plan(query, ceil_div(key.size(2), block_k), o);
    } else {
      const Inputs in = readable(Inputs{query, key, key, key_mask, query_mask});
      PooledInputs means = stages.pool_inputs(in, o, true, true);
      Tensor key_bias;
      if (o.pool != Pool::even) key_bias = stages.weigh_keys(in, means, true, o).key_bias;
      rows = make_plan(stages, means, key_bias, std::nullopt, query.size(2), o).rows;
    }
    return {rows.start, rows.count, rows.index};
  }

  static ForwardResult forward(const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptTensor& key_mask, const OptTensor& query_mask,
                               const OptTensor& row_start, const OptTensor& row_count,
                               const OptTensor& row_index,
                               std::optional<c10::SymInt> blocks_per_row, OptDensity density,
                               int64_t block_q, int64_t block_k, std::string_view coarse,
                               int64_t order, std::string_view selection, int64_t diagonal_blocks,
                               int64_t first_blocks, bool is_causal, std::optional<double> scale,
                               at::OptionalIntArrayRef levels, std::string_view pool, bool keep) {
    Inputs in{query, key, value, key_mask, query_mask};
    const PlanTensors plan{row_start, row_count, row_index};
    Options o =
        check_forward(in, plan,
                      {blocks_per_row, density, block_q, block_k, coarse, order, selection,
                       diagonal_blocks, first_blocks, is_causal, scale, levels, pool, keep});
    o.resolutions = resolutions(o, query.size(2), key.size(2));
    const at::DeviceGuard guard(query.device());
    if (query.numel() == 0) return empty_forward(in, plan, o);
    return run_forward(device_stages(), readable(in), plan, o);
  }

  static BackwardResult backward(
      const Tensor& grad_out, const OptTensor& grad_lse, const Tensor& query, const Tensor& key,
      const Tensor& value, const OptTensor& key_mask, const OptTensor& query_mask,
      const Tensor& out, const Tensor& lse, const Tensor& coarse_share, const Tensor& row_start,
      const Tensor& row_count, const Tensor& row_index, int64_t block_q, int64_t block_k,
      std::string_view coarse, int64_t order, bool is_causal, std::optional<double> scale,
      const OptTensor& query_mean, const OptTensor& key_mean, const OptTensor& value_mean,
      const OptTensor& query_count, const OptTensor& key_count, const OptTensor& moments,
      const OptTensor& query_centre, const OptTensor& key_weights, const OptTensor& block_mass,
      at::OptionalIntArrayRef levels, std::string_view pool) {
    Inputs in{query, key, value, key_mask, query_mask};
    const PlanTensors plan{row_start, row_count, row_index};
    const MeanTensors means{query_mean, key_mean,     value_mean,  query_count, key_count,
                            moments,    query_centre, key_weights, block_mass};
    Options o = check_backward(grad_out, grad_lse, in, out, lse, coarse_share, plan, means,
                               {std::nullopt, std::nullopt, block_q, block_k, coarse, order, "row",
                                0, 0, is_causal, scale, levels, pool});
    o.resolutions = resolutions(o, query.size(2), key.size(2));
    const at::DeviceGuard guard(query.device());
    in.grad_strides = {grad_strides(query), grad_strides(key), grad_strides(value)};
    if (query.numel() == 0) {
      const auto zeros = [&](const Tensor& x, int which) {
        return at::empty_strided(x.sizes(), in.grad_strides[which], x.options()).zero_();
      };
      return {zeros(query, 0), zeros(key, 1), zeros(value, 2)};
    }
    return run_backward(device_stages(), readable(grad_out),
                        grad_lse ? grad_lse->contiguous() : Tensor(), readable(in), readable(out),
                        lse.contiguous(), coarse_share.contiguous(), given_plan(plan), means, o);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(mra_attention, CPU, m) {
  using Cpu = Operators<cpu_stages>;
  m.impl("pool", Cpu::pool);
  m.impl("plan", Cpu::plan);
  m.impl("forward", Cpu::forward);
  m.impl("backward", Cpu::backward);
}

#ifdef MRA_WITH_CUDA
TORCH_LIBRARY_IMPL(mra_attention, CUDA, m) {
  using Cuda = Operators<cuda_stages>;
  m.impl("pool", Cuda::pool);
  m.impl("plan", Cuda::plan);
  m.impl("forward", Cuda::forward);
  m.impl("backward", Cuda::backward);
}
#endif

}  // namespace mra
