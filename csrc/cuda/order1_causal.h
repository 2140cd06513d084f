// Order 1 under causal where Hopper's kernels walk the sequence. False where they don't serve the
// call: nothing that counts is written then.
#pragma once

#include "order1_term.h"

namespace mra::cuda {

// Adds the term to result.out.
bool order1_causal(FineResult& result, const Term& term);
// Fills all of `grads`. grad_out: with aligned rows.
bool order1_causal_backward(const Tensor& grad_out, const Tensor& share, const Tensor& delta,
                            const Term& term, const Order1Grads& grads);

}  // namespace mra::cuda
