// Order 1 where Hopper's kernels walk the rows of a chunk: under causal, and of wide heads. False
// where they don't serve the call: nothing that counts is written then.
#pragma once

#include "centred_grads.h"
#include "order1_term.h"
#include "sm90/order1_walk.h"

namespace mra::cuda {

// What the kernels read of a call: all but chunks, units and what belongs to a pass.
sm90::WalkRows walk_params(const Term& term);

// Adds the term to result.out.
bool order1_walk(FineResult& result, const Term& term);
// The same for head dims beyond 128. Leaves the moments of the whole heads in `moments` where they
// are kept.
bool order1_walk_wide(FineResult& result, const Term& term, Tensor& moments);
// Fills all of `grads`. grad_out: with aligned rows.
bool order1_walk_backward(const Tensor& grad_out, const Tensor& share, const Tensor& delta,
                          const Term& term, const Order1Grads& grads);

// With weighted means, under causal. The passes of a call share `start`, c.pooled.moments_before.
// Whether a pass is to be tried: the others run on the generic kernels.
bool walks_centred(const Inputs& in, const Options& o, bool backward, const Launch& launch);
// Means and `start`, where they are not there yet.
void walk_moments(Centred& c, const Inputs& in, const Options& o);
// Sets variance, row_bias and term of c.pooled.
bool walk_prepare(Centred& c, const Term& term);
// Backward: fills coarse_delta of `grads`, variance, row_bias and slope of `c`.
bool walk_slope(const Centred& c, const FineBackward& grads, const Term& term);
// Does what centred_grads does, from a and b of each row, [B, H, N].
CentreGrads walk_gradient(const Centred& c, const Term& term, const Tensor& grad_out,
                          const float* a, const float* b, const Tensor& shares,
                          const Tensor& mass_grad, const Grads& grads, bool add);

}  // namespace mra::cuda
