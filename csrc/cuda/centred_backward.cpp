// Gradients of weighted means: order 1 with them, and through their weights. Allocates and launches
// centred_bwd.cu, centred_queries.cu, centred_sums.cu and the kernels of order 1.
#include <ATen/ops/zeros.h>

#include "centred_term.h"
#include "row_dots.h"
#include "sm90/moments.h"
#include "sm90/order1_delta.h"

namespace mra::cuda {
namespace {

// a and b of each row (RowWeightsParams), [2, B, H, N]; the shift of CentreProductsParams, under
// causal zeros; there the gradients of the centres before each block of queries, [B, Hk, nq, D].
// Where rows are walked, a and b alone.
struct RowWeights {
  Tensor weights, shift, of_centres;

  RowWeights(const Term& term, const Tensor& grad_out, const FineBackward& back) {
    const Centred& c = *back.centred;
    RowWeightsParams p{};
    p.part_rows = term.o.causal ? static_cast<int>(term.o.block_q) : kRowWeightsRows;
    p.parts = static_cast<int>(ceil_div(term.N, p.part_rows));
    weights = allocate({2, term.B, term.H, term.N}, term.acc());
    const bool walked = term.o.causal && !c.queries.defined();
    Tensor sums;
    if (!walked) sums = allocate({term.B, term.H, p.parts, 2, term.D}, term.acc());
    p.q = term.in.query.const_data_ptr();
    p.grad_out = grad_out.const_data_ptr();
    p.q_strides = strides_of(term.in.query);
    p.grad_out_strides = strides_of(grad_out);
    p.share = back.share.const_data_ptr<float>();
    p.variance = c.pooled.variance.const_data_ptr<float>();
    p.slope = c.slope.const_data_ptr<float>();
    p.coarse_sum = back.coarse_sum.const_data_ptr<float>();
    if (!term.o.causal) p.centre = c.centre.const_data_ptr<float>();
    p.a = a();
    p.b = b();
    p.sums = data_of<float>(sums);
    p.dtype = term.dtype;
    p.B = term.B;
    p.H = term.H;
    p.Hk = term.Hk;
    p.N = term.N;
    p.D = term.D;
    p.scale = static_cast<float>(term.o.scale);
    term.launch.check(row_weights(p, term.launch.stream));
    if (walked) return;
    if (term.o.causal) {
      shift = at::zeros({term.B, term.Hk, term.dim}, term.acc());
      grads_of_centres(term, c, p);
      return;
    }
    shift = allocate({term.B, term.Hk, term.dim}, term.acc());
    CentreProductsParams products = products_of(term, c, shift);
    products.sums = p.sums;
    products.parts = p.parts;
    term.launch.check(centre_products(products, term.launch.stream));
  }
  float* a() const { return weights.mutable_data_ptr<float>(); }
  float* b() const { return a() + weights.numel() / 2; }

 private:
  void grads_of_centres(const Term& term, const Centred& c, const RowWeightsParams& rows) {
    of_centres = allocate({term.B, term.Hk, rows.parts, term.D}, term.acc());
    CausalProductsParams p{};
    p.matrices = c.moments.const_data_ptr();
    p.sums = rows.sums;
    p.result = of_centres.mutable_data_ptr<float>();
    p.dtype = term.dtype == Dtype::bf16 ? Dtype::bf16 : Dtype::f32;
    p.B = term.B;
    p.H = term.H;
    p.Hk = term.Hk;
    p.D = term.D;
    p.dim = term.dim;
    p.nq = rows.parts;
    p.units = term.units(term.N);
    p.log2_unit_blocks = log2_of(term.unit_causal) - log2_of(rows.part_rows);
    term.launch.check(causal_products(p, term.launch.stream));
  }
};

// What a centred_delta makes of each row beside grads.delta.
void empty_row_numbers(FineBackward& grads, Centred& c) {
  grads.coarse_delta = allocate_like(grads.delta);
  c.pooled.variance = allocate_like(grads.delta);
  c.pooled.row_bias = allocate_like(grads.delta);
  c.slope = allocate_like(grads.delta);
}

// All of centred_delta in one reading; false where no kernel does it. Leaves the centre's products
// in `c` for rows_at_once.
bool delta_on_hopper(FineBackward& grads, const Tensor& out_in, const Tensor& grad_lse,
                     const Term& term, Centred& c) {
#ifdef MRA_SM90A
  if (!order1_on_hopper(term.in.key, term.o, term.launch)) return false;
  const Tensor grad_out = with_aligned_rows(grads.grad_out), out = with_aligned_rows(out_in);
  const Device& device = term.launch.device;
  grads.delta = allocate({term.B, term.H, term.N}, term.acc());
  empty_row_numbers(grads, c);
  c.pooled.centre_term = centre_matrices(term, c, c.pooled.beside);
  sm90::Order1Delta p{};
  p.q = term.in.query.const_data_ptr();
  p.grad_out = grad_out.const_data_ptr();
  p.out = out.const_data_ptr();
  p.q_strides = strides_of(term.in.query);
  p.grad_out_strides = strides_of(grad_out);
  p.out_strides = strides_of(out);
  p.moments = c.moments.const_data_ptr();
  p.centre = c.centre.const_data_ptr<float>();
  p.centre_term = c.pooled.centre_term.const_data_ptr<float>();
  p.share = grads.share.const_data_ptr<float>();
  p.grad_lse = data_of<float>(grad_lse);
  if (grad_lse.defined()) p.lse_strides = strides_of(grad_lse);
  p.B = term.B;
  p.H = term.H;
  p.Hk = term.Hk;
  p.N = term.N;
  p.D = term.D;
  p.chunks = sm90::tile_chunks(p.B * p.H, p.N, sm90::order1_delta_resident(term.dim), device);
  p.scale = static_cast<float>(term.o.scale);
  p.delta = grads.delta.mutable_data_ptr<float>();
  p.coarse_delta = grads.coarse_delta.mutable_data_ptr<float>();
  p.variance = c.pooled.variance.mutable_data_ptr<float>();
  p.row_bias = c.pooled.row_bias.mutable_data_ptr<float>();
  p.slope = c.slope.mutable_data_ptr<float>();
  return launch_by_dim(term.launch, term.dim, [&](auto dim) {
    return sm90::launch_order1_delta<dim()>(p, device, term.launch.stream);
  });
#else
  return false;
#endif
}

// Fills grads.query, or adds to it, and returns dC and dSigma: in one reading, or undefined where
// no kernel does it so. Sets `of_rows`.
Tensor rows_at_once(const Term& term, const Tensor& grad_out, const FineBackward& back,
                    const Grads& grads, bool add, Tensor& of_rows) {
  if (!order1_on_hopper(term.in.key, term.o, term.launch)) return {};
  const Centred& c = *back.centred;
  const Tensor& made = c.pooled.centre_term;
  const Tensor products = made.defined() ? made : centre_matrices(term, c);
  sm90::Order1Rows p{};
  p.share = back.share.const_data_ptr<float>();
  p.variance = c.pooled.variance.const_data_ptr<float>();
  p.slope = c.slope.const_data_ptr<float>();
  p.coarse_sum = back.coarse_sum.const_data_ptr<float>();
  p.centre = c.centre.const_data_ptr<float>();
  p.centre_term = products.const_data_ptr<float>();
  p.scale = static_cast<float>(term.o.scale);
  p.add = add;
  return order1_rows_on_hopper(term, c.moments, grad_out, grads.query, p, &of_rows);
}

// The same on the generic kernels, which add to grads.query.
Tensor rows_and_gram(const Term& term, const Tensor& grad_out, const Centred& c,
                     const RowWeights& rows, const Grads& grads) {
  Order1Rows p = centred_rows(term, c, {}, RowsStep::gradient);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_strides = strides_of(grad_out);
  p.shift = rows.shift.const_data_ptr<float>();
  p.weight_c = rows.a();
  p.weight_s = rows.b();
  p.grad_q = grads.query.mutable_data_ptr();
  p.grad_q_strides = strides_of(grads.query);
  term.launch.check(order1_rows(p, term.launch.stream));

  return term.weighted_sums(grad_out, rows.a(), rows.b(), p.centre);
}

}  // namespace

void centred_delta(FineBackward& grads, const Tensor& out, const Tensor& grad_lse, const Inputs& in,
                   Centred& c, const BlockList& rows, const Options& o) {
  const Launch launch(in.query);
  if (!o.causal) {
    const Term term(launch, in, c.pooled, o);
    if (pooled_order1(grads, out, grad_lse, term, c, rows)) return;
    if (delta_on_hopper(grads, out, grad_lse, term, c)) return;
  }
  grads.delta = row_dots(grads.grad_out, out, grad_lse);
  empty_row_numbers(grads, c);
  if (o.causal && !c.queries.defined()) {
    if (walk_slope(c, grads, Term(launch, in, c.pooled, o))) return;
    less_centres(c, in, o);
  }
  const Inputs from = order1_inputs(in, c);
  const Term term(launch, from, c.pooled, o);
  const Tensor grad_out = with_aligned_rows(grads.grad_out);
  Order1Rows p = centred_rows(term, c, grads.share, RowsStep::delta);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_strides = strides_of(grad_out);
  p.delta = grads.delta.const_data_ptr<float>();
  p.slope = c.slope.mutable_data_ptr<float>();
  p.coarse_delta = grads.coarse_delta.mutable_data_ptr<float>();
  launch.check(order1_rows(p, launch.stream));
}

CentreGrads centred_grads(const Grads& grads, const Tensor& shares, const Tensor& mass_grad,
                          const FineBackward& back, const Inputs& in, const Options& o, bool add,
                          const ColumnsWithOrder1& columns) {
  const Launch launch(in.query);
  const Centred& c = *back.centred;
  const Inputs from = order1_inputs(in, c);
  const Term term(launch, from, c.pooled, o);
  const Tensor grad_out = with_aligned_rows(back.grad_out);
  CentreGrads result;
  result.of_rows = back.coarse_rows.of_rows;
  Tensor moment_grads = back.coarse_rows.moment_grads;
  if (!moment_grads.defined()) {
    moment_grads = rows_at_once(term, grad_out, back, grads, add, result.of_rows);
  }
  if (!moment_grads.defined()) {
    const RowWeights rows(term, grad_out, back);
    if (o.causal && !c.queries.defined()) {
      return walk_gradient(c, term, grad_out, rows.a(), rows.b(), shares, mass_grad, grads, add);
    }
    if (!add) grads.query.zero_();
    moment_grads = rows_and_gram(term, grad_out, c, rows, grads);
    result.of_rows = rows.of_centres;
  }
  WeightGrads through{shares, mass_grad, c.centre};
  order1_key_grads(term, moment_grads, &through, grads, false, columns);
  result.of_keys = through.centre_grads;
  result.key_part = through.key_part;
  result.value_part = through.value_part;
  return result;
}

namespace {

// Fills grads.key and grads.value, and returns what the centre gets of each block, [B, Hk, nk, D].
Tensor through_weights(const Grads& grads, const Tensor& shares, const Tensor& mass_grad,
                       const CentreGrads& parts, const Centred& c, const Inputs& in,
                       const Options& o, const Launch& launch) {
  const Tensor key_mean = with_aligned_rows(c.pooled.key);
  const Tensor value_mean = with_aligned_rows(c.pooled.value);
  const Tensor sums = allocate_like(key_mean);
  KeyWeightsBackwardParams p{};
  p.k = in.key.const_data_ptr();
  p.v = in.value.const_data_ptr();
  p.k_strides = strides_of(in.key);
  p.v_strides = strides_of(in.value);
  p.part_k = data_of<float>(parts.key_part);
  p.part_v = data_of<float>(parts.value_part);
  if (p.part_k != nullptr) {
    p.part_k_strides = strides_of(parts.key_part);
    p.part_v_strides = strides_of(parts.value_part);
  }
  p.grad_k = grads.key.mutable_data_ptr();
  p.grad_v = grads.value.mutable_data_ptr();
  p.grad_k_strides = strides_of(grads.key);
  p.grad_v_strides = strides_of(grads.value);
  p.weights = c.pooled.weights.const_data_ptr<float>();
  p.k_mean = key_mean.const_data_ptr<float>();
  p.v_mean = value_mean.const_data_ptr<float>();
  p.shares = shares.const_data_ptr<float>();
  p.mass_grad = mass_grad.const_data_ptr<float>();
  p.centre = c.centre.const_data_ptr<float>();
  p.sums = sums.mutable_data_ptr<float>();
  p.causal = o.causal;
  p.centres = centres_of(in, o);
  p.dtype = dtype_of(in.key);
  p.B = static_cast<int>(in.key.size(0));
  p.Hk = static_cast<int>(in.key.size(1));
  p.M = static_cast<int>(in.key.size(2));
  p.D = static_cast<int>(in.key.size(3));
  p.nk = static_cast<int>(key_mean.size(2));
  p.log2_block_k = log2_of(o.block_k);
  p.scale = static_cast<float>(o.scale);
  launch.check(key_weights_backward(p, launch.stream));
  return sums;
}

}  // namespace

Tensor key_weights_grads(const Grads& grads, const Tensor& shares, const Tensor& mass_grad,
                         CentreGrads of_centre, const FineBackward& back, const Inputs& in,
                         const Options& o) {
  const Launch launch(in.query);
  const Centred& c = *back.centred;
  const bool walked = of_centre.of_keys.defined() && o.causal;
  if (!of_centre.of_keys.defined()) {
    of_centre.of_keys = through_weights(grads, shares, mass_grad, of_centre, c, in, o, launch);
  }
  const auto fill = [&](auto& p) {
    p.count = c.pooled.query_count.const_data_ptr<int>();
    p.B = static_cast<int>(in.query.size(0));
    p.H = static_cast<int>(in.query.size(1));
    p.Hk = static_cast<int>(in.key.size(1));
    p.D = static_cast<int>(in.query.size(3));
  };
  Tensor each;  // what every query gets, or those of a block
  if (o.causal) {
    CausalCentreGradParams p{};
    fill(p);
    p.centres = centres_of(in, o);
    p.nk = static_cast<int>(c.pooled.key_count.size(1));
    p.of_keys = of_centre.of_keys.const_data_ptr<float>();
    p.key_parts = static_cast<int>(of_centre.of_keys.size(2));
    if (of_centre.of_rows.defined()) {
      p.of_rows = of_centre.of_rows.const_data_ptr<float>();
      p.row_heads = static_cast<int>(of_centre.of_rows.size(1)) / p.Hk;
      p.row_parts = static_cast<int>(of_centre.of_rows.size(2));
    }
    if (walked) {
      p.log2_key_parts = log2_of(o.block_k / 16);
      p.log2_row_parts = log2_of(o.block_q / 16);
    }
    each = allocate({p.B, p.Hk, p.centres.nq, p.D}, c.centre.options());
    p.centre_grad = each.mutable_data_ptr<float>();
    launch.check(causal_centre_grad(p, launch.stream));
  } else {
    CentreGradParams p{};
    fill(p);
    p.sums = of_centre.of_keys.const_data_ptr<float>();
    p.nq = static_cast<int>(c.pooled.query_count.size(1));
    p.parts = static_cast<int>(of_centre.of_keys.size(2));
    if (of_centre.of_rows.defined()) {
      p.row_sums = of_centre.of_rows.const_data_ptr<float>();
      p.row_parts = static_cast<int>(of_centre.of_rows.size(2)) * p.H / p.Hk;
    }
    each = allocate_like(c.centre);
    p.centre_grad = each.mutable_data_ptr<float>();
    launch.check(centre_grad(p, launch.stream));
  }
  return each;
}

void add_to_queries(const Tensor& grad_query, const Tensor& each, const Inputs& in,
                    const Options& o) {
  shift(grad_query, grad_query, each, 1.f, in, o, Launch(in.query));
}

}  // namespace mra::cuda
