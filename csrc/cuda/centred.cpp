// pool = centred and sampled on CUDA: means of blocks that weigh keys as the queries do, and their
// order 1. As cpu/centred.cpp, for all heads at once, in float32.
#include "centred.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

#include "../common/budget.h"
#include "../common/stages.h"
#include "launch.h"

namespace mra::cuda {
namespace {

constexpr double kMinusInf = -std::numeric_limits<double>::infinity();

// The heads of a call: those of a group of queries stand behind each other.
struct Heads {
  Heads(const Inputs& in, const Options& o)
      : in(in),
        s(o.scale),
        block(o.block_k),
        B(in.query.size(0)),
        Hk(in.key.size(1)),
        G(in.query.size(1) / Hk),
        N(in.query.size(2)),
        M(in.key.size(2)),
        D(in.query.size(3)),
        nk(ceil_div(M, block)) {}

  // [B, H, N, ...] as [B, Hk, G * N, ...], in float32 where `x` is made of queries.
  Tensor rows(const Tensor& x) const { return x.to(at::kFloat).reshape({B, Hk, G * N, D}); }
  Tensor row(const Tensor& x) const { return x.reshape({B, Hk, G * N}); }
  // Valid queries, zeros for others.
  Tensor queries() const {
    Tensor q = in.query.to(at::kFloat);
    if (in.query_mask) {
      q = q.masked_fill(in.query_mask->logical_not().unsqueeze(1).unsqueeze(-1), 0);
    }
    return q.reshape({B, Hk, G * N, D});
  }
  // Keys or values, [B, Hk, nk, block, D], likewise.
  Tensor blocks(const Tensor& x) const {
    Tensor k = x.to(at::kFloat);
    if (in.key_mask) k = k.masked_fill(in.key_mask->logical_not().unsqueeze(1).unsqueeze(-1), 0);
    if (M < nk * block) k = at::constant_pad_nd(k, {0, 0, 0, nk * block - M});
    return k.reshape({B, Hk, nk, block, D});
  }
  // True for what is no key: masked, or behind the last one. [B, 1, nk * block].
  Tensor no_key() const {
    const Tensor valid =
        in.key_mask ? *in.key_mask : at::ones({B, M}, in.key.options().dtype(at::kBool));
    return at::constant_pad_nd(valid, {0, nk * block - M}).logical_not().unsqueeze(1);
  }

  const Inputs& in;
  double s;
  int64_t block, B, Hk, G, N, M, D, nk;
};

struct Sample {
  Tensor places;  // [B, r]: among a group's queries, -1: none
  Tensor valid;   // [B]: valid queries of a head

  explicit Sample(const Heads& at) {
    const Launch launch(at.in.query);
    places = at::empty({at.B, kSampledQueries}, at.in.query.options().dtype(at::kLong));
    valid = at::empty({at.B}, at.in.query.options().dtype(at::kInt));
    SampleParams p{};
    p.mask = at.in.query_mask ? at.in.query_mask->const_data_ptr<bool>() : nullptr;
    p.places = places.mutable_data_ptr<int64_t>();
    p.valid = valid.mutable_data_ptr<int32_t>();
    p.B = static_cast<int>(at.B);
    p.N = static_cast<int>(at.N);
    p.group = static_cast<int>(at.G);
    launch.check(sample_queries(p, launch.stream));
  }
};

// Valid queries of a group, at least 1: [B, 1, 1].
Tensor group_size(const Heads& at, const Tensor& valid) {
  return valid.mul(at.G).clamp_min(1).to(at::kFloat).view({at.B, 1, 1});
}

// log of sum_i p_ij + r / 4 p_mean,j, [B, Hk, nk * block]: p of the sampled queries and of the
// mean.
Tensor sampled_weights(const Heads& at, const Tensor& q, const Tensor& mean, const Tensor& keys,
                       const Tensor& no_key, const Sample& sample) {
  const Tensor index = sample.places.clamp_min(0).view({at.B, 1, kSampledQueries, 1});
  const Tensor picked = q.gather(2, index.expand({at.B, at.Hk, kSampledQueries, at.D}));
  const Tensor rows = at::cat({picked, mean.unsqueeze(2)}, 2).mul_(at.s);
  Tensor logits = at::matmul(rows, keys.transpose(2, 3));
  logits = at::log_softmax(logits.masked_fill_(no_key.unsqueeze(2), kMinusInf), -1);
  const Tensor taken = sample.places.ge(0).to(at::kFloat);
  const Tensor mean_share = taken.sum(1, true).clamp_min(1).div(4);
  const Tensor shares = at::cat({taken, mean_share}, 1).log().view({at.B, 1, -1, 1});
  return at::logsumexp(logits.add_(shares), 2);
}

// Within-block deviations of keys and values from their weighted means, [B, Hk, nk * block, D], and
// the weight of each key in the moments, pi_j c_y / n.
struct Deviations {
  Deviations(const Heads& at, const Centred& c) {
    const auto deviation = [&](const Tensor& x, const Tensor& mean) {
      return (at.blocks(x) - mean.unsqueeze(3)).view({at.B, at.Hk, at.nk * at.block, at.D});
    };
    key = deviation(at.in.key, c.pooled.key);
    value = deviation(at.in.value, c.pooled.value);
    const Tensor count = c.pooled.key_count.to(at::kFloat);
    const Tensor share = (count / count.sum(1, true).clamp_min(1)).view({at.B, 1, at.nk, 1});
    weight = (c.pooled.weights.view({at.B, at.Hk, at.nk, at.block}) * share)
                 .view({at.B, at.Hk, at.nk * at.block, 1});
  }
  Tensor key, value, weight;
};

// Order 1 of the rows.
struct Rows1 {
  Rows1(const Heads& at, const Centred& c, const Tensor& share)
      : q(at.queries() - c.centre.unsqueeze(2)),
        t(at.row(c.variance)),
        gamma(1 / (1 + t / 4)),
        share(at.row(share)),
        none(this->share == 0),
        C(c.moments.select(2, 0)),
        S(c.moments.select(2, 1)),
        u(at::matmul(q, C).mul_(at.s)) {}
  // Rows without a coarse share may hold anything.
  Tensor there(const Tensor& x) const {
    return x.masked_fill(x.dim() > 3 ? none.unsqueeze(-1) : none, 0);
  }
  Tensor q, t, gamma, share, none, C, S, u;
};

void add_to(const Tensor& to, const Tensor& x) {
  to.copy_(to.to(at::kFloat) + x.reshape(to.sizes()));
}

}  // namespace

Centred centre(const Inputs& in, const Tensor& key_count, const Options& o) {
  const Heads at(in, o);
  const Sample sample(at);
  const Tensor q = at.queries(), k = at.blocks(in.key), no_key = at.no_key();
  Centred c;
  c.centre = q.sum(2) / group_size(at, sample.valid);

  // weights within each block, and their means and entropy
  const Tensor keys = k.view({at.B, at.Hk, at.nk * at.block, at.D});
  Tensor weight = o.pool == Pool::centred
                      ? at::matmul(keys, c.centre.unsqueeze(-1)).squeeze(-1).mul_(at.s)
                      : sampled_weights(at, q, c.centre, keys, no_key, sample);
  weight = weight.masked_fill(no_key, kMinusInf).view({at.B, at.Hk, at.nk, at.block});
  weight = at::softmax(weight, 3).masked_fill(no_key.view({at.B, 1, at.nk, at.block}), 0);
  const auto pooled = [&](const Tensor& blocks) {
    return at::matmul(weight.unsqueeze(3), blocks).squeeze(3);
  };
  c.pooled.weights = weight.view({at.B, at.Hk, at.nk * at.block});
  c.pooled.key = pooled(k);
  c.pooled.value = pooled(at.blocks(in.value));
  c.pooled.key_count = key_count;
  c.pooled.type = in.query.scalar_type();
  const Tensor empty = (key_count == 0).unsqueeze(1);
  c.pooled.log_mass = at::special_entr(weight).sum(3).masked_fill_(empty, kMinusInf);
  if (!has_order1(o)) return c;

  // moments, and what a row's variance adds to the mass
  const Deviations d(at, c);
  const Tensor left = (d.key * d.weight).transpose(2, 3);
  c.moments = at::stack({at::matmul(left, d.value), at::matmul(left, d.key)}, 2);
  const Tensor from_mean = q - c.centre.unsqueeze(2);
  const Tensor t =
      at::matmul(from_mean, c.moments.select(2, 1)).mul_(from_mean).sum(3) * (at.s * at.s);
  c.variance = t.view({at.B, at.Hk * at.G, at.N});
  // log(1 + gamma t / 2), for any t
  c.pooled.row_bias = (3 - 2 / (1 + c.variance / 4)).log_();
  return c;
}

void centred_term(FineResult& result, const Inputs& in, const Centred& c, const Options& o) {
  const Heads at(in, o);
  const Rows1 r(at, c, result.share);
  add_to(result.out, r.there(r.u * (r.share * r.gamma).unsqueeze(-1)));
}

Tensor centred_delta(const Tensor& grad_out, const Tensor& share, const Tensor& delta,
                     const Inputs& in, const Centred& c, const Options& o) {
  const Heads at(in, o);
  const Rows1 r(at, c, share);
  const Tensor term = (r.u * at.rows(grad_out)).sum(3) * r.gamma;
  return delta - r.there(term).view(delta.sizes());
}

void centred_grads(const Grads& grads, const Tensor& grad_out, const Tensor& share,
                   const Tensor& coarse_sum, const Inputs& in, const Centred& c, const Options& o) {
  const Heads at(in, o);
  const Rows1 r(at, c, share);
  const double s = at.s;
  const Tensor g = r.there(at.rows(grad_out)), a = (r.share * r.gamma * s).unsqueeze(-1);
  // of t, by the damping and by the factor of the mass
  const Tensor dt = (r.share * (r.u * g).sum(3) * r.gamma * r.gamma * -0.25 +
                     (0.75 / (1 + r.t * 0.75) - r.gamma / 4) * r.there(at.row(coarse_sum)))
                        .mul_(s * s)
                        .unsqueeze(-1);
  const Tensor dC = at::matmul((r.q * a).transpose(2, 3), g);
  const Tensor dS = at::matmul((r.q * dt).transpose(2, 3), r.q);
  Tensor dq = a * at::matmul(g, r.C.transpose(2, 3)) + 2 * dt * at::matmul(r.q, r.S);
  // through the mean query: every valid one has its share
  const Sample sample(at);
  dq = (dq - (dq.sum(2) / group_size(at, sample.valid)).unsqueeze(2)).view(in.query.sizes());
  if (in.query_mask) {
    dq.masked_fill_(in.query_mask->logical_not().unsqueeze(1).unsqueeze(-1), 0);
  }
  const Deviations d(at, c);
  const Tensor dk =
      (at::matmul(d.value, dC.transpose(2, 3)) + 2 * at::matmul(d.key, dS)) * d.weight;
  const Tensor dv = at::matmul(d.key, dC) * d.weight;
  add_to(grads.query, dq);
  add_to(grads.key, dk.narrow(2, 0, at.M));
  add_to(grads.value, dv.narrow(2, 0, at.M));
}

}  // namespace mra::cuda
