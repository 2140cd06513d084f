// Order 1 under causal by Hopper's kernels: see sm90/order1_causal.h.
#include "order1_causal.h"

#include <ATen/ops/empty_like.h>

#include "sm90/moments.h"
#include "sm90/order1_causal.h"

namespace mra::cuda {

#ifdef MRA_SM90A

namespace {

// What all of a call's launches share.
struct Walk {
  const Term& term;
  const CausalCut cut;
  sm90::CausalChunks chunks{};

  Walk(const Term& term, const CausalCut& cut) : term(term), cut(cut) {
    const Inputs& in = term.in;
    auto& c = chunks;
    c.B = term.B;
    c.H = term.H;
    c.Hk = term.Hk;
    c.N = term.N;
    c.D = term.D;
    c.nk = term.nk;
    c.log2_block_k = term.block_shift;
    c.unit_tiles = cut.unit_tiles;
    c.chunks = cut.chunks;
    c.k = in.key.const_data_ptr();
    c.v = in.value.const_data_ptr();
    c.k_strides = strides_of(in.key);
    c.v_strides = strides_of(in.value);
    c.mask = mask_of(in.key_mask);
    c.q = in.query.const_data_ptr();
    c.q_strides = strides_of(in.query);
  }

  // Sums of chunks -> those of the chunks behind each.
  void sum_behind(const Tensor& sums) const {
    Order1Sum s{};
    s.exclusive = s.backward = true;
    s.B = chunks.B;
    s.heads = chunks.Hk;
    s.chunks = chunks.chunks;
    s.dim = cut.dim;
    s.sums = sums.mutable_data_ptr<float>();
    term.launch.check(order1_sum(s, term.launch.stream));
  }

  // Calls f with the padded head dim, an integral_constant; false where no kernel does it.
  template <class F>
  bool launch(F f) const {
    const cudaError_t error = cut.dim <= 64 ? f(std::integral_constant<int, 64>{})
                                            : f(std::integral_constant<int, 128>{});
    if (error == cudaErrorNotSupported) return false;
    term.launch.check(error);
    return true;
  }

  bool rows(const sm90::CausalRows& p) const {
    return launch([&](auto dim) {
      return sm90::launch_order1_causal_rows<dim()>(p, term.launch.device, term.launch.stream);
    });
  }
  bool keys(const sm90::CausalKeys& p) const {
    return launch([&](auto dim) {
      return sm90::launch_order1_causal_keys<dim()>(p, term.launch.device, term.launch.stream);
    });
  }

  sm90::CausalRows rows_params(const Tensor& share, const Tensor& start) const {
    sm90::CausalRows p{chunks};
    p.key_count = term.pooled.key_count.const_data_ptr<int>();
    p.share = share.const_data_ptr<float>();
    p.scale = static_cast<float>(term.o.scale);
    p.start = data_of<float>(start);
    return p;
  }
};

// Undefined for one chunk; false where no kernel does it.
bool moments_before(Tensor& start, const Term& term, const CausalCut& cut) {
  if (cut.chunks > 1) start = causal_moments(term.in, term.o, cut, nullptr);
  return cut.chunks == 1 || start.defined();
}

}  // namespace

bool order1_causal(FineResult& result, const Term& term) {
  const auto cut = causal_cut(term.in, term.o, term.launch);
  if (!cut) return false;
  Tensor start = term.pooled.moments_before;
  if (!start.defined() && !moments_before(start, term, *cut)) return false;
  const Walk walk(term, *cut);
  sm90::CausalRows p = walk.rows_params(result.share, start);
  p.out = result.out.mutable_data_ptr();
  p.out_strides = strides_of(result.out);
  return walk.rows(p);
}

bool order1_causal_backward(const Tensor& grad_out, const Tensor& share, const Tensor& delta,
                            const Term& term, const Order1Grads& grads) {
  const auto cut = causal_cut(term.in, term.o, term.launch);
  Tensor start;
  if (!cut || !moments_before(start, term, *cut)) return false;
  Walk walk(term, *cut);
  sm90::CausalChunks& c = walk.chunks;
  const Tensor weights = at::empty({c.B, c.H, ceil_div(c.N, 64) * 64, 2}, term.acc());
  c.grad_out = grad_out.const_data_ptr();
  c.grad_out_strides = strides_of(grad_out);
  c.weights = weights.mutable_data_ptr<float>();
  sm90::CausalRows rows = walk.rows_params(share, start);
  rows.delta = delta.const_data_ptr<float>();
  rows.coarse_delta = grads.coarse_delta.mutable_data_ptr<float>();
  rows.grad_q = grads.query.mutable_data_ptr();
  rows.grad_q_strides = strides_of(grads.query);
  if (!walk.rows(rows)) return false;

  sm90::CausalKeys keys{c};
  if (c.chunks > 1) {  // `start` is no longer read once the sums are written
    keys.sums = start.mutable_data_ptr<float>();
    if (!walk.keys(keys)) return false;
    walk.sum_behind(start);
    keys.sums = nullptr;
    keys.start = start.const_data_ptr<float>();
  }
  keys.grad_k = grads.key.mutable_data_ptr();
  keys.grad_v = grads.value.mutable_data_ptr();
  keys.grad_k_strides = strides_of(grads.key);
  keys.grad_v_strides = strides_of(grads.value);
  return walk.keys(keys);
}

#else

bool order1_causal(FineResult&, const Term&) { return false; }
bool order1_causal_backward(const Tensor&, const Tensor&, const Tensor&, const Term&,
                            const Order1Grads&) {
  return false;
}

#endif

}  // namespace mra::cuda
