// Order 1 of calls with levels, and the parts of order1.cpp that it is made of: those take one
// resolution, as a call without levels.
#pragma once

#include <vector>

#include "../common/stages.h"

namespace mra::cuda {

// C and Sigma: those in `pooled` where they are there.
Tensor order1_moments(const Inputs& in, const PooledInputs& pooled, const Options& o);

// The term of all resolutions, with the moments of each and result.share [B, H, resolutions, N];
// the rest of the call is that of block_k. False, and nothing done, where the kernel has no room.
bool order1_at_once(FineResult& result, const Inputs& in, const PooledInputs& pooled,
                    const std::vector<Tensor>& moments, const Options& o);

// What the backward pass has of the rows; delta is made from `out` and grad_lse where it isn't
// there.
struct GradRows {
  Tensor grad_out, share, delta, out{}, grad_lse{};
};
// Fills grads.query, or adds to it, and grads.coarse_delta; returns dC and dSigma.
Tensor order1_grad_rows(GradRows& rows, const Inputs& in, const PooledInputs& pooled,
                        const Options& o, const Order1Grads& grads, bool add,
                        Tensor* held = nullptr);
// From them grads.key and grads.value.
void order1_grad_keys(const Tensor& moment_grads, const Inputs& in, const PooledInputs& pooled,
                      const Options& o, const Order1Grads& grads, bool add);

// Both at once under causal where Hopper's kernels serve the call; else false.
bool order1_grad_walk(const GradRows& rows, const Inputs& in, const PooledInputs& pooled,
                      const Options& o, const Order1Grads& grads);

void order1(FineResult& result, const Inputs& in, PooledInputs& pooled, const Options& o);
void order1_levels(FineResult& result, const Inputs& in, PooledInputs& pooled, const Options& o);
Order1Grads order1_levels_backward(const Tensor& grad_out, const Tensor& share, const Tensor& delta,
                                   const Inputs& in, const PooledInputs& pooled, const Options& o);

}  // namespace mra::cuda
