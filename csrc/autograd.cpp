// Gradients. forward is differentiable through `out` and `lse`; pool and plan are constants for the
// gradient. A second derivative and forward-mode differentiation are refused, not guessed.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "common/stages.h"

namespace mra {
namespace {

using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void refuse_forward_mode(const char* name, std::initializer_list<Tensor> inputs) {
  for (const Tensor& x : inputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(!x._fw_grad(/*level=*/0).defined(), "mra_attention::", name,
                                ": forward-mode differentiation (jvp, dual tensors) is not "
                                "supported; use reverse mode (backward)");
  }
}

bool needs_grad(std::initializer_list<Tensor> inputs) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor& x : inputs) {
    if (x.requires_grad()) return true;
  }
  return false;
}

OptTensor optional(const Tensor& x) { return x.defined() ? OptTensor(x) : std::nullopt; }
// For what forward returns empty where it has nothing.
OptTensor unless_empty(const Tensor& x) { return x.dim() > 1 ? OptTensor(x) : std::nullopt; }

// What an attention call gives besides the three tensors that get gradients.
struct Rest {
  OptTensor key_mask, query_mask, row_start, row_count, row_index;
  std::optional<SymInt> blocks_per_row;
  OptDensity density;
  int64_t block_q, block_k;
  std::string_view coarse;
  int64_t order;
  std::string_view selection;
  int64_t diagonal_blocks, first_blocks;
  bool is_causal;
  std::optional<double> scale;
  at::OptionalIntArrayRef levels;
  std::string_view pool;
  bool keep;
};

using ForwardSignature = ForwardResult(const Tensor&, const Tensor&, const Tensor&,
                                       const OptTensor&, const OptTensor&, const OptTensor&,
                                       const OptTensor&, const OptTensor&, std::optional<SymInt>,
                                       OptDensity, int64_t, int64_t, std::string_view, int64_t,
                                       std::string_view, int64_t, int64_t, bool,
                                       std::optional<double>, at::OptionalIntArrayRef,
                                       std::string_view, bool);
using BackwardSignature = BackwardResult(
    const Tensor&, const OptTensor&, const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
    const OptTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, int64_t, int64_t, std::string_view, int64_t, bool, std::optional<double>,
    const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&,
    const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&, at::OptionalIntArrayRef,
    std::string_view);

ForwardResult call_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                           const Rest& r) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  static const auto op = find<ForwardSignature>("mra_attention::forward");
  return op.call(query, key, value, r.key_mask, r.query_mask, r.row_start, r.row_count, r.row_index,
                 r.blocks_per_row, r.density, r.block_q, r.block_k, r.coarse, r.order, r.selection,
                 r.diagonal_blocks, r.first_blocks, r.is_causal, r.scale, r.levels, r.pool, r.keep);
}

class Attention : public Function<Attention> {
 public:
  static constexpr bool is_traceable = true;

  // Returns the differentiable results; `others` takes the rest.
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key,
                               const Tensor& value, const Rest& r, ForwardResult* others) {
    *others = call_forward(query, key, value, r);
    const auto& [out, lse, share, start, count, index, q_mean, k_mean, v_mean, q_count, k_count,
                 moments, centre, weights, mass] = *others;
    const bool given = r.row_start.has_value();
    const auto saved = [](const OptTensor& x) { return x.value_or(Tensor()); };
    ctx->save_for_backward({query,
                            key,
                            value,
                            saved(r.key_mask),
                            saved(r.query_mask),
                            out,
                            lse,
                            share,
                            given ? *r.row_start : start,
                            given ? *r.row_count : count,
                            given ? *r.row_index : index,
                            q_mean,
                            k_mean,
                            v_mean,
                            q_count,
                            k_count,
                            moments,
                            centre,
                            weights,
                            mass});
    ctx->saved_data["block_q"] = r.block_q;
    ctx->saved_data["block_k"] = r.block_k;
    ctx->saved_data["coarse"] = std::string(r.coarse);
    ctx->saved_data["order"] = r.order;
    ctx->saved_data["is_causal"] = r.is_causal;
    ctx->saved_data["scale"] = r.scale;
    ctx->saved_data["levels"] = r.levels ? c10::IValue(r.levels->vec()) : c10::IValue();
    ctx->saved_data["pool"] = std::string(r.pool);
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(5);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const variable_list s = ctx->get_saved_variables();
    const auto& data = ctx->saved_data;
    const Tensor &query = s[0], &out = s[5];
    const Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(out);
    static const auto op = find<BackwardSignature>("mra_attention::backward");
    const std::string coarse = data.at("coarse").toStringRef();
    const std::string pool = data.at("pool").toStringRef();
    const auto levels = data.at("levels").toOptional<std::vector<int64_t>>();
    std::tie(result[0], result[1], result[2]) = op.call(
        grad_out, optional(grads[1]), query, s[1], s[2], optional(s[3]), optional(s[4]), out, s[6],
        s[7], s[8], s[9], s[10], data.at("block_q").toInt(), data.at("block_k").toInt(), coarse,
        data.at("order").toInt(), data.at("is_causal").toBool(),
        data.at("scale").toOptional<double>(), unless_empty(s[11]), unless_empty(s[12]),
        unless_empty(s[13]), unless_empty(s[14]), unless_empty(s[15]), unless_empty(s[16]),
        unless_empty(s[17]), unless_empty(s[18]), unless_empty(s[19]),
        levels ? at::OptionalIntArrayRef(*levels) : std::nullopt, pool);
    return result;
  }
};

ForwardResult forward(const Tensor& query, const Tensor& key, const Tensor& value,
                      const OptTensor& key_mask, const OptTensor& query_mask,
                      const OptTensor& row_start, const OptTensor& row_count,
                      const OptTensor& row_index, std::optional<SymInt> blocks_per_row,
                      OptDensity density, int64_t block_q, int64_t block_k, std::string_view coarse,
                      int64_t order, std::string_view selection, int64_t diagonal_blocks,
                      int64_t first_blocks, bool is_causal, std::optional<double> scale,
                      at::OptionalIntArrayRef levels, std::string_view pool, bool keep) {
  refuse_forward_mode("forward", {query, key, value});
  const Rest rest{
      key_mask,  query_mask, row_start, row_count, row_index, blocks_per_row,  density,
      block_q,   block_k,    coarse,    order,     selection, diagonal_blocks, first_blocks,
      is_causal, scale,      levels,    pool,      keep};
  if (!needs_grad({query, key, value})) return call_forward(query, key, value, rest);
  ForwardResult result;
  const variable_list with_grad = Attention::apply(query, key, value, rest, &result);
  std::get<0>(result) = with_grad[0];
  std::get<1>(result) = with_grad[1];
  return result;
}

BackwardResult call_backward(
    const Tensor& grad_out, const OptTensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const OptTensor& key_mask, const OptTensor& query_mask, const Tensor& out,
    const Tensor& lse, const Tensor& coarse_share, const Tensor& row_start, const Tensor& row_count,
    const Tensor& row_index, int64_t block_q, int64_t block_k, std::string_view coarse,
    int64_t order, bool is_causal, std::optional<double> scale, const OptTensor& query_mean,
    const OptTensor& key_mean, const OptTensor& value_mean, const OptTensor& query_count,
    const OptTensor& key_count, const OptTensor& moments, const OptTensor& query_centre,
    const OptTensor& key_weights, const OptTensor& block_mass, at::OptionalIntArrayRef levels,
    std::string_view pool) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  static const auto op = find<BackwardSignature>("mra_attention::backward");
  return op.call(grad_out, grad_lse, query, key, value, key_mask, query_mask, out, lse,
                 coarse_share, row_start, row_count, row_index, block_q, block_k, coarse, order,
                 is_causal, scale, query_mean, key_mean, value_mean, query_count, key_count,
                 moments, query_centre, key_weights, block_mass, levels, pool);
}

// Gives the three gradients a history that raises: without it a second derivative through them
// would silently miss terms.
class Once : public Function<Once> {
 public:
  static variable_list forward(AutogradContext*, const Tensor& /*grad_out*/,
                               const OptTensor& /*grad_lse*/, const Tensor& /*query*/,
                               const Tensor& /*key*/, const Tensor& /*value*/,
                               const BackwardResult& result) {
    return {std::get<0>(result), std::get<1>(result), std::get<2>(result)};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "mra_attention::backward: double backward is not supported (a second derivative "
        "of mra_attention was asked for)");
  }
};

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
  refuse_forward_mode("backward", {grad_out, query, key, value});
  const BackwardResult result =
      call_backward(grad_out, grad_lse, query, key, value, key_mask, query_mask, out, lse,
                    coarse_share, row_start, row_count, row_index, block_q, block_k, coarse, order,
                    is_causal, scale, query_mean, key_mean, value_mean, query_count, key_count,
                    moments, query_centre, key_weights, block_mass, levels, pool);
  if (!needs_grad({grad_out, query, key, value}) && !(grad_lse && needs_grad({*grad_lse}))) {
    return result;
  }
  const variable_list once = Once::apply(grad_out, grad_lse, query, key, value, result);
  return {once[0], once[1], once[2]};
}

std::tuple<Tensor, Tensor> pool(const Tensor& input, const OptTensor& mask, int64_t block) {
  refuse_forward_mode("pool", {input});
  const at::AutoDispatchBelowADInplaceOrView guard;
  static const auto op = find<decltype(pool)>("mra_attention::pool");
  return op.call(input, mask, block);
}

std::tuple<Tensor, Tensor, Tensor> plan(
    const Tensor& query, const Tensor& key, const OptTensor& key_mask, const OptTensor& query_mask,
    std::optional<SymInt> blocks_per_row, OptDensity density, int64_t block_q, int64_t block_k,
    std::string_view selection, int64_t diagonal_blocks, int64_t first_blocks, bool is_causal,
    std::optional<double> scale, at::OptionalIntArrayRef levels, std::string_view pool) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  static const auto op = find<decltype(plan)>("mra_attention::plan");
  return op.call(query, key, key_mask, query_mask, blocks_per_row, density, block_q, block_k,
                 selection, diagonal_blocks, first_blocks, is_causal, scale, levels, pool);
}

}  // namespace

TORCH_LIBRARY_IMPL(mra_attention, Autograd, m) {
  m.impl("pool", pool);
  m.impl("plan", plan);
  m.impl("forward", forward);
  m.impl("backward", backward);
}

}  // namespace mra
