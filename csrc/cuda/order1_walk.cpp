// Order 1 by the kernels that walk the rows of a chunk: see sm90/order1_walk.h.
#include "order1_walk.h"

#include <ATen/ops/empty_like.h>

#include "sm90/moments.h"
#include "sm90/order1_walk.h"

namespace mra::cuda {

#ifdef MRA_SM90A

namespace {

// What all of a call's launches share.
struct Walk {
  const Term& term;
  const WalkCut cut;
  sm90::WalkChunks chunks{};

  Walk(const Term& term, const WalkCut& cut) : term(term), cut(cut) {
    const Inputs& in = term.in;
    auto& c = chunks;
    c.dtype = term.dtype;
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

  sm90::WalkRows rows_params(const Tensor& share, const Tensor& start) const {
    sm90::WalkRows p{chunks};
    p.key_count = data_of<int>(term.pooled.key_count);
    p.share = share.const_data_ptr<float>();
    p.causal = term.o.causal;
    p.scale = static_cast<float>(term.o.scale);
    p.start = data_of<float>(start);
    return p;
  }
};

// Under causal, what chunks start from: undefined for one; false where no kernel does it.
bool find_start(Tensor& start, const Term& term, const WalkCut& cut) {
  start = term.pooled.moments_before;
  if (cut.chunks == 1 || start.defined()) return true;
  start = moments_before(term.in, term.o, cut, nullptr);
  return start.defined();
}

// Without causal: float16, whose moments are float.
std::optional<WalkCut> head_cut(const Term& term, const Tensor& moments) {
  if (term.o.causal || !moments.defined() || term.dtype != Dtype::f16 || term.D > 128 ||
      term.launch.device.major != 9) {
    return std::nullopt;
  }
  const int resident = term.dim <= 64 ? 2 : 1;
  return WalkCut{term.dim, 1,
                 sm90::tile_chunks(term.B * term.Hk, term.N, resident, term.launch.device)};
}

}  // namespace

bool order1_walk(FineResult& result, const Term& term, const Tensor& moments) {
  const bool causal = term.o.causal;
  const auto cut = causal ? walk_cut(term.in, term.o, term.launch) : head_cut(term, moments);
  Tensor start = moments;
  if (!cut || (causal && !find_start(start, term, *cut))) return false;
  const Walk walk(term, *cut);
  sm90::WalkRows p = walk.rows_params(result.share, start);
  p.out = result.out.mutable_data_ptr();
  p.out_strides = strides_of(result.out);
  return walk.rows(p);
}

bool order1_walk_backward(const Tensor& grad_out, const Tensor& share, const Tensor& delta,
                          const Term& term, const Order1Grads& grads) {
  const auto cut = walk_cut(term.in, term.o, term.launch);
  Tensor start;
  if (!cut || term.dtype != Dtype::bf16 || !find_start(start, term, *cut)) return false;
  Walk walk(term, *cut);
  sm90::WalkChunks& c = walk.chunks;
  const Tensor weights = at::empty({c.B, c.H, ceil_div(c.N, 64) * 64, 2}, term.acc());
  c.grad_out = grad_out.const_data_ptr();
  c.grad_out_strides = strides_of(grad_out);
  c.weights = weights.mutable_data_ptr<float>();
  sm90::WalkRows rows = walk.rows_params(share, start);
  rows.delta = delta.const_data_ptr<float>();
  rows.coarse_delta = grads.coarse_delta.mutable_data_ptr<float>();
  rows.grad_q = grads.query.mutable_data_ptr();
  rows.grad_q_strides = strides_of(grads.query);
  if (!walk.rows(rows)) return false;

  sm90::WalkKeys keys{c};
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

bool order1_walk(FineResult&, const Term&, const Tensor&) { return false; }
bool order1_walk_backward(const Tensor&, const Tensor&, const Tensor&, const Term&,
                          const Order1Grads&) {
  return false;
}

#endif

}  // namespace mra::cuda
