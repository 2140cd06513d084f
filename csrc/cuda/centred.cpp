// pool = centred and sampled on CUDA: weights of the keys, the means and moments that they make,
// and order 1 with these. Allocates and launches centred_*.cu and the kernels of order 1.
#include "centred.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "centred_grads.h"
#include "order1_term.h"

namespace mra::cuda {
namespace {

// Parts of a head whose blocks of threads, each of eight warps, end soonest.
void cut(WeightsParams& p, const Device& device) {
  const int64_t heads = int64_t{p.B} * p.Hk, slots = key_weights_slots(p.dtype, device);
  const int64_t tiles = std::max(1, (1 << p.log2_block_k) / 16);  // of sixteen keys in a block
  int64_t least = -1;
  for (int64_t chunks = 1; chunks <= std::min(p.nk, 64); ++chunks) {
    const int64_t each = ceil_div(p.nk, chunks);
    if (ceil_div(p.nk, each) != chunks) continue;
    // A block of threads costs some six tiles besides its own.
    const int64_t cost = ceil_div(heads * chunks, slots) * (ceil_div(each, 8) * tiles + 6);
    if (least >= 0 && cost >= least) continue;
    least = cost;
    p.chunks = static_cast<int>(chunks);
    p.chunk_blocks = static_cast<int>(each);
  }
}

}  // namespace

// The centre, the weights of all keys, and what comes with them.
Centred weigh_keys(const Inputs& in, PooledInputs& plain, bool bias, const Options& o) {
  const Launch launch(in.query);
  Centred c;
  c.pooled.type = in.query.scalar_type();
  const int64_t B = in.query.size(0), Hk = in.key.size(1), D = in.query.size(3);
  const int64_t nk = ceil_div(in.key.size(2), o.block_k);
  const auto acc = in.query.options().dtype(at::kFloat);
  const Tensor rows = at::empty({B, Hk, kSampleRows, D}, in.query.options());
  const Tensor offsets = at::empty({B, Hk, kSampleRows}, acc);
  c.centre = at::empty({B, Hk, D}, acc);
  SampleParams s{};
  s.q = in.query.const_data_ptr();
  s.q_strides = strides_of(in.query);
  s.mean = plain.query.const_data_ptr<float>();
  s.count = plain.query_count.const_data_ptr<int>();
  s.mask = mask_of(in.query_mask);
  s.centre = c.centre.mutable_data_ptr<float>();
  s.rows = rows.mutable_data_ptr();
  s.offsets = offsets.mutable_data_ptr<float>();
  s.dtype = dtype_of(in.query);
  s.B = static_cast<int>(B);
  s.H = static_cast<int>(in.query.size(1));
  s.Hk = static_cast<int>(Hk);
  s.N = static_cast<int>(in.query.size(2));
  s.D = static_cast<int>(D);
  s.nq = static_cast<int>(plain.query.size(2));
  s.log2_block_q = log2_of(o.block_q);
  launch.check(sample_queries(s, launch.stream));

  WeightsParams p{};
  const bool counted = plain.key_count.defined();
  if (!counted) plain.key_count = at::empty({B, nk}, acc.dtype(at::kInt));
  c.pooled.query_count = plain.query_count;
  c.pooled.key_count = plain.key_count;
  c.pooled.weights = at::empty({B, Hk, nk * o.block_k}, acc);
  c.pooled.mass = at::empty({B, Hk, nk}, acc);
  if (bias) c.key_bias = at::empty({B, Hk, nk}, acc);
  p.k = in.key.const_data_ptr();
  p.k_strides = strides_of(in.key);
  p.mask = mask_of(in.key_mask);
  p.rows = s.rows;
  p.offsets = s.offsets;
  p.weights = c.pooled.weights.mutable_data_ptr<float>();
  p.mass = c.pooled.mass.mutable_data_ptr<float>();
  p.key_bias = data_of<float>(c.key_bias);
  p.count = counted ? nullptr : plain.key_count.mutable_data_ptr<int>();
  p.dtype = s.dtype;
  p.tf32 = at::globalContext().allowTF32CuBLAS();
  p.B = s.B;
  p.Hk = s.Hk;
  p.M = static_cast<int>(in.key.size(2));
  p.D = s.D;
  p.nk = static_cast<int>(nk);
  p.log2_block_k = log2_of(o.block_k);
  p.scale = static_cast<float>(o.scale);
  cut(p, launch.device);
  Tensor parts;
  if (o.pool == Pool::sampled) {
    parts = at::empty({B, Hk, p.chunks, kSampleRows, 2}, acc);
    p.parts = reinterpret_cast<float2*>(parts.mutable_data_ptr<float>());
    launch.check(sample_lse(p, launch.stream));
  }
  if (weighs_with_moments(in, o, launch)) {
    c.moments = weigh_with_moments(in, o, p, c.pooled, plain);
  } else {
    launch.check(key_weights(p, launch.stream));
  }
  return c;
}

namespace {

// A launch of order1_rows with the queries less their centre.
Order1Rows centred_rows(const Term& term, const Centred& c, const Tensor& share, RowsStep step) {
  Order1Rows p = term.rows(c.moments, share, step);
  p.centre = c.centre.const_data_ptr<float>();
  p.mask = mask_of(term.in.query_mask);
  p.variance = data_of<float>(c.pooled.variance);
  p.row_bias = data_of<float>(c.pooled.row_bias);
  return p;
}

CentreProductsParams products_of(const Term& term, const Centred& c, const Tensor& result) {
  CentreProductsParams p{};
  p.matrices = c.moments.const_data_ptr();
  p.centre = c.centre.const_data_ptr<float>();
  p.count = c.pooled.query_count.const_data_ptr<int>();
  p.result = result.mutable_data_ptr<float>();
  p.dtype = term.dtype == Dtype::bf16 ? Dtype::bf16 : Dtype::f32;
  p.B = term.B;
  p.H = term.H;
  p.Hk = term.Hk;
  p.D = term.D;
  p.dim = term.dim;
  p.nq = static_cast<int>(c.pooled.query_count.size(1));
  return p;
}

// t_i of each row, and what is added to its coarse logits.
void row_variances(const Term& term, Centred& c) {
  c.pooled.variance = at::empty({term.B, term.H, term.N}, term.acc());
  c.pooled.row_bias = at::empty_like(c.pooled.variance);
  term.launch.check(order1_rows(centred_rows(term, c, {}, RowsStep::variance), term.launch.stream));
}

// a and b of each row (RowWeightsParams), [2, B, H, N], and the shift of CentreProductsParams.
struct RowWeights {
  Tensor weights, shift;

  RowWeights(const Term& term, const Tensor& grad_out, const FineBackward& back) {
    const Centred& c = *back.centred;
    RowWeightsParams p{};
    p.parts = static_cast<int>(ceil_div(term.N, kRowWeightsRows));
    weights = at::empty({2, term.B, term.H, term.N}, term.acc());
    shift = at::empty({term.B, term.Hk, 2, term.dim}, term.acc());
    const Tensor sums = at::empty({term.B, term.H, p.parts, 2, term.D}, term.acc());
    p.q = term.in.query.const_data_ptr();
    p.grad_out = grad_out.const_data_ptr();
    p.q_strides = strides_of(term.in.query);
    p.grad_out_strides = strides_of(grad_out);
    p.share = back.share.const_data_ptr<float>();
    p.variance = c.pooled.variance.const_data_ptr<float>();
    p.slope = c.slope.const_data_ptr<float>();
    p.coarse_sum = back.coarse_sum.const_data_ptr<float>();
    p.centre = c.centre.const_data_ptr<float>();
    p.a = a();
    p.b = b();
    p.sums = sums.mutable_data_ptr<float>();
    p.dtype = term.dtype;
    p.B = term.B;
    p.H = term.H;
    p.Hk = term.Hk;
    p.N = term.N;
    p.D = term.D;
    p.scale = static_cast<float>(term.o.scale);
    term.launch.check(row_weights(p, term.launch.stream));
    CentreProductsParams products = products_of(term, c, shift);
    products.sums = p.sums;
    products.parts = p.parts;
    term.launch.check(centre_products(products, term.launch.stream));
  }
  float* a() const { return weights.mutable_data_ptr<float>(); }
  float* b() const { return a() + weights.numel() / 2; }
};

// Adds to grads.query, and returns dC and dSigma: in one reading, or undefined where no kernel does
// it so.
Tensor rows_at_once(const Term& term, const Tensor& grad_out, const Centred& c,
                    const RowWeights& rows, const Grads& grads) {
  sm90::Order1Rows p{};
  p.a = rows.a();
  p.b = rows.b();
  p.centre = c.centre.const_data_ptr<float>();
  p.shift = rows.shift.const_data_ptr<float>();
  p.mask = mask_of(term.in.query_mask);
  return order1_rows_on_hopper(term, c.moments, grad_out, grads.query, p);
}

// The same on the generic kernels.
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

void centre(Centred& c, const Inputs& in, bool backward, const Options& o) {
  if (has_order1(o) && !c.moments.defined()) {
    c.moments = pool_moments(in, o, &c.pooled, c.pooled.key_count);
  }
  if (!c.moments.defined() && !c.pooled.key.defined()) pool_weighted(c.pooled, in, o);
  if (!has_order1(o)) return;

  const Launch launch(in.query);
  const Term term(launch, in, c.pooled, o);
  if (!c.moments.defined()) c.moments = term.moments();
  if (backward) return;
  if (!order1_in_fine(in.key, o, launch)) return row_variances(term, c);
  // Fine makes variance and row_bias, from these.
  const FineMoments multiplied = fine_moments(c.moments, in.key, launch);
  c.pooled.moments = c.moments;
  c.pooled.fine_moments = multiplied.matrices;
  c.pooled.moment_scales = multiplied.scales;
  c.pooled.centre = c.centre;
  c.pooled.centre_term = at::empty({term.B, term.Hk, 2, term.dim}, term.acc());
  CentreProductsParams p = products_of(term, c, c.pooled.centre_term);
  p.matrices = multiplied.matrices.const_data_ptr();
  p.dtype = term.dtype;
  launch.check(centre_products(p, launch.stream));
}

Tensor centred_row_bias(const Inputs& in, const PooledInputs& pooled, const Options& o) {
  const Launch launch(in.query);
  const Term term(launch, in, pooled, o);
  Centred c{pooled, pooled.centre};
  c.moments = pooled.moments;
  row_variances(term, c);
  return c.pooled.row_bias;
}

void centred_term(FineResult& result, const Inputs& in, const Centred& c, const Options& o) {
  const Launch launch(in.query);
  const Term term(launch, in, c.pooled, o);
  Order1Rows p = centred_rows(term, c, result.share, RowsStep::term);
  p.out = result.out.mutable_data_ptr();
  p.out_strides = strides_of(result.out);
  launch.check(order1_rows(p, launch.stream));
}

Tensor centred_delta(const Tensor& grad_out_in, const Tensor& share, const Tensor& delta,
                     const Inputs& in, Centred& c, const Options& o) {
  const Launch launch(in.query);
  const Term term(launch, in, c.pooled, o);
  const Tensor grad_out = with_aligned_rows(grad_out_in), result = at::empty_like(delta);
  c.pooled.variance = at::empty_like(delta);
  c.pooled.row_bias = at::empty_like(delta);
  c.slope = at::empty_like(delta);
  Order1Rows p = centred_rows(term, c, share, RowsStep::delta);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_strides = strides_of(grad_out);
  p.delta = delta.const_data_ptr<float>();
  p.slope = c.slope.mutable_data_ptr<float>();
  p.coarse_delta = result.mutable_data_ptr<float>();
  launch.check(order1_rows(p, launch.stream));
  return result;
}

Tensor centred_grads(const Grads& grads, const Tensor& shares, const Tensor& mass_grad,
                     const FineBackward& back, const Inputs& in, const Options& o) {
  const Launch launch(in.query);
  const Centred& c = *back.centred;
  const Term term(launch, in, c.pooled, o);
  const Tensor grad_out = with_aligned_rows(back.grad_out);
  const RowWeights rows(term, grad_out, back);
  Tensor moment_grads = rows_at_once(term, grad_out, c, rows, grads);
  if (!moment_grads.defined()) moment_grads = rows_and_gram(term, grad_out, c, rows, grads);
  WeightGrads through{shares, mass_grad, c.centre};
  order1_key_grads(term, moment_grads, &through, grads);
  return through.centre_grads;
}

namespace {

// Adds to grads.key, and returns what the centre gets of each block, [B, Hk, nk, D].
Tensor through_weights(const Grads& grads, const Tensor& shares, const Tensor& mass_grad,
                       const Centred& c, const Inputs& in, const Options& o, const Launch& launch) {
  const Tensor key_mean = with_aligned_rows(c.pooled.key);
  const Tensor value_mean = with_aligned_rows(c.pooled.value);
  const Tensor sums = at::empty_like(key_mean);
  KeyWeightsBackwardParams p{};
  p.k = in.key.const_data_ptr();
  p.v = in.value.const_data_ptr();
  p.k_strides = strides_of(in.key);
  p.v_strides = strides_of(in.value);
  p.grad_k = grads.key.mutable_data_ptr();
  p.grad_v = grads.value.const_data_ptr();
  p.grad_k_strides = strides_of(grads.key);
  p.grad_v_strides = strides_of(grads.value);
  p.weights = c.pooled.weights.const_data_ptr<float>();
  p.k_mean = key_mean.const_data_ptr<float>();
  p.v_mean = value_mean.const_data_ptr<float>();
  p.shares = shares.const_data_ptr<float>();
  p.mass_grad = mass_grad.const_data_ptr<float>();
  p.centre = c.centre.const_data_ptr<float>();
  p.sums = sums.mutable_data_ptr<float>();
  p.moments = has_order1(o);
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

void key_weights_grads(const Grads& grads, const Tensor& shares, const Tensor& mass_grad,
                       Tensor centre_grads, const FineBackward& back, const Inputs& in,
                       const Options& o) {
  const Launch launch(in.query);
  const Centred& c = *back.centred;
  if (!centre_grads.defined()) {
    centre_grads = through_weights(grads, shares, mass_grad, c, in, o, launch);
  }
  const Tensor each = at::empty_like(c.centre);
  CentreGradParams p{};
  p.sums = centre_grads.const_data_ptr<float>();
  p.count = c.pooled.query_count.const_data_ptr<int>();
  p.mask = mask_of(in.query_mask);
  p.centre_grad = each.mutable_data_ptr<float>();
  p.grad_q = grads.query.mutable_data_ptr();
  p.grad_q_strides = strides_of(grads.query);
  p.dtype = dtype_of(in.query);
  p.B = static_cast<int>(in.query.size(0));
  p.H = static_cast<int>(in.query.size(1));
  p.Hk = static_cast<int>(in.key.size(1));
  p.N = static_cast<int>(in.query.size(2));
  p.D = static_cast<int>(in.query.size(3));
  p.nq = static_cast<int>(c.pooled.query_count.size(1));
  p.parts = static_cast<int>(centre_grads.size(2));
  launch.check(centre_grad(p, launch.stream));
}

}  // namespace mra::cuda
