// Gradients of weighted means: order 1 with them, and through their weights.
#include "centred.h"

namespace mra::cpu {

void centred_delta(FineBackward& grads, const Tensor& out, const Tensor& grad_lse, const Inputs& in,
                   Centred& c, const BlockList&, const Options& o) {
  grads.delta = delta(grads.grad_out, out, grad_lse);
  grads.coarse_delta = at::empty_like(grads.delta);
  for_heads(in, [&](int64_t item) {
    const Head at(in, o, item);
    const Rows1 r(at, in, c, grads.share);
    const Tensor term = (r.u * at.by_units(at.rows(grads.grad_out))).sum(2) * r.gamma;
    at.view(grads.coarse_delta)
        .copy_(at.view(grads.delta) - at.from_units(r.there(term)).view({at.G, at.N}));
  });
}

namespace {

// Rows of each block of keys, [nk * block, n], times its matrix, [nk, n, D].
Tensor multiply_blocks(const Head& at, const Tensor& rows, const Tensor& matrices) {
  return at::bmm(rows.view({at.nk, at.block, -1}), matrices).view({at.nk * at.block, -1});
}

// Gradients of the log weights of a head's keys, [nk * block, 1], from those of the means, of the
// log masses and, where defined, of the moments: up to what a block has in common, pi_j x_j with
//
//   x_j = kappa_j . dk_y + nu_j . dv_y - log pi_j da_y
//         + c_y / n (kappa_j dC nu_j' + kappa_j dSigma kappa_j')
Tensor log_weight_grads(const Head& at, const Centred& c, const Deviations& d,
                        const FineBackward& back, const Tensor& dC, const Tensor& dS) {
  const auto of_block = [&](const Tensor& x) {
    return x.unsqueeze(1).expand({at.nk, at.block, x.size(1)}).reshape({-1, x.size(1)});
  };
  const Tensor pi = pick(c.pooled.weights, at);
  const Tensor da = of_block(pick(back.mass_grad, at).unsqueeze(1)).squeeze(1);
  Tensor x = (d.key * of_block(pick(back.pooled_grads[0], at))).sum(1) +
             (d.value * of_block(pick(back.pooled_grads[1], at))).sum(1);
  x = (x * pi).sub_(at::xlogy(pi, pi).mul_(da));  // pi_j x_j
  if (dC.defined()) {
    x += ((multiply_blocks(at, d.key, dC) * d.value).sum(1) +
          (multiply_blocks(at, d.key, dS) * d.key).sum(1)) *
         d.weight.squeeze(1);
  }
  x = x.view({at.nk, at.block});
  return (x - pi.view({at.nk, at.block}) * x.sum(1, true)).view({-1, 1});
}

// Gradients of moments of units, [units, D, D] -> of what each block of keys gives to them.
Tensor of_blocks(const Head& at, const Centred& c, const Tensor& grads) {
  if (!at.causal) return grads.expand({at.nk, at.D, at.D});
  const Past past(at, c);
  const Tensor at_end = at::zeros({at.nk + 1, at.D, at.D}, grads.options());
  at_end.index_add_(0, past.blocks, grads * past.over_n);
  return at_end.narrow(0, 1, at.nk).flip(0).cumsum(0).flip(0);  // of the units behind the block
}

}  // namespace

void centred_grads(const Grads& grads, const FineBackward& back, const Inputs& in,
                   const Options& o) {
  const Centred& c = *back.centred;
  for_heads(in, [&](int64_t item) {
    const Head at(in, o, item);
    const Deviations d(at, in, c);
    const double s = at.s;
    Tensor dq = at::zeros({at.G * at.N, at.D}, c.centre.options()), dC, dS;
    // through the centres, as means of queries
    Tensor shared = at::zeros({at.N, at.D}, dq.options());
    if (has_order1(o)) {
      const Rows1 r(at, in, c, back.share);
      const Tensor g = r.there(at.by_units(at.rows(back.grad_out)));
      const Tensor a = (r.share * r.gamma * s).unsqueeze(-1);
      // of t, by the damping and by the factor of the mass
      const Tensor dt =
          (r.share * (r.u * g).sum(2) * r.gamma * r.gamma * -0.25 +
           (0.75 / (1 + r.t * 0.75) - r.gamma / 4) * r.there(at.by_units(at.row(back.coarse_sum))))
              .mul_(s * s)
              .unsqueeze(-1);
      dC = of_blocks(at, c, at::bmm((r.q * a).transpose(1, 2), g));
      dS = of_blocks(at, c, at::bmm((r.q * dt).transpose(1, 2), r.q));
      const Tensor rows = a * at::bmm(g, r.C.transpose(1, 2)) + 2 * dt * at::bmm(r.q, r.S);
      dq = at.from_units(rows);
      shared -= at.means_backward(rows.sum(1), at.unit_ends());
    }
    // through the log weights, s q^.k_j up to what a block has in common
    const Tensor dl = log_weight_grads(at, c, d, back, dC, dS).mul_(s);
    Tensor of_centres = (dl * d.key).view({at.nk, at.block, at.D}).sum(1);
    if (!at.causal) of_centres = of_centres.sum(0, true);
    shared += at.means_backward(of_centres, at.block_ends());
    Tensor dk = multiply_blocks(at, dl, block_centres(c, at).unsqueeze(1));
    dq = dq.view({at.G, at.N, at.D}) + shared;
    if (at.valid_query.defined()) {
      dq.masked_fill_(at.valid_query.logical_not().unsqueeze(-1), 0);
    }
    const auto add = [&](const Tensor& to, const Tensor& x) { to.copy_(to.to(at.acc) + x); };
    if (has_order1(o)) {
      const Tensor of_key =
          multiply_blocks(at, d.value, dC.transpose(1, 2)) + 2 * multiply_blocks(at, d.key, dS);
      dk += of_key * d.weight;
      const Tensor dv = multiply_blocks(at, d.key, dC) * d.weight;
      add(pick(grads.value, at), dv.narrow(0, 0, at.M));
    }
    add(pick(grads.key, at), dk.narrow(0, 0, at.M));
    add(at.view(grads.query), dq);
  });
}

}  // namespace mra::cpu
