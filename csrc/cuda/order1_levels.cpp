// Order 1 of calls with levels on CUDA. Without causal a key is read once, not once for every
// resolution: what block y of block_k is off the block Y of resolution r that holds it,
//
//   a_y = k~_y - k~_Y,   b_y = v~_y - v~_Y,
//
// gives the moments of r and, of the gradients, what all keys of y have in common:
//
//   C^r = C + (1/n) sum_y c_y a_y^T b_y,   Sigma^r = Sigma + (1/n) sum_y c_y a_y^T a_y
//   dv_j = kappa_j sum_r dC^r + sum_r a_y dC^r
//   dk_j = nu_j sum_r dC^rT + kappa_j sum_r dSigma^r + sum_r (b_y dC^rT + a_y dSigma^r)
//
// with C, Sigma, kappa and nu those of block_k.
#include "order1_levels.h"

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

#include "../common/budget.h"
#include "../common/order1.h"
#include "launch.h"

namespace mra::cuda {
namespace {

// Where backward runs under autocast, products of float32 are of float32 all the same.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

// a_y or b_y, [B, Hk, nk, D], from the means of all resolutions.
Tensor offsets(const Tensor& means, const Options& o, size_t r) {
  const Resolution &own = o.resolutions[0], &up = o.resolutions[r];
  const int64_t B = means.size(0), Hk = means.size(1), D = means.size(3);
  const int64_t children = up.block_k / own.block_k;
  const Tensor parents =
      means.narrow(2, up.first_k, up.nk).unsqueeze(3).expand({B, Hk, up.nk, children, D});
  const Tensor of_each = parents.reshape({B, Hk, up.nk * children, D});
  return means.narrow(2, 0, own.nk) - of_each.narrow(2, 0, own.nk);
}

// left^T right over blocks, [B, Hk, D, columns of right]: in runs, so that the device is full.
Tensor sum_over_blocks(const Tensor& left, const Tensor& right) {
  const int64_t B = left.size(0), Hk = left.size(1), nk = left.size(2), D = left.size(3);
  const int64_t run = std::clamp<int64_t>(nk, 1, 512), runs = ceil_div(nk, run);
  const auto in_runs = [&](const Tensor& x) {
    return at::constant_pad_nd(x, {0, 0, 0, runs * run - nk}).view({B * Hk * runs, run, -1});
  };
  return at::bmm(in_runs(left).transpose(1, 2), in_runs(right)).view({B, Hk, runs, D, -1}).sum(2);
}

// Of pairs of matrices, padded, the one that `which` names, [B, Hk, D, D].
Tensor matrix(const Tensor& pairs, int64_t which, int64_t D) {
  return pairs.select(2, which).narrow(2, 0, D).narrow(3, 0, D);
}

// Moments of resolution r from those of block_k.
Tensor moments_of(const Tensor& finest, const PooledInputs& pooled, const Options& o, size_t r) {
  if (r == 0) return finest;
  const int64_t D = pooled.key.size(3);
  const Tensor count = pooled.key_count.narrow(1, 0, o.resolutions[0].nk).to(at::kFloat);
  const Tensor part = count / count.sum({1}, true).clamp_min(1);
  const Tensor a = offsets(pooled.key, o, r), b = offsets(pooled.value, o, r);
  const Tensor sums = sum_over_blocks(a * part.unsqueeze(1).unsqueeze(-1), at::cat({b, a}, 3));
  const Tensor result = finest.to(at::kFloat, false, true);
  for (int64_t which = 0; which < 2; ++which) {
    matrix(result, which, D).add_(sums.narrow(3, which * D, D));
  }
  return result.to(finest.scalar_type());
}

// Adds what the keys of each block have in common of resolution r.
void add_blocks(Order1Grads& grads, const Tensor& moment_grads, const PooledInputs& pooled,
                const Options& o, size_t r) {
  const Tensor a = offsets(pooled.key, o, r), b = offsets(pooled.value, o, r);
  const Tensor c = matrix(moment_grads, 0, a.size(3)), s = matrix(moment_grads, 1, a.size(3));
  const Tensor key = at::matmul(b, c.transpose(2, 3)).add_(at::matmul(a, s));
  const Tensor value = at::matmul(a, c);
  grads.key_block = grads.key_block.defined() ? grads.key_block.add_(key) : key;
  grads.value_block = grads.value_block.defined() ? grads.value_block.add_(value) : value;
}

// means_of, with the moments of the resolution where they come from those of block_k.
PooledInputs means_and_moments(const PooledInputs& pooled, const Tensor& finest, const Options& o,
                               size_t r) {
  PooledInputs means = means_of(pooled, o.resolutions[r]);
  if (finest.defined()) means.moments = moments_of(finest, pooled, o, r);
  return means;
}

// Those of block_k, unless every query block has its own.
Tensor finest_moments(const Inputs& in, const PooledInputs& pooled, const Options& o) {
  if (o.causal) return {};
  PooledInputs means = means_of(pooled, o.resolutions[0]);
  means.moments = pooled.moments;
  return order1_moments(in, means, options_of(o, o.resolutions[0]));
}

}  // namespace

void order1_levels(FineResult& result, const Inputs& in, PooledInputs& pooled, const Options& o) {
  const Launch launch(in.query);
  const NoAutocast no_autocast(c10::DispatchKey::AutocastCUDA);
  pooled.moments = finest_moments(in, pooled, o);
  if (!o.causal) {
    std::vector<Tensor> moments;
    for (size_t r = 0; r < o.resolutions.size(); ++r) {
      moments.push_back(moments_of(pooled.moments, pooled, o, r));
    }
    const Resolution& own = o.resolutions[0];
    if (order1_at_once(result, in, means_of(pooled, own), moments, options_of(o, own))) return;
  }
  for (size_t r = 0; r < o.resolutions.size(); ++r) {
    FineResult one{result.out, result.lse, result.share.select(2, r).contiguous()};
    PooledInputs means = means_and_moments(pooled, pooled.moments, o, r);
    order1(one, in, means, options_of(o, o.resolutions[r]));
  }
}

Order1Grads order1_levels_backward(const Tensor& grad_out, const Tensor& share, const Tensor& delta,
                                   const Inputs& in, const PooledInputs& pooled, const Options& o) {
  const Launch launch(in.query);
  const NoAutocast no_autocast(c10::DispatchKey::AutocastCUDA);
  const auto count = static_cast<int64_t>(o.resolutions.size());
  const auto s = delta.sizes();
  Order1Grads grads{allocate({count, s[0], s[1], s[2]}, delta.options()), empty_query_grad(in),
                    empty_key_grad(in), empty_value_grad(in)};
  const Tensor finest = finest_moments(in, pooled, o);
  Tensor sum;  // of the gradients of moments, float32
  for (int64_t r = 0; r < count; ++r) {
    const Options one = options_of(o, o.resolutions[r]);
    const PooledInputs means = means_and_moments(pooled, finest, o, r);
    Order1Grads own = grads;
    own.coarse_delta = grads.coarse_delta.select(0, r);
    GradRows rows{grad_out, share.select(2, r).contiguous(), delta};
    if (r == 0 && order1_grad_walk(rows, in, means, one, own)) continue;
    const Tensor moment_grads = order1_grad_rows(rows, in, means, one, own, r > 0);
    if (o.causal) {
      order1_grad_keys(moment_grads, in, means, one, own, r > 0);
      continue;
    }
    const Tensor wide = moment_grads.to(at::kFloat);
    if (r > 0) add_blocks(grads, wide, pooled, o, r);
    sum = r > 0 ? sum.add(wide) : wide;
  }
  if (o.causal) return grads;
  order1_grad_keys(sum.to(finest.scalar_type()), in, means_of(pooled, o.resolutions[0]),
                   options_of(o, o.resolutions[0]), grads, false);
  return grads;
}

}  // namespace mra::cuda
