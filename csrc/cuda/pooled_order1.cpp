// In the backward pass with weighted means, all that rows need or give beside fine's part in one
// launch: allocates for sm90/backward_pooled_order1.cuh.
#include "centred_term.h"
#include "coarse_shares.h"
#include "pooled_keys.h"
#include "sm90/backward.h"
#include "sm90/moments.h"

namespace mra::cuda {

#ifdef MRA_SM90A

namespace {

// Gradients of the pooled keys and values and of their masses, summed up where a key head has
// several parts.
struct PooledGrads {
  Tensor shares, mass;

  PooledGrads(const Term& term, int parts)
      : shares(allocate({2, parts, term.B, term.Hk, term.nk, term.D}, term.acc())),
        mass(allocate({parts, term.B, term.Hk, term.nk}, term.acc())) {}

  void add_up(const Term& term, int parts, CoarseRows& to) const {
    if (parts == 1) {
      to.shares = shares.select(1, 0);
      to.mass_grad = mass[0];
      return;
    }
    to.shares = allocate({2, term.B, term.Hk, term.nk, term.D}, term.acc());
    to.mass_grad = allocate({term.B, term.Hk, term.nk}, term.acc());
    term.launch.check(
        share_sums({shares.const_data_ptr<float>(), nullptr, to.shares.mutable_data_ptr<float>(),
                    parts, term.B, term.Hk, term.nk, term.D, mass.const_data_ptr<float>(),
                    to.mass_grad.mutable_data_ptr<float>()},
                   term.launch.stream));
  }
};

}  // namespace

bool pooled_order1(FineBackward& grads, const Tensor& out_in, const Tensor& grad_lse,
                   const Term& term, const Centred& c, const BlockList& rows) {
  const Options& o = term.o;
  if (!order1_on_hopper(term.in.key, o, term.launch) || o.coarse != Coarse::row ||
      !o.levels.empty() || term.dim > 64 || term.nk > sm90::kPooledOrder1Keys ||
      o.block_q % 32 != 0) {
    return false;
  }
  const Tensor grad_out = with_aligned_rows(grads.grad_out), out = with_aligned_rows(out_in);
  // Right behind the launch beside which it may run.
  const Tensor products = centre_matrices(term, c, c.pooled.beside);
  const PooledKeys keys(c.pooled, term.in, o, term.launch);
  sm90::PooledOrder1 p{};
  fill(p, term.in, rows, keys.key, keys.value, keys.count, o);
  p.pooled_mass = data_of<float>(keys.mass);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_strides = strides_of(grad_out);
  p.out = out.const_data_ptr();
  p.out_strides = strides_of(out);
  p.lse = grads.lse.const_data_ptr<float>();
  p.share = grads.share.const_data_ptr<float>();
  p.grad_lse = data_of<float>(grad_lse);
  if (grad_lse.defined()) p.lse_strides = strides_of(grad_lse);
  p.moments = c.moments.const_data_ptr();
  p.centre = c.centre.const_data_ptr<float>();
  p.centre_term = products.const_data_ptr<float>();

  const Tensor delta = allocate({term.B, term.H, term.N}, term.acc());
  const Tensor query = empty_query_grad(term.in);
  const Device& device = term.launch.device;
  p.chunks = sm90::tile_chunks(term.B * term.H, term.N, 1, device);
  const RowMatrices matrices(term, p.chunks);
  p.matrix_sums = data_of<float>(matrices.sums);
  p.moment_grads = matrices.result.mutable_data_ptr();
  const PooledGrads pooled(term, matrices.parts);
  p.pooled_grad_k = pooled.shares.mutable_data_ptr<float>();
  p.pooled_grad_v = p.pooled_grad_k + pooled.shares.numel() / 2;
  p.pooled_mass_grads = pooled.mass.mutable_data_ptr<float>();
  CoarseRows made;
  made.of_rows = allocate({term.B, term.H, p.chunks, term.D}, term.acc());
  p.made_delta = delta.mutable_data_ptr<float>();
  p.grad_q = query.mutable_data_ptr();
  p.grad_q_strides = strides_of(query);
  p.row_sums = made.of_rows.mutable_data_ptr<float>();
  const cudaError_t error = sm90::launch_backward_pooled_order1<64>(p, device, term.launch.stream);
  if (error == cudaErrorNotSupported) return false;
  term.launch.check(error);
  pooled.add_up(term, matrices.parts, made);
  matrices.add_up(term);
  made.moment_grads = matrices.result;
  grads.delta = grads.coarse_delta = delta;
  grads.query_extra = query;
  grads.coarse_rows = made;
  return true;
}

#else

bool pooled_order1(FineBackward&, const Tensor&, const Tensor&, const Term&, const Centred&,
                   const BlockList&) {
  return false;
}

#endif

}  // namespace mra::cuda
