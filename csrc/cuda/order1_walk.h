// Order 1 where Hopper's kernels walk the rows of a chunk: under causal, and of wide heads. False
// where they don't serve the call: nothing that counts is written then.
#pragma once

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

}  // namespace mra::cuda
