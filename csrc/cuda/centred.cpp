// pool = centred and sampled on CUDA: weights of the keys, the means and moments that they make,
// and order 1 with these. Allocates and launches centred_*.cu and the kernels of order 1.
#include <ATen/Context.h>

#include <algorithm>

#include "centred_term.h"

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

// The rows that make the weights, and the mean query itself in `c`.
struct Sample {
  Tensor rows, offsets;

  Sample(Centred& c, const Inputs& in, const PooledInputs& plain, const Options& o,
         const Launch& launch) {
    const int64_t B = in.query.size(0), Hk = in.key.size(1), D = in.query.size(3);
    const auto acc = in.query.options().dtype(at::kFloat);
    rows = allocate({B, Hk, kSampleRows, D}, in.query.options());
    offsets = allocate({B, Hk, kSampleRows}, acc);
    c.centre = allocate({B, Hk, D}, acc);
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
  }
};

// Under causal, one before each block of queries.
Tensor centres_before(const Inputs& in, const PooledInputs& plain, const Launch& launch) {
  const int64_t B = in.query.size(0), Hk = in.key.size(1), D = in.query.size(3);
  CausalCentresParams p{};
  p.nq = static_cast<int>(plain.query.size(2));
  const Tensor centre = allocate({B, Hk, p.nq + 1, D}, plain.query.options());
  p.mean = plain.query.const_data_ptr<float>();
  p.count = plain.query_count.const_data_ptr<int>();
  p.centre = centre.mutable_data_ptr<float>();
  p.B = static_cast<int>(B);
  p.H = static_cast<int>(in.query.size(1));
  p.Hk = static_cast<int>(Hk);
  p.D = static_cast<int>(D);
  launch.check(causal_centres(p, launch.stream));
  return centre;
}

}  // namespace

// The centre, the weights of all keys, and what comes with them.
Centred weigh_keys(const Inputs& in, PooledInputs& plain, bool bias, const Options& o) {
  const Launch launch(in.query);
  Centred c;
  c.pooled.type = in.query.scalar_type();
  const int64_t B = in.query.size(0), Hk = in.key.size(1);
  const int64_t nk = ceil_div(in.key.size(2), o.block_k);
  const auto acc = in.query.options().dtype(at::kFloat);
  std::optional<Sample> sample;
  if (o.causal) {
    c.centre = centres_before(in, plain, launch);
  } else {
    sample.emplace(c, in, plain, o, launch);
  }

  WeightsParams p{};
  const bool counted = plain.key_count.defined();
  if (!counted) plain.key_count = allocate({B, nk}, acc.dtype(at::kInt));
  c.pooled.query_count = plain.query_count;
  c.pooled.key_count = plain.key_count;
  c.pooled.weights = allocate({B, Hk, nk * o.block_k}, acc);
  c.pooled.mass = allocate({B, Hk, nk}, acc);
  if (bias) c.key_bias = allocate({B, Hk, nk}, acc);
  p.k = in.key.const_data_ptr();
  p.k_strides = strides_of(in.key);
  p.mask = mask_of(in.key_mask);
  if (sample) {
    p.rows = sample->rows.const_data_ptr();
    p.offsets = sample->offsets.const_data_ptr<float>();
  } else {
    p.centre = c.centre.const_data_ptr<float>();
    p.centres = centres_of(in, o);
  }
  p.weights = c.pooled.weights.mutable_data_ptr<float>();
  p.mass = c.pooled.mass.mutable_data_ptr<float>();
  p.key_bias = data_of<float>(c.key_bias);
  p.count = counted ? nullptr : plain.key_count.mutable_data_ptr<int>();
  p.dtype = dtype_of(in.query);
  p.tf32 = at::globalContext().allowTF32CuBLAS();
  p.B = static_cast<int>(B);
  p.Hk = static_cast<int>(Hk);
  p.M = static_cast<int>(in.key.size(2));
  p.D = static_cast<int>(in.key.size(3));
  p.nk = static_cast<int>(nk);
  p.log2_block_k = log2_of(o.block_k);
  p.scale = static_cast<float>(o.scale);
  if (o.causal) {
    launch.check(causal_key_weights(p, launch.stream));
    return c;
  }
  cut(p, launch.device);
  Tensor parts;
  if (o.pool == Pool::sampled) {
    parts = allocate({B, Hk, p.chunks, kSampleRows, 2}, acc);
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

// t_i of each row, and what is added to its coarse logits.
void row_variances(const Term& term, Centred& c) {
  c.pooled.variance = allocate({term.B, term.H, term.N}, term.acc());
  c.pooled.row_bias = allocate_like(c.pooled.variance);
  term.launch.check(order1_rows(centred_rows(term, c, {}, RowsStep::variance), term.launch.stream));
}

// Under causal.
void centre_causal(Centred& c, const Inputs& in, bool backward, const Options& o) {
  const Launch launch(in.query);
  if (walks_centred(in, o, backward, launch)) {
    walk_moments(c, in, o);
    if (backward || walk_prepare(c, Term(launch, in, c.pooled, o))) return;
  }
  if (!c.pooled.key.defined()) pool_weighted(c.pooled, in, o);
  less_centres(c, in, o);
  if (backward) return;
  const Inputs from = order1_inputs(in, c);
  row_variances(Term(launch, from, c.pooled, o), c);
}

}  // namespace

void centre(Centred& c, const Inputs& in, bool backward, const Options& o) {
  if (has_order1(o) && o.causal) return centre_causal(c, in, backward, o);
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
  c.pooled.centre_term = allocate({term.B, term.Hk, 2, term.dim}, term.acc());
  CentreProductsParams p = products_of(term, c, c.pooled.centre_term);
  p.matrices = multiplied.matrices.const_data_ptr();
  p.dtype = term.dtype;
  launch.check(centre_products(p, launch.stream));
  c.pooled.beside = true;
}

Tensor centred_row_bias(const Inputs& in, const PooledInputs& pooled, const Options& o) {
  const Launch launch(in.query);
  const Term term(launch, in, pooled, o);
  Centred c{pooled, pooled.centre};
  c.moments = pooled.moments;
  row_variances(term, c);
  return c.pooled.row_bias;
}

void centred_term(FineResult& result, const Inputs& in, const Centred& made, const Options& o) {
  const Launch launch(in.query);
  Centred c = made;
  if (o.causal && !c.queries.defined()) less_centres(c, in, o);
  const Inputs from = order1_inputs(in, c);
  const Term term(launch, from, c.pooled, o);
  Order1Rows p = centred_rows(term, c, result.share, RowsStep::term);
  p.out = result.out.mutable_data_ptr();
  p.out_strides = strides_of(result.out);
  launch.check(order1_rows(p, launch.stream));
}

}  // namespace mra::cuda
