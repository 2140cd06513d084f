// Stages order1 and order1_backward on CUDA: allocate and launch order1_*.cu.
#include <ATen/ops/stack.h>

#include <vector>

#include "order1_levels.h"
#include "order1_term.h"
#include "order1_walk.h"
#include "row_dots.h"
#include "sm90/moments.h"

namespace mra::cuda {

Tensor order1_moments(const Inputs& in, const PooledInputs& pooled, const Options& o) {
  const Launch launch(in.query);
  return Term(launch, in, pooled, o).moments();
}

bool order1_at_once(FineResult& result, const Inputs& in, const PooledInputs& pooled,
                    const std::vector<Tensor>& moments, const Options& o) {
  const Launch launch(in.query);
  const Term term(launch, in, pooled, o);
  const Tensor all = at::stack(moments);
  Order1Rows p = term.rows(all, result.share, RowsStep::term);
  p.count = static_cast<int>(moments.size());
  if (p.count > order1_rows_most(term.dtype, term.dim, p.warps, launch.device)) return false;
  p.next_matrices = all.stride(0);
  p.out = result.out.mutable_data_ptr();
  p.out_strides = strides_of(result.out);
  launch.check(order1_rows(p, launch.stream));
  return true;
}

void order1(FineResult& result, const Inputs& in, PooledInputs& pooled, const Options& o) {
  if (!o.levels.empty()) return order1_levels(result, in, pooled, o);
  const Launch launch(in.query);
  const Term term(launch, in, pooled, o);
  if (order1_walk(result, term)) return;
  // With moments that are there already, as those of coarser levels are, by the generic kernels.
  if (!pooled.moments.defined() && order1_walk_wide(result, term, pooled.moments)) return;
  const Tensor moments = term.moments();
  if (keeps_moments(o)) pooled.moments = moments;
  Order1Rows p = term.rows(moments, result.share, RowsStep::term);
  p.out = result.out.mutable_data_ptr();
  p.out_strides = strides_of(result.out);
  launch.check(order1_rows(p, launch.stream));
}

namespace {

// Rows of the backward on the generic kernels: fills grads.query and grads.coarse_delta, returns dC
// and dSigma.
Tensor backward_rows(const Term& term, const Tensor& moments, const Tensor& grad_out,
                     const GradRows& rows, const Order1Grads& grads, bool add) {
  const int64_t B = term.B, H = term.H, N = term.N;
  const Tensor weights = allocate({2, B, H, N}, term.acc());
  float* weight = weights.mutable_data_ptr<float>();
  Order1Rows p = term.rows(moments, rows.share, RowsStep::backward);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_strides = strides_of(grad_out);
  p.delta = rows.delta.const_data_ptr<float>();
  p.coarse_delta = grads.coarse_delta.mutable_data_ptr<float>();
  p.weight_c = weight;
  p.weight_s = weight + B * H * N;
  p.grad_q = grads.query.mutable_data_ptr();
  p.grad_q_strides = strides_of(grads.query);
  p.add = add;
  term.launch.check(order1_rows(p, term.launch.stream));

  return term.weighted_sums(grad_out, weight, weight + B * H * N);
}

// But for what one kernel or the other sets.
sm90::Order1Keys hopper_keys(const Term& term, const Tensor& moment_grads,
                             const WeightGrads* through) {
  sm90::Order1Keys p{};
  p.k = term.in.key.const_data_ptr();
  p.v = term.in.value.const_data_ptr();
  p.k_strides = strides_of(term.in.key);
  p.v_strides = strides_of(term.in.value);
  p.mask = mask_of(term.in.key_mask);
  p.k_mean = term.key_mean.const_data_ptr<float>();
  p.v_mean = term.value_mean.const_data_ptr<float>();
  p.moment_grads = moment_grads.const_data_ptr();
  p.B = term.B;
  p.Hk = term.Hk;
  p.M = term.M;
  p.D = term.D;
  p.nk = term.nk;
  p.log2_block_k = term.block_shift;
  p.weights = data_of<float>(term.pooled.weights);
  if (through != nullptr) {
    p.shares = through->shares.const_data_ptr<float>();
    p.mass_grad = through->mass_grad.const_data_ptr<float>();
    p.centre = through->centre.const_data_ptr<float>();
    p.scale = static_cast<float>(term.o.scale);
  }
  return p;
}

// Parts of what the centre gets, for a kernel to write.
void empty_centre_grads(sm90::Order1Keys& p, const Term& term, int64_t parts, WeightGrads* through,
                        Tensor& centre_grads) {
  if (through == nullptr) return;
  centre_grads = allocate({p.B, p.Hk, parts, p.D}, term.acc());
  p.centre_grads = centre_grads.mutable_data_ptr<float>();
}

// By fine's gradients of the keys.
bool keys_in_columns(const Term& term, const Tensor& moment_grads, WeightGrads* through,
                     const ColumnsWithOrder1& columns) {
  if (!columns || !order1_in_columns(term.in.key, term.o, term.launch)) return false;
  sm90::Order1Keys p = hopper_keys(term, moment_grads, through);
  Tensor centre_grads;
  empty_centre_grads(p, term, p.nk, through, centre_grads);
  if (!columns(p)) return false;
  if (through != nullptr) through->centre_grads = centre_grads;
  return true;
}

// grads.key and grads.value; false where the kernel doesn't do it.
bool keys_on_hopper(const Term& term, const Tensor& moment_grads, WeightGrads* through,
                    const Grads& grads) {
#ifdef MRA_SM90A
  if (!order1_on_hopper(term.in.key, term.o, term.launch) || term.o.block_k > 64) return false;
  const Device& device = term.launch.device;
  sm90::Order1Keys p = hopper_keys(term, moment_grads, through);
  const int resident = sm90::order1_keys_resident(term.dim, p.weights != nullptr, p.log2_block_k);
  p.chunks = sm90::tile_chunks(p.B * p.Hk, p.M, resident, device);
  Tensor centre_grads;
  empty_centre_grads(p, term, int64_t{p.chunks} * sm90::order1_keys_warps(term.dim), through,
                     centre_grads);
  p.grad_k = grads.key.mutable_data_ptr();
  p.grad_v = grads.value.mutable_data_ptr();
  p.grad_k_strides = strides_of(grads.key);
  p.grad_v_strides = strides_of(grads.value);
  const bool done = launch_by_dim(term.launch, term.dim, [&](auto dim) {
    return sm90::launch_order1_keys<dim()>(p, device, term.launch.stream);
  });
  if (!done) return false;
  if (through != nullptr) through->centre_grads = centre_grads;
  return true;
#else
  return false;
#endif
}

// backward_rows, and delta, in one reading of the rows, or undefined where no kernel does it.
Tensor backward_rows_at_once(const Term& term, const Tensor& moments, const Tensor& grad_out,
                             GradRows& rows, const Order1Grads& grads, bool add, Tensor* held) {
  const Tensor delta = rows.delta.defined() ? rows.delta : allocate_like(grads.coarse_delta);
  sm90::Order1Rows p{};
  p.share = rows.share.const_data_ptr<float>();
  p.delta = delta.mutable_data_ptr<float>();
  p.scale = static_cast<float>(term.o.scale);
  p.coarse_delta = grads.coarse_delta.mutable_data_ptr<float>();
  p.add = add;
  Tensor out;
  if (!rows.delta.defined()) {
    out = with_aligned_rows(rows.out);
    p.out = out.const_data_ptr();
    p.out_strides = strides_of(out);
    p.grad_lse = data_of<float>(rows.grad_lse);
    if (rows.grad_lse.defined()) p.lse_strides = strides_of(rows.grad_lse);
    // What comes before it is the plan's transpose, unless moments were made or rows copied.
    p.beside = term.pooled.beside && out.is_same(rows.out) && grad_out.is_same(rows.grad_out);
  }
  const Tensor result =
      order1_rows_on_hopper(term, moments, grad_out, grads.query, p, nullptr, held);
  if (result.defined()) rows.delta = delta;
  return result;
}

}  // namespace

Tensor order1_rows_on_hopper(const Term& term, const Tensor& moments, const Tensor& grad_out,
                             const Tensor& grad_query, sm90::Order1Rows p, Tensor* row_sums,
                             Tensor* held) {
#ifdef MRA_SM90A
  if (!order1_on_hopper(term.in.key, term.o, term.launch)) return {};
  const Device& device = term.launch.device;
  p.q = term.in.query.const_data_ptr();
  p.grad_out = grad_out.const_data_ptr();
  p.q_strides = strides_of(term.in.query);
  p.grad_out_strides = strides_of(grad_out);
  p.moments = moments.const_data_ptr();
  p.B = term.B;
  p.H = term.H;
  p.Hk = term.Hk;
  p.N = term.N;
  p.D = term.D;
  p.chunks = sm90::tile_chunks(p.B * p.H, p.N, term.dim <= 64 ? 2 : 1, device);
  p.grad_q = grad_query.mutable_data_ptr();
  p.grad_q_strides = strides_of(grad_query);
  const RowMatrices matrices(term, p.chunks);
  p.sums = data_of<float>(matrices.sums);
  p.moment_grads = matrices.result.mutable_data_ptr();
  p.key_count = term.pooled.key_count.const_data_ptr<int>();
  p.nk = term.nk;
  if (row_sums != nullptr) {
    *row_sums = allocate({p.B, p.H, 4 * p.chunks, p.D}, term.acc());
    p.row_sums = row_sums->mutable_data_ptr<float>();
  }
  const bool done = launch_by_dim(term.launch, term.dim, [&](auto dim) {
    return sm90::launch_order1_rows<dim()>(p, device, term.launch.stream);
  });
  if (!done) return {};
  matrices.add_up(term);
  if (held != nullptr) *held = matrices.sums;
  return matrices.result;
#else
  return {};
#endif
}

void order1_key_grads(const Term& term, const Tensor& moment_grads, WeightGrads* through,
                      const Grads& grads, bool add, const ColumnsWithOrder1& columns) {
  if (keys_in_columns(term, moment_grads, through, columns)) return;
  if (!add && keys_on_hopper(term, moment_grads, through, grads)) return;
  const Inputs& in = term.in;
  const Launch& launch = term.launch;
  Order1Keys p{};
  term.fill(p, moment_grads, term.M, term.Hk,
            order1_keys_warps(term.dtype, term.dim, launch.device));
  p.k = in.key.const_data_ptr();
  p.v = in.value.const_data_ptr();
  p.k_strides = strides_of(in.key);
  p.v_strides = strides_of(in.value);
  p.k_mean = term.key_mean.const_data_ptr<float>();
  p.v_mean = term.value_mean.const_data_ptr<float>();
  p.mask = mask_of(in.key_mask);
  p.nk = term.nk;
  p.block_shift = term.block_shift;
  p.weights = data_of<float>(term.pooled.weights);
  p.shares = through == nullptr ? nullptr : through->shares.const_data_ptr<float>();
  p.key_count = term.pooled.key_count.const_data_ptr<int>();
  Tensor to_key = grads.key, to_value = grads.value;
  if (through != nullptr) {
    // Rounded once what comes through the weights is added, not before.
    if (term.dtype != Dtype::f32) {
      to_key = allocate(in.key.sizes(), term.acc());
      to_value = allocate_like(to_key);
    }
    through->key_part = to_key;
    through->value_part = to_value;
  }
  p.grad_k = to_key.mutable_data_ptr();
  p.grad_v = to_value.mutable_data_ptr();
  p.grad_k_strides = strides_of(to_key);
  p.grad_v_strides = strides_of(to_value);
  p.add = add;
  launch.check(order1_keys(p, launch.stream));
}

Tensor order1_grad_rows(GradRows& rows, const Inputs& in, const PooledInputs& pooled,
                        const Options& o, const Order1Grads& grads, bool add, Tensor* held) {
  const Launch launch(in.query);
  const Term term(launch, in, pooled, o);
  const Tensor grad_out = with_aligned_rows(rows.grad_out), moments = term.moments();
  const Tensor moment_grads =
      backward_rows_at_once(term, moments, grad_out, rows, grads, add, held);
  if (moment_grads.defined()) return moment_grads;
  if (!rows.delta.defined()) rows.delta = row_dots(grad_out, rows.out, rows.grad_lse);
  return backward_rows(term, moments, grad_out, rows, grads, add);
}

void order1_grad_keys(const Tensor& moment_grads, const Inputs& in, const PooledInputs& pooled,
                      const Options& o, const Order1Grads& grads, bool add) {
  const Launch launch(in.query);
  const Term term(launch, in, pooled, o);
  order1_key_grads(term, moment_grads, nullptr, {grads.query, grads.key, grads.value}, add);
}

bool order1_grad_walk(const GradRows& rows, const Inputs& in, const PooledInputs& pooled,
                      const Options& o, const Order1Grads& grads) {
  const Launch launch(in.query);
  const Term term(launch, in, pooled, o);
  return order1_walk_backward(with_aligned_rows(rows.grad_out), rows.share, rows.delta, term,
                              grads);
}

Order1Grads order1_backward(const Tensor& grad_out, const Tensor& share, const Tensor& out,
                            const Tensor& grad_lse, const Inputs& in, const PooledInputs& pooled,
                            const Options& o) {
  const Launch launch(in.query);
  GradRows rows{grad_out, share, {}, out, grad_lse};
  // Else the rows' kernel makes it.
  if (!o.levels.empty() || !order1_on_hopper(in.key, o, launch)) {
    rows.delta = delta(grad_out, out, grad_lse);
  }
  Order1Grads grads;
  if (!o.levels.empty()) {
    grads = order1_levels_backward(grad_out, share, rows.delta, in, pooled, o);
  } else {
    grads.coarse_delta =
        allocate(grad_out.sizes().slice(0, 3), in.query.options().dtype(at::kFloat));
    grads.query = empty_query_grad(in);
    if (order1_in_columns(in.key, o, launch)) {
      // What comes last adds up sums, if there are any.
      grads.moment_grads = order1_grad_rows(rows, in, pooled, o, grads, false, &grads.held);
    } else {
      grads.key = empty_key_grad(in);
      grads.value = empty_value_grad(in);
      if (!order1_grad_walk(rows, in, pooled, o, grads)) {
        grads.held = order1_grad_rows(rows, in, pooled, o, grads, false);
        order1_grad_keys(grads.held, in, pooled, o, grads, false);
      }
    }
  }
  grads.delta = rows.delta;
  return grads;
}

}  // namespace mra::cuda
