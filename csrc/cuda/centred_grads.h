// What fine runs of order 1 with weighted means.
#pragma once

#include "../common/stages.h"
#include "order1_term.h"

namespace mra::cuda {

// What is added to the coarse logits of each row, [B, H, N] float32: where the kernel that attends
// doesn't make it from `centre` and `moments` of `pooled`.
Tensor centred_row_bias(const Inputs& in, const PooledInputs& pooled, const Options& o);

// Gradients of the centre, float32. Of keys: parts that add up, [B, Hk, parts, D], or undefined
// where the gradients through the weights are not made yet; under causal of 16 keys each. Of rows:
// likewise, [B, H, parts, D], or undefined where queries have got it; under causal of the centre
// before each block of queries, [B, Hk, nq, D], or, where the keys are made too, of 16 rows each.
struct CentreGrads {
  Tensor of_rows, of_keys;
  // Without of_keys, what order 1 and the shares give to keys and values, [B, Hk, M, D] float32.
  Tensor key_part, value_part;
};

// In the backward pass, behind what makes coarse_sum: order 1. Fills grads.query, or adds to it,
// with what that gives beside the logits, and grads.key and grads.value, or the parts that it
// returns, with that and with what `shares`, the gradients of the pooled keys and values
// [2, B, Hk, nk, D] float32, give by the weights. Reads grad_out, share, coarse_sum and centred of
// `back`.
// Where `columns` can, it makes those of keys and values with fine's instead.
// Returns what the centre gets, but for what key_weights_grads is to make.
CentreGrads centred_grads(const Grads& grads, const Tensor& shares, const Tensor& mass_grad,
                          const FineBackward& back, const Inputs& in, const Options& o, bool add,
                          const ColumnsWithOrder1& columns);

// Behind that, and of order 0: fills grads.key and grads.value, unless of_centre.of_keys says that
// they are. mass_grad: of pooled_shares. Returns what every query of a key head gets, [B, Hk, D]
// float32, or under causal every query of a block, [B, Hk, nq, D].
Tensor key_weights_grads(const Grads& grads, const Tensor& shares, const Tensor& mass_grad,
                         CentreGrads of_centre, const FineBackward& back, const Inputs& in,
                         const Options& o);

// Adds that to the gradients of the queries, where fine's rows came before it.
void add_to_queries(const Tensor& grad_query, const Tensor& each, const Inputs& in,
                    const Options& o);

}  // namespace mra::cuda
