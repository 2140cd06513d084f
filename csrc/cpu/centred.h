// What the parts of weighted means on the CPU share (centred.cpp, centred_backward.cpp): one key
// head at a time, in torch's own operators.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <vector>

#include "../common/budget.h"
#include "stages_cpu.h"
#include "views.h"

namespace mra::cpu {

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
        block_q(o.block_q),
        causal(o.causal),
        units(o.causal ? ceil_div(N, o.block_q) : 1),
        b(item / Hk),
        hk(item % Hk),
        acc(acc_type(in.query.scalar_type())) {
    if (in.query_mask) valid_query = in.query_mask->select(0, b);
    if (in.key_mask) valid_key = in.key_mask->select(0, b);
  }

  // [B, H, ...] to this group, [G * N] or [G * N, D]. What is multiplied lies side by side: bits
  // must not depend on how the inputs lie.
  Tensor rows(const Tensor& x) const { return view(x).to(acc).reshape({G * N, -1}).contiguous(); }
  Tensor row(const Tensor& x) const { return view(x).reshape({G * N}); }
  // The same in place, [G, N] or [G, N, D].
  Tensor view(const Tensor& x) const { return x.select(0, b).narrow(0, hk * G, G); }

  // Valid queries, zeros for others; keys or values, [nk, block, D], likewise.
  Tensor queries(const Inputs& in) const {
    Tensor q = view(in.query).to(acc);
    if (valid_query.defined()) q = q.masked_fill(valid_query.logical_not().unsqueeze(-1), 0);
    return q.reshape({G * N, D}).contiguous();
  }
  Tensor blocks(const Tensor& x) const {
    Tensor k = x.select(0, b).select(0, hk).to(acc);
    if (valid_key.defined()) k = k.masked_fill(valid_key.logical_not().unsqueeze(-1), 0);
    if (M < nk * block) k = at::constant_pad_nd(k, {0, 0, 0, nk * block - M});
    return k.reshape({nk, block, D}).contiguous();
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

  // Rows [G * N] or [G * N, D] by units, which share moments and a centre: under causal a block of
  // queries, filled up with zeros, else all. [units, rows of one(, D)], and back.
  Tensor by_units(const Tensor& x) const {
    if (!causal) return x.unsqueeze(0);
    const bool wide = x.dim() > 1;
    const int64_t more = units * block_q - N, width = wide ? x.size(1) : 1;
    const Tensor filled = at::constant_pad_nd(x.reshape({G, N, width}), {0, 0, 0, more});
    const Tensor result = filled.view({G, units, block_q, width}).transpose(0, 1);
    return wide ? result.reshape({units, G * block_q, width})
                : result.reshape({units, G * block_q});
  }
  Tensor from_units(const Tensor& x) const {
    if (!causal) return x.squeeze(0);
    const bool wide = x.dim() > 2;
    const int64_t width = wide ? x.size(2) : 1;
    const Tensor rows = x.reshape({units, G, block_q, width}).transpose(0, 1);
    const Tensor result = rows.reshape({G, units * block_q, width}).narrow(1, 0, N);
    return wide ? result.reshape({G * N, width}) : result.reshape({G * N});
  }
  // Where the queries end whose mean is a centre. Under causal there is one before each unit and
  // one behind the last; a block of keys has that of the first unit that sees it.
  Tensor ends() const {
    return causal ? (at::arange(units + 1) * block_q).clamp_max(N) : at::full({1}, N, at::kLong);
  }
  Tensor seen_by() const {
    const Tensor behind = (at::arange(nk) + 1) * block;
    return (behind + (block_q - 1)).floor_divide(block_q).clamp_max(units);
  }
  Tensor unit_ends() const { return causal ? ends().narrow(0, 0, units) : ends(); }
  Tensor block_ends() const { return causal ? ends().index_select(0, seen_by()) : ends(); }
  // How many valid queries of the group there are before each of `ends`, at least 1, [n, 1] acc.
  Tensor counts_before(const Tensor& ends) const {
    const Tensor valid =
        valid_query.defined() ? valid_query.to(at::kLong) : at::ones({N}, at::kLong);
    const Tensor upto = at::constant_pad_nd(valid.cumsum(0), {1, 0}) * G;
    return upto.index_select(0, ends).clamp_min(1).to(acc).unsqueeze(1);
  }
  // Means of the group's queries (zeros where they don't count) before each of `ends`, [n, D]; and
  // what each query gets of gradients of these.
  Tensor means_before(const Tensor& q, const Tensor& ends) const {
    const Tensor upto = at::constant_pad_nd(q.view({G, N, D}).sum(0).cumsum(0), {0, 0, 1, 0});
    return upto.index_select(0, ends) / counts_before(ends);
  }
  Tensor means_backward(const Tensor& grads, const Tensor& ends) const {
    const Tensor at_end = at::zeros({N + 1, D}, grads.options());
    at_end.index_add_(0, ends, grads / counts_before(ends));
    return at_end.narrow(0, 1, N).flip(0).cumsum(0).flip(0);  // of all ends behind the query
  }

  double s;
  int64_t block, Hk, G, N, M, D, nk, block_q;
  bool causal;
  int64_t units, b, hk;
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

inline Tensor pick(const Tensor& x, const Head& at) { return x.select(0, at.b).select(0, at.hk); }

// Centres of the units, [units, D], and of the blocks of keys, [nk, D] or the same for all.
inline Tensor unit_centres(const Centred& c, const Head& at) {
  const Tensor all = pick(c.centre, at);
  return at.causal ? all.narrow(0, 0, at.units) : all.unsqueeze(0);
}
inline Tensor block_centres(const Centred& c, const Head& at) {
  const Tensor all = pick(c.centre, at);
  return at.causal ? all.index_select(0, at.seen_by()) : all.unsqueeze(0).expand({at.nk, at.D});
}
// C and Sigma of the units, [units, 2, D, D].
inline Tensor moments_of(const Centred& c, const Head& at) {
  const Tensor all = pick(c.moments, at);
  return at.causal ? all : all.unsqueeze(0);
}

// Within-block deviations of keys and values from their weighted means, [nk * block, D], and the
// weight of each key in the moments, pi_j c_y / n, [nk * block, 1]; without 1 / n under causal.
struct Deviations {
  Deviations(const Head& at, const Inputs& in, const Centred& c) {
    const Tensor count = c.pooled.key_count.select(0, at.b).to(at.acc);
    const auto deviation = [&](const Tensor& x, const Tensor& mean) {
      return (at.blocks(x) - pick(mean, at).unsqueeze(1)).reshape({at.nk * at.block, at.D});
    };
    key = deviation(in.key, c.pooled.key);
    value = deviation(in.value, c.pooled.value);
    const Tensor n = at.causal ? at::ones({}, count.options()) : count.sum().clamp_min(1);
    const Tensor share = (count / n).unsqueeze(-1);
    weight = (pick(c.pooled.weights, at).view({at.nk, at.block}) * share).view({-1, 1});
  }
  Tensor key, value, weight;
};

// Under causal: for each unit the number of key blocks before it, [units] long, and one over that
// of their valid keys, [units, 1, 1].
struct Past {
  Past(const Head& at, const Centred& c) {
    const Tensor count = c.pooled.key_count.select(0, at.b);
    blocks = at::arange(at.units).mul_(at.block_q).floor_divide_(at.block).clamp_max_(at.nk);
    const Tensor upto = at::constant_pad_nd(count.to(at::kLong).cumsum(0), {1, 0});
    over_n = 1 / upto.index_select(0, blocks).clamp_min(1).to(at.acc).view({-1, 1, 1});
  }
  Tensor blocks, over_n;
};

// Order 1 of the rows of a group, by units.
struct Rows1 {
  Rows1(const Head& at, const Inputs& in, const Centred& c, const Tensor& share)
      : q(at.by_units(at.queries(in)) - unit_centres(c, at).unsqueeze(1)),
        t(at.by_units(at.row(c.pooled.variance))),
        gamma(1 / (1 + t / 4)),
        share(at.by_units(at.row(share))),
        none(this->share == 0),
        C(moments_of(c, at).select(1, 0)),
        S(moments_of(c, at).select(1, 1)),
        u(at::bmm(q, C).mul_(at.s)) {}
  // Rows without a coarse share may hold anything.
  Tensor there(const Tensor& x) const {
    return x.masked_fill(x.dim() > 2 ? none.unsqueeze(-1) : none, 0);
  }
  Tensor q, t, gamma, share, none, C, S, u;
};

}  // namespace mra::cpu
