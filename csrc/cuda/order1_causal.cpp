// Order 1 under causal by Hopper's kernels: see sm90/order1_causal.h.
#include "order1_causal.h"

#include <ATen/ops/empty_like.h>

#include "sm90/moments.h"
#include "sm90/order1_causal.h"

namespace mra::cuda {

#ifdef MRA_SM90A

namespace {

bool serves(const Term& term) {
  return term.o.causal && term.launch.device.major == 9 && term.dtype == Dtype::bf16 &&
         term.D <= 128 && term.o.block_k <= 64 && term.unit_causal >= 64;
}

// Calls f with the padded head dim, an integral_constant.
template <class F>
cudaError_t by_dim(const Term& term, F f) {
  return term.D <= 64 ? f(std::integral_constant<int, 64>{})
                      : f(std::integral_constant<int, 128>{});
}

// What all of a call's launches share. Sums of chunks are padded to `dim`.
struct Walk {
  const Term& term;
  int dim;
  sm90::CausalChunks chunks{};

  explicit Walk(const Term& term) : term(term), dim(term.D <= 64 ? 64 : 128) {
    const Inputs& in = term.in;
    auto& c = chunks;
    c.B = term.B;
    c.H = term.H;
    c.Hk = term.Hk;
    c.N = term.N;
    c.D = term.D;
    c.nk = term.nk;
    c.log2_block_k = term.block_shift;
    c.unit_tiles = term.unit_causal / 64;
    const int most = sm90::tile_chunks(c.B * c.Hk, c.N, dim, term.launch.device);
    c.chunks = static_cast<int>(
        ceil_div(ceil_div(c.N, 64), sm90::chunk_tiles(c.N, most, c.unit_tiles)));
    c.k = in.key.const_data_ptr();
    c.v = in.value.const_data_ptr();
    c.k_strides = strides_of(in.key);
    c.v_strides = strides_of(in.value);
    c.mask = mask_of(in.key_mask);
    c.q = in.query.const_data_ptr();
    c.q_strides = strides_of(in.query);
  }

  Tensor empty_sums() const {
    return at::empty({chunks.B, chunks.Hk, chunks.chunks, 2, dim, dim}, term.acc());
  }

  // Sums of chunks -> those of the chunks before each, or behind it.
  void accumulate(const Tensor& sums, bool backward) const {
    Order1Sum s{};
    s.exclusive = true;
    s.backward = backward;
    s.B = chunks.B;
    s.heads = chunks.Hk;
    s.chunks = chunks.chunks;
    s.dim = dim;
    s.sums = sums.mutable_data_ptr<float>();
    term.launch.check(order1_sum(s, term.launch.stream));
  }

  // C and Sigma of the chunks before each; undefined for one chunk. False where no kernel does it.
  bool moments(Tensor& start) const {
    if (chunks.chunks == 1) return true;
    start = empty_sums();
    sm90::Moments p{};
    p.k = chunks.k;
    p.v = chunks.v;
    p.k_strides = chunks.k_strides;
    p.v_strides = chunks.v_strides;
    p.mask = chunks.mask;
    p.B = chunks.B;
    p.Hk = chunks.Hk;
    p.M = chunks.N;
    p.D = chunks.D;
    p.nk = chunks.nk;
    p.log2_block_k = chunks.log2_block_k;
    p.chunks = chunks.chunks;
    p.unit_tiles = chunks.unit_tiles;
    p.sums = start.mutable_data_ptr<float>();
    const bool done = launch([&](auto dim) {
      return sm90::launch_moments<dim()>(p, term.launch.device, term.launch.stream);
    });
    if (done) accumulate(start, false);
    return done;
  }

  template <class F>
  bool launch(F f) const {
    const cudaError_t error = by_dim(term, f);
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

}  // namespace

bool order1_causal(FineResult& result, const Term& term) {
  if (!serves(term)) return false;
  const Walk walk(term);
  Tensor start;
  if (!walk.moments(start)) return false;
  sm90::CausalRows p = walk.rows_params(result.share, start);
  p.out = result.out.mutable_data_ptr();
  p.out_strides = strides_of(result.out);
  return walk.rows(p);
}

bool order1_causal_backward(const Tensor& grad_out, const Tensor& share, const Tensor& delta,
                            const Term& term, const Order1Grads& grads) {
  if (!serves(term)) return false;
  Walk walk(term);
  Tensor start;
  if (!walk.moments(start)) return false;
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
    walk.accumulate(start, true);
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
