// Order 1 with weighted means in the backward pass, between fine's rows and its columns.
#pragma once

#include "../common/stages.h"

namespace mra::cuda {

// Adds to grads.query what order 1 gives beside the logits, and fills grads.key and grads.value
// with that and with what `shares`, the gradients of the pooled keys and values [2, B, Hk, nk, D]
// float32, give by the weights. Reads grad_out, share, coarse_sum and centred of `back`.
void centred_grads(const Grads& grads, const Tensor& shares, const FineBackward& back,
                   const Inputs& in, const Options& o);

}  // namespace mra::cuda
