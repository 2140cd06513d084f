// pool = centred and sampled: means of blocks that weigh keys as the queries do, and their order 1.
//
// Everything here is O(N D^2 + M D) or, for sampled, O(15 M D), so it is written with torch's own
// operators, one key head with the queries of its group at a time. Moments are made again for
// the backward pass, in acc.
#include "centred.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mra::cpu {
namespace {

constexpr int64_t kSampledQueries = 14;
constexpr double kMinusInf = -std::numeric_limits<double>::infinity();

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

}  // namespace

Centred weigh_keys(const Inputs& in, PooledInputs& plain, bool bias, const Options& o) {
  const int64_t B = in.query.size(0), D = in.query.size(3);
  const int64_t Hk = in.key.size(1), nk = plain.key_count.size(1);
  const auto options = in.query.options().dtype(acc_type(in.query.scalar_type()));
  Centred c;
  const int64_t nq = plain.query_count.size(1);
  c.centre = o.causal ? at::empty({B, Hk, nq + 1, D}, options) : at::empty({B, Hk, D}, options);
  c.pooled.query_count = plain.query_count;
  c.pooled.key_count = plain.key_count;
  c.pooled.weights = at::empty({B, Hk, nk * o.block_k}, options);
  c.pooled.mass = at::empty({B, Hk, nk}, options);
  if (bias) c.key_bias = at::empty({B, Hk, nk}, options);
  for_heads(in, [&](int64_t item) {
    const Head at(in, o, item);
    const Tensor no_key = at.no_key();
    const Tensor q = at.queries(in), centre = pick(c.centre, at);
    const Tensor means = at.means_before(q, at.ends());
    centre.copy_(at.causal ? means : means.squeeze(0));

    // weights within each block, and their entropy
    const Tensor keys = at.blocks(in.key);
    const Tensor logits =
        at::bmm(keys, block_centres(c, at).unsqueeze(2)).mul_(at.s).view({nk * at.block});
    if (bias) pick(c.key_bias, at).copy_(score_bias(logits.view({nk, at.block}), no_key));
    Tensor weight = o.pool == Pool::centred
                        ? logits
                        : sampled_weights(at, q, logits, keys.view({-1, D}), no_key);
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
    const int64_t units = ceil_div(N, o.block_q);
    c.moments = o.causal ? at::empty({B, Hk, units, 2, D, D}, options)
                         : at::empty({B, Hk, 2, D, D}, options);
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
    const Tensor weighted = d.key * d.weight, moments = moments_of(c, at);
    for (const int64_t which : {0, 1}) {
      const Tensor& right = which == 0 ? d.value : d.key;
      if (at.causal) {
        const Past past(at, c);
        const auto of_blocks = [&](const Tensor& x) { return x.view({nk, at.block, D}); };
        const Tensor each = at::bmm(of_blocks(weighted).transpose(1, 2), of_blocks(right));
        const Tensor upto = at::constant_pad_nd(each.cumsum(0), {0, 0, 0, 0, 1, 0});
        moments.select(1, which).copy_(upto.index_select(0, past.blocks) * past.over_n);
      } else {
        moments.select(1, which).select(0, 0).copy_(at::mm(weighted.t(), right));
      }
    }
    const Tensor from_mean = at.by_units(at.queries(in)) - unit_centres(c, at).unsqueeze(1);
    const Tensor square = at::bmm(from_mean, moments.select(1, 1)).mul_(from_mean).sum(2);
    const Tensor t = at.from_units(square) * (at.s * at.s);
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
    out.copy_(out.to(at.acc) + at.from_units(r.there(term)).view({at.G, at.N, at.D}));
  });
}

}  // namespace mra::cpu
