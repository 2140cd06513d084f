// Order 1 of a call: once, or with levels once for every resolution, each with moments, a coarse
// share and a damping of its own.
#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>

#include "levels.h"

namespace mra {

// The call as one whose blocks are those of a resolution, and the means that it would have.
inline Options options_of(const Options& o, const Resolution& r) {
  Options one = o;
  one.block_q = r.block_q;
  one.block_k = r.block_k;
  one.levels.clear();
  one.resolutions.clear();
  return one;
}
inline PooledInputs means_of(const PooledInputs& all, const Resolution& r) {
  PooledInputs one;
  one.key = all.key.narrow(2, r.first_k, r.nk).contiguous();
  one.value = all.value.narrow(2, r.first_k, r.nk).contiguous();
  one.key_count = all.key_count.narrow(1, r.first_k, r.nk).contiguous();
  one.type = all.type;
  return one;
}

// Stages order1 and order1_backward of a device that has them for one resolution.
template <class Stage>
void order1_of_each(Stage order1, FineResult& result, const Inputs& in, PooledInputs& pooled,
                    const Options& o) {
  for (size_t r = 0; r < o.resolutions.size(); ++r) {
    FineResult one{result.out, result.lse, result.share.select(2, r).contiguous()};
    PooledInputs means = means_of(pooled, o.resolutions[r]);
    order1(one, in, means, options_of(o, o.resolutions[r]));
    if (r == 0) pooled.moments = means.moments;
  }
}
// of_one(share, means, options): the gradients of one.
template <class OfOne>
Order1Grads order1_grads_of_each(const OfOne& of_one, const Tensor& share,
                                 const PooledInputs& pooled, const Options& o) {
  Order1Grads sum;
  std::vector<Tensor> deltas;
  for (size_t r = 0; r < o.resolutions.size(); ++r) {
    const Order1Grads one =
        of_one(share.select(2, r).contiguous(), means_of(pooled, o.resolutions[r]),
               options_of(o, o.resolutions[r]));
    deltas.push_back(one.coarse_delta);
    if (r == 0) {
      sum = one;
    } else {
      sum.query.add_(one.query);
      sum.key.add_(one.key);
      sum.value.add_(one.value);
    }
  }
  sum.coarse_delta = at::stack(deltas);
  return sum;
}

// Rows of blocks of every resolution, [B, H, blocks of all(, D)]: see BlockRows.
inline BlockRows all_block_rows(const Stages& stages, const Tensor& grad_out, const Tensor& lse,
                                const Tensor& coarse_delta, const Options& o) {
  if (o.levels.empty()) return stages.block_rows(grad_out, lse, coarse_delta, o.block_q);
  std::vector<Tensor> lses, grads, deltas;
  for (size_t r = 0; r < o.resolutions.size(); ++r) {
    const Tensor delta = coarse_delta.dim() == 4 ? coarse_delta.select(0, r) : coarse_delta;
    const BlockRows one = stages.block_rows(grad_out, lse, delta, o.resolutions[r].block_q);
    lses.push_back(one.lse);
    grads.push_back(one.grad);
    deltas.push_back(one.delta);
  }
  return {at::cat(lses, 2), at::cat(grads, 2), at::cat(deltas, 2)};
}

}  // namespace mra
