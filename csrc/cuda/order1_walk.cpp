// Order 1 by the kernels that walk the rows of a chunk: see sm90/order1_walk.h.
#include "order1_walk.h"

#include <ATen/ops/empty.h>

#include "sm90/moments.h"

namespace mra::cuda {

#ifdef MRA_SM90A

namespace {

// What all of a call's launches share.
struct Walk {
  const Term& term;
  const WalkCut cut;
  sm90::WalkRows params;

  Walk(const Term& term, const WalkCut& cut) : term(term), cut(cut), params(walk_params(term)) {
    params.unit_tiles = cut.unit_tiles;
    params.chunks = cut.chunks;
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

  bool rows(const sm90::WalkRows& p) const {
    return launch([&](auto dim) {
      return sm90::launch_order1_walk_rows<dim()>(p, term.launch.device, term.launch.stream);
    });
  }
  bool keys(const sm90::WalkKeys& p) const {
    return launch([&](auto dim) {
      return sm90::launch_order1_walk_keys<dim()>(p, term.launch.device, term.launch.stream);
    });
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
  const Tensor weights = at::empty({rows.B, rows.H, ceil_div(rows.N, 64) * 64, 2}, term.acc());
  rows.grad_out = grad_out.const_data_ptr();
  rows.grad_out_strides = strides_of(grad_out);
  rows.weights = weights.mutable_data_ptr<float>();
  rows.share = share.const_data_ptr<float>();
  rows.start = data_of<float>(start);
  rows.delta = delta.const_data_ptr<float>();
  rows.coarse_delta = grads.coarse_delta.mutable_data_ptr<float>();
  rows.grad_q = grads.query.mutable_data_ptr();
  rows.grad_q_strides = strides_of(grads.query);
  if (!walk.rows(rows)) return false;

  sm90::WalkKeys keys{rows};
  keys.start = nullptr;
  if (rows.chunks > 1) {  // `start` is no longer read once the sums are written
    keys.sums = start.mutable_data_ptr<float>();
    if (!walk.keys(keys)) return false;
    term.launch.check(order1_sum_others(keys.sums, int64_t{rows.B} * rows.Hk, rows.chunks, cut->dim,
                                        true, term.launch.stream));
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

bool order1_walk(FineResult&, const Term&) { return false; }
bool order1_walk_backward(const Tensor&, const Tensor&, const Tensor&, const Term&,
                          const Order1Grads&) {
  return false;
}

#endif

}  // namespace mra::cuda
