// Order 1 by the kernels that walk the rows of a chunk: see sm90/order1_walk.h.
#include "order1_walk.h"

#include "sm90/moments.h"

namespace mra::cuda {

#ifdef MRA_SM90A

namespace {

// What all of a call's launches share.
struct Walk {
  const Term& term;
  const WalkCut cut;
  sm90::WalkRows params;

  Walk(const Term& term, const WalkCut& cut, const Centred* c = nullptr)
      : term(term), cut(cut), params(walk_params(term)) {
    params.unit_tiles = cut.unit_tiles;
    params.chunks = cut.chunks;
    if (c == nullptr) return;
    params.key_weights = c->pooled.weights.const_data_ptr<float>();
    params.centre = c->centre.const_data_ptr<float>();
    params.query_mask = mask_of(term.in.query_mask);
    params.nq = static_cast<int>(c->centre.size(2)) - 1;
    params.log2_block_q = log2_of(term.o.block_q);
  }

  bool rows(const sm90::WalkRows& p) const {
    return launch_by_dim(term.launch, cut.dim, [&](auto dim) {
      return sm90::launch_order1_walk_rows<dim()>(p, term.launch.device, term.launch.stream);
    });
  }
  bool keys(const sm90::WalkKeys& p) const {
    return launch_by_dim(term.launch, cut.dim, [&](auto dim) {
      return sm90::launch_order1_walk_keys<dim()>(p, term.launch.device, term.launch.stream);
    });
  }
  // Those of keys and values, behind the rows', which read `start` last: it takes their sums.
  bool gradients(sm90::WalkKeys p, const Tensor& start, const Tensor& grad_k,
                 const Tensor& grad_v) const {
    p.start = nullptr;
    if (p.chunks > 1) {
      p.sums = start.mutable_data_ptr<float>();
      if (!keys(p)) return false;
      term.launch.check(order1_sum_others(p.sums, int64_t{p.B} * p.Hk, p.chunks, cut.dim, true,
                                          term.launch.stream));
      p.sums = nullptr;
      p.start = start.const_data_ptr<float>();
    }
    p.grad_k = grad_k.mutable_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr();
    p.grad_k_strides = strides_of(grad_k);
    p.grad_v_strides = strides_of(grad_v);
    return keys(p);
  }
};

// Under causal, what chunks start from: undefined for one; false where no kernel does it.
bool find_start(Tensor& start, const Term& term, const WalkCut& cut) {
  start = term.pooled.moments_before;
  if (cut.chunks == 1 || start.defined()) return true;
  start = moments_before(term.in, term.o, cut, nullptr);
  return start.defined();
}

}  // namespace

sm90::WalkRows walk_params(const Term& term) {
  const Inputs& in = term.in;
  sm90::WalkRows p{};
  p.dtype = term.dtype;
  p.B = term.B;
  p.H = term.H;
  p.Hk = term.Hk;
  p.N = term.N;
  p.D = term.D;
  p.nk = term.nk;
  p.log2_block_k = term.block_shift;
  p.k = in.key.const_data_ptr();
  p.v = in.value.const_data_ptr();
  p.k_strides = strides_of(in.key);
  p.v_strides = strides_of(in.value);
  p.mask = mask_of(in.key_mask);
  p.q = in.query.const_data_ptr();
  p.q_strides = strides_of(in.query);
  p.causal = term.o.causal;
  p.key_count = data_of<int>(term.pooled.key_count);
  p.scale = static_cast<float>(term.o.scale);
  return p;
}

bool order1_walk(FineResult& result, const Term& term) {
  const auto cut = walk_cut(term.in, term.o, term.launch);
  Tensor start;
  if (!cut || !find_start(start, term, *cut)) return false;
  const Walk walk(term, *cut);
  sm90::WalkRows p = walk.params;
  p.step = sm90::WalkStep::term;
  p.share = result.share.const_data_ptr<float>();
  p.start = data_of<float>(start);
  p.out = result.out.mutable_data_ptr();
  p.out_strides = strides_of(result.out);
  return walk.rows(p);
}

bool order1_walk_backward(const Tensor& grad_out, const Tensor& share, const Tensor& delta,
                          const Term& term, const Order1Grads& grads) {
  const auto cut = walk_cut(term.in, term.o, term.launch);
  Tensor start;
  if (!cut || term.dtype != Dtype::bf16 || !find_start(start, term, *cut)) return false;
  const Walk walk(term, *cut);
  sm90::WalkRows rows = walk.params;
  rows.step = sm90::WalkStep::backward;
  const Tensor weights = allocate({rows.B, rows.H, ceil_div(rows.N, 64) * 64, 2}, term.acc());
  rows.grad_out = grad_out.const_data_ptr();
  rows.grad_out_strides = strides_of(grad_out);
  rows.weights = weights.mutable_data_ptr<float>();
  rows.share = share.const_data_ptr<float>();
  rows.start = data_of<float>(start);
  rows.delta = delta.const_data_ptr<float>();
  rows.coarse_delta = grads.coarse_delta.mutable_data_ptr<float>();
  rows.grad_q = grads.query.mutable_data_ptr();
  rows.grad_q_strides = strides_of(grads.query);
  return walk.rows(rows) && walk.gradients(sm90::WalkKeys{rows}, start, grads.key, grads.value);
}

bool walks_centred(const Inputs& in, const Options& o, bool backward, const Launch& launch) {
  return walk_cut(in, o, launch) && (!backward || in.query.scalar_type() == at::kBFloat16);
}

void walk_moments(Centred& c, const Inputs& in, const Options& o) {
  const Launch launch(in.query);
  const auto cut = walk_cut(in, o, launch);
  PooledInputs made;
  made.weights = c.pooled.weights;
  if (cut->chunks > 1) c.pooled.moments_before = moments_before(in, o, *cut, &made);
  if (c.pooled.key.defined()) return;
  if (!c.pooled.moments_before.defined()) pool_weighted(made, in, o);
  c.pooled.key = made.key;
  c.pooled.value = made.value;
  c.pooled.key_rounded = made.key_rounded;
  c.pooled.value_rounded = made.value_rounded;
}

bool walk_prepare(Centred& c, const Term& term) {
  const auto cut = walk_cut(term.in, term.o, term.launch);
  if (cut->chunks > 1 && !c.pooled.moments_before.defined()) return false;
  const Walk walk(term, *cut, &c);
  sm90::WalkRows p = walk.params;
  p.step = sm90::WalkStep::prepare;
  p.start = data_of<float>(c.pooled.moments_before);
  const Tensor variance = allocate({term.B, term.H, term.N}, term.acc());
  const Tensor row_bias = allocate_like(variance), made = empty_heads_last(term.in.query);
  p.variance = variance.mutable_data_ptr<float>();
  p.row_bias = row_bias.mutable_data_ptr<float>();
  p.out = made.mutable_data_ptr();
  p.out_strides = strides_of(made);
  if (!walk.rows(p)) return false;
  c.pooled.variance = variance;
  c.pooled.row_bias = row_bias;
  c.pooled.term = made;
  return true;
}

bool walk_slope(const Centred& c, const FineBackward& grads, const Term& term) {
  const auto cut = walk_cut(term.in, term.o, term.launch);
  if (term.dtype != Dtype::bf16) return false;
  if (cut->chunks > 1 && !c.pooled.moments_before.defined()) return false;
  const Walk walk(term, *cut, &c);
  const Tensor grad_out = with_aligned_rows(grads.grad_out);
  sm90::WalkRows p = walk.params;
  p.step = sm90::WalkStep::slope;
  p.start = data_of<float>(c.pooled.moments_before);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_strides = strides_of(grad_out);
  p.share = grads.share.const_data_ptr<float>();
  p.delta = grads.delta.const_data_ptr<float>();
  p.coarse_delta = grads.coarse_delta.mutable_data_ptr<float>();
  p.variance = c.pooled.variance.mutable_data_ptr<float>();
  p.row_bias = c.pooled.row_bias.mutable_data_ptr<float>();
  p.slope = c.slope.mutable_data_ptr<float>();
  return walk.rows(p);
}

CentreGrads walk_gradient(const Centred& c, const Term& term, const Tensor& grad_out,
                          const float* a, const float* b, const Tensor& shares,
                          const Tensor& mass_grad, const Grads& grads, bool add) {
  const Walk walk(term, *walk_cut(term.in, term.o, term.launch), &c);
  const Tensor start = c.pooled.moments_before;
  sm90::WalkRows rows = walk.params;
  rows.step = sm90::WalkStep::gradient;
  const int64_t tiles = ceil_div(rows.N, 64);
  const Tensor weights = allocate({rows.B, rows.H, 64 * tiles, 2}, term.acc());
  const CentreGrads result{allocate({rows.B, rows.H, 4 * tiles, rows.D}, term.acc()),
                           allocate({rows.B, rows.Hk, 4 * tiles, rows.D}, term.acc())};
  rows.grad_out = grad_out.const_data_ptr();
  rows.grad_out_strides = strides_of(grad_out);
  rows.weights = weights.mutable_data_ptr<float>();
  rows.start = data_of<float>(start);
  rows.a = a;
  rows.b = b;
  rows.row_sums = result.of_rows.mutable_data_ptr<float>();
  rows.grad_q = grads.query.mutable_data_ptr();
  rows.grad_q_strides = strides_of(grads.query);
  rows.add = add;
  sm90::WalkKeys keys{rows};
  keys.shares = shares.const_data_ptr<float>();
  keys.mass_grad = mass_grad.const_data_ptr<float>();
  keys.scale = rows.scale;
  keys.key_sums = result.of_keys.mutable_data_ptr<float>();
  const bool done = walk.rows(rows) && walk.gradients(keys, start, grads.key, grads.value);
  TORCH_INTERNAL_ASSERT(done, "kernels that walked the rows before refused to do it again");
  return result;
}

#else

bool order1_walk(FineResult&, const Term&) { return false; }
bool order1_walk_backward(const Tensor&, const Tensor&, const Tensor&, const Term&,
                          const Order1Grads&) {
  return false;
}
bool walks_centred(const Inputs&, const Options&, bool, const Launch&) { return false; }
void walk_moments(Centred&, const Inputs&, const Options&) {}
bool walk_prepare(Centred&, const Term&) { return false; }
bool walk_slope(const Centred&, const FineBackward&, const Term&) { return false; }
CentreGrads walk_gradient(const Centred&, const Term&, const Tensor&, const float*, const float*,
                          const Tensor&, const Tensor&, const Grads&, bool) {
  return {};
}

#endif

}  // namespace mra::cuda
