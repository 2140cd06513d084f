// pool = centred and sampled: means of blocks that weigh keys as the queries do, and their order 1.
//
// Everything here is O(N D^2 + M D) or, for sampled, O(15 M D), so it is written with torch's own
// operators, one key head with the queries of its group at a time. Moments are made again for
// the backward pass, in acc.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/budget.h"
#include "stages_cpu.h"
#include "views.h"

namespace mra::cpu {
namespace {

constexpr int64_t kSampledQueries = 14;
constexpr double kMinusInf = -std::numeric_limits<double>::infinity();

// One key head with the query heads of its group.
struct Head {
  Head(const Inputs& in, const Options& o, int64_t item)
      : s(o.scale),
        block(o.block_k),
        Hk(in.key.size(1)),
        G(in.query.size(1) / Hk),
        N(in.query.size(2)),
        M(in.key.size(2)),
        D(in.query.size(3)),
        nk(ceil_div(M, block)),
        b(item / Hk),
        hk(item % Hk),
        acc(acc_type(in.query.scalar_type())) {
    if (in.query_mask) valid_query = in.query_mask->select(0, b);
    if (in.key_mask) valid_key = in.key_mask->select(0, b);
  }

  // [B, H, ...] to this group, [G * N] or [G * N, D]; a copy unless it lies so.
  Tensor rows(const Tensor& x) const { return view(x).to(acc).reshape({G * N, -1}); }
  Tensor row(const Tensor& x) const { return view(x).reshape({G * N}); }
  // The same in place, [G, N] or [G, N, D].
  Tensor view(const Tensor& x) const { return x.select(0, b).narrow(0, hk * G, G); }

  // Valid queries, zeros for others; keys or values, [nk, block, D], likewise.
  Tensor queries(const Inputs& in) const {
    Tensor q = view(in.query).to(acc);
    if (valid_query.defined()) q = q.masked_fill(valid_query.logical_not().unsqueeze(-1), 0);
    return q.reshape({G * N, D});
  }
  Tensor blocks(const Tensor& x) const {
    Tensor k = x.select(0, b).select(0, hk).to(acc);
    if (valid_key.defined()) k = k.masked_fill(valid_key.logical_not().unsqueeze(-1), 0);
    if (M < nk * block) k = at::constant_pad_nd(k, {0, 0, 0, nk * block - M});
    return k.reshape({nk, block, D});
  }
  // True for what is no key: masked, or behind the last one; undefined where there is none such.
  Tensor no_key() const {
    if (!valid_key.defined() && M == nk * block) return {};
    const Tensor valid =
        valid_key.defined() ? valid_key : at::ones({M}, at::TensorOptions().dtype(at::kBool));
    return at::constant_pad_nd(valid, {0, nk * block - M}).logical_not();
  }
  // Numbers of the valid ones among the N queries.
  std::vector<int64_t> valid_queries() const {
    std::vector<int64_t> found;
    const Tensor mask = valid_query.defined() ? valid_query.contiguous() : Tensor();
    const bool* valid = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
    for (int64_t i = 0; i < N; ++i) {
      if (!valid || valid[i]) found.push_back(i);
    }
    return found;
  }

  double s;
  int64_t block, Hk, G, N, M, D, nk, b, hk;
  at::ScalarType acc;
  Tensor valid_query, valid_key;  // [N], [M] or undefined
};

// f(item) for every key head; products stay on one thread, so that bits don't depend on how many.
template <typename F>
void for_heads(const Inputs& in, const F& f) {
  at::parallel_for(0, in.key.size(0) * in.key.size(1), 1, [&](int64_t begin, int64_t end) {
    const SerialBlas serial;
    const at::AutoDispatchBelowADInplaceOrView below;  // of this thread
    // Where backward runs under autocast, products are of acc all the same.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    for (int64_t item = begin; item < end; ++item) f(item);
  });
}

Tensor pick(const Tensor& x, const Head& at) { return x.select(0, at.b).select(0, at.hk); }

// log of sum_i p_ij + r / 4 p_mean,j, [nk * block]: p of r queries evenly spread among the valid
// ones of the group, one head after another, and of the mean query, whose logits are `mean`.
Tensor sampled_weights(const Head& at, const Tensor& q, const Tensor& mean, const Tensor& k,
                       const Tensor& no_key) {
  const std::vector<int64_t> valid = at.valid_queries();
  const int64_t n = valid.size(), all = at.G * n, r = std::min(all, kSampledQueries);
  std::vector<int64_t> places;
  for (int64_t t = 0; t < r; ++t) {
    const int64_t rank = all > r ? (2 * t + 1) * all / (2 * r) : t;
    places.push_back(rank / n * at.N + valid[rank % n]);
  }
  const Tensor picked = q.index_select(0, at::tensor(places, at::kLong));
  Tensor logits = at::cat({at::mm(picked, k.t()).mul_(at.s), mean.unsqueeze(0)});
  if (no_key.defined()) logits.masked_fill_(no_key, kMinusInf);
  logits = at::log_softmax(logits, 1);
  logits[r].add_(std::log(std::max<double>(1, r) / 4));
  return at::logsumexp(logits, 0);
}

// What a plan adds to the scores of each block, [nk]: a quarter of the log mass that its keys have
// for the mean query, less half the mean of their logits [nk, block]; 0 for an empty block.
Tensor score_bias(const Tensor& logits, const Tensor& no_key) {
  if (!no_key.defined()) return at::logsumexp(logits, 1) / 4 - logits.mean(1) / 2;
  const Tensor none = no_key.view(logits.sizes()), count = none.logical_not().sum(1);
  const Tensor mass = at::logsumexp(logits.masked_fill(none, kMinusInf), 1) / 4;
  const Tensor bias = mass - logits.masked_fill(none, 0).sum(1) / (2 * count);
  return bias.masked_fill(count == 0, 0);
}

// Within-block deviations of keys and values from their weighted means, [nk * block, D], and the
// weight of each key in the moments, pi_j c_y / n, [nk * block, 1].
struct Deviations {
  Deviations(const Head& at, const Inputs& in, const Centred& c) {
    const Tensor count = c.pooled.key_count.select(0, at.b).to(at.acc);
    const auto deviation = [&](const Tensor& x, const Tensor& mean) {
      return (at.blocks(x) - pick(mean, at).unsqueeze(1)).reshape({at.nk * at.block, at.D});
    };
    key = deviation(in.key, c.pooled.key);
    value = deviation(in.value, c.pooled.value);
    const Tensor share = (count / count.sum().clamp_min(1)).unsqueeze(-1);
    weight = (pick(c.pooled.weights, at).view({at.nk, at.block}) * share).view({-1, 1});
  }
  Tensor key, value, weight;
};

// Order 1 of the rows of a group.
struct Rows1 {
  Rows1(const Head& at, const Inputs& in, const Centred& c, const Tensor& share)
      : q(at.queries(in) - pick(c.centre, at)),
        t(at.row(c.pooled.variance)),
        gamma(1 / (1 + t / 4)),
        share(at.row(share)),
        none(this->share == 0),
        C(pick(c.moments, at)[0]),
        S(pick(c.moments, at)[1]),
        u(at::mm(q, C).mul_(at.s)) {}
  // Rows without a coarse share may hold anything.
  Tensor there(const Tensor& x) const {
    return x.masked_fill(x.dim() > 1 ? none.unsqueeze(-1) : none, 0);
  }
  Tensor q, t, gamma, share, none, C, S, u;
};

}  // namespace

Centred weigh_keys(const Inputs& in, PooledInputs& plain, bool bias, const Options& o) {
  const int64_t B = in.query.size(0), N = in.query.size(2), D = in.query.size(3);
  const int64_t Hk = in.key.size(1), nk = plain.key_count.size(1);
  const auto options = in.query.options().dtype(acc_type(in.query.scalar_type()));
  Centred c;
  c.centre = at::empty({B, Hk, D}, options);
  c.pooled.query_count = plain.query_count;
  c.pooled.key_count = plain.key_count;
  c.pooled.weights = at::empty({B, Hk, nk * o.block_k}, options);
  c.pooled.mass = at::empty({B, Hk, nk}, options);
  if (bias) c.key_bias = at::empty({B, Hk, nk}, options);
  for_heads(in, [&](int64_t item) {
    const Head at(in, o, item);
    const Tensor no_key = at.no_key();
    const int64_t n = at.valid_query.defined() ? at.valid_queries().size() : N;
    const Tensor counts = plain.query_count.select(0, at.b).to(at.acc).view({1, -1, 1});
    const Tensor mean = (at.view(plain.query) * counts).sum(at::IntArrayRef{0, 1}) /
                        static_cast<double>(std::max<int64_t>(1, at.G * n));
    pick(c.centre, at).copy_(mean);

    // weights within each block, and their entropy
    const Tensor keys = at.blocks(in.key).view({nk * at.block, D});
    const Tensor logits = at::mv(keys, mean).mul_(at.s);
    if (bias) pick(c.key_bias, at).copy_(score_bias(logits.view({nk, at.block}), no_key));
    Tensor weight = o.pool == Pool::centred
                        ? logits
                        : sampled_weights(at, at.queries(in), logits, keys, no_key);
    if (no_key.defined()) weight = weight.masked_fill(no_key, kMinusInf);
    weight = at::softmax(weight.view({nk, at.block}), 1);
    if (no_key.defined()) weight.masked_fill_(no_key.view({nk, at.block}), 0);
    pick(c.pooled.weights, at).copy_(weight.view(-1));
    const Tensor empty = plain.key_count.select(0, at.b) == 0;
    pick(c.pooled.mass, at).copy_(at::special_entr(weight).sum(1).masked_fill_(empty, kMinusInf));
  });
  return c;
}

void centre(Centred& c, const Inputs& in, bool, const Options& o) {
  const int64_t B = in.query.size(0), H = in.query.size(1), N = in.query.size(2);
  const int64_t Hk = in.key.size(1), D = in.query.size(3), nk = c.pooled.key_count.size(1);
  const auto options = c.centre.options();
  const bool means = !c.pooled.key.defined();
  if (means) {
    c.pooled.key = at::empty({B, Hk, nk, D}, options);
    c.pooled.value = at::empty({B, Hk, nk, D}, options);
  }
  if (has_order1(o)) {
    c.moments = at::empty({B, Hk, 2, D, D}, options);
    c.pooled.variance = at::empty({B, H, N}, options);
    c.pooled.row_bias = at::empty({B, H, N}, options);
  }
  for_heads(in, [&](int64_t item) {
    const Head at(in, o, item);
    if (means) {
      const Tensor weight = pick(c.pooled.weights, at).view({nk, 1, at.block});
      pick(c.pooled.key, at).copy_(at::bmm(weight, at.blocks(in.key)).squeeze(1));
      pick(c.pooled.value, at).copy_(at::bmm(weight, at.blocks(in.value)).squeeze(1));
    }
    if (!has_order1(o)) return;

    // moments, and what a row's variance adds to the mass
    const Deviations d(at, in, c);
    const Tensor left = (d.key * d.weight).t(), moments = pick(c.moments, at);
    moments[0].copy_(at::mm(left, d.value));
    moments[1].copy_(at::mm(left, d.key));
    const Tensor from_mean = at.queries(in) - pick(c.centre, at);
    const Tensor t = (at::mm(from_mean, moments[1]).mul_(from_mean)).sum(1) * (at.s * at.s);
    at.view(c.pooled.variance).copy_(t.view({at.G, N}));
    // log(1 + gamma t / 2), for any t
    at.view(c.pooled.row_bias).copy_((3 - 2 / (1 + t / 4)).log_().view({at.G, N}));
  });
}

void centred_term(FineResult& result, const Inputs& in, const Centred& c, const Options& o) {
  for_heads(in, [&](int64_t item) {
    const Head at(in, o, item);
    const Rows1 r(at, in, c, result.share);
    const Tensor out = at.view(result.out), term = r.u * (r.share * r.gamma).unsqueeze(-1);
    out.copy_(out.to(at.acc) + r.there(term).view({at.G, at.N, at.D}));
  });
}

Tensor centred_delta(const Tensor& grad_out, const Tensor& share, const Tensor& delta,
                     const Inputs& in, Centred& c, const Options& o) {
  const Tensor result = at::empty_like(delta);
  for_heads(in, [&](int64_t item) {
    const Head at(in, o, item);
    const Rows1 r(at, in, c, share);
    const Tensor term = (r.u * at.rows(grad_out)).sum(1) * r.gamma;
    at.view(result).copy_(at.view(delta) - r.there(term).view({at.G, at.N}));
  });
  return result;
}

namespace {

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
    x += ((at::mm(d.key, dC) * d.value).sum(1) + (at::mm(d.key, dS) * d.key).sum(1)) *
         d.weight.squeeze(1);
  }
  x = x.view({at.nk, at.block});
  return (x - pi.view({at.nk, at.block}) * x.sum(1, true)).view({-1, 1});
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
    if (has_order1(o)) {
      const Rows1 r(at, in, c, back.share);
      const Tensor g = r.there(at.rows(back.grad_out));
      const Tensor a = (r.share * r.gamma * s).unsqueeze(-1);
      // of t, by the damping and by the factor of the mass
      const Tensor dt = (r.share * (r.u * g).sum(1) * r.gamma * r.gamma * -0.25 +
                         (0.75 / (1 + r.t * 0.75) - r.gamma / 4) * r.there(at.row(back.coarse_sum)))
                            .mul_(s * s)
                            .unsqueeze(-1);
      dC = at::mm((r.q * a).t(), g);
      dS = at::mm((r.q * dt).t(), r.q);
      dq = a * at::mm(g, r.C.t()) + 2 * dt * at::mm(r.q, r.S);
    }
    // through the log weights, s q^.k_j up to what a block has in common
    const Tensor dl = log_weight_grads(at, c, d, back, dC, dS).mul_(s);
    Tensor dk = at::mm(dl, pick(c.centre, at).unsqueeze(0));
    // through the mean query: every valid one has its share
    const Tensor centre = at::mm(dl.t(), d.key) - dq.sum(0);  // dl adds up to 0 in a block
    const int64_t n = at.valid_queries().size();
    dq = (dq + centre / static_cast<double>(std::max<int64_t>(1, at.G * n)))
             .view({at.G, at.N, at.D});
    if (at.valid_query.defined()) {
      dq.masked_fill_(at.valid_query.logical_not().unsqueeze(-1), 0);
    }
    const auto add = [&](const Tensor& to, const Tensor& x) { to.copy_(to.to(at.acc) + x); };
    if (has_order1(o)) {
      dk += (at::mm(d.value, dC.t()) + 2 * at::mm(d.key, dS)) * d.weight;
      add(pick(grads.value, at), (at::mm(d.key, dC) * d.weight).narrow(0, 0, at.M));
    }
    add(pick(grads.key, at), dk.narrow(0, 0, at.M));
    add(at.view(grads.query), dq);
  });
}

}  // namespace mra::cpu
