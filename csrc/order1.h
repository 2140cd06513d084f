// The first-order term of the coarse part: what a block mean throws away, damped.
//
//   o_i += gamma_i P_i u_i,   u_i = s q_i C,   gamma_i = 1 / (1 + t_i / 4),   t_i = s^2 q_i S q_i^T
//
// C and S (Sigma in docs/notation.md) are the within-block moments of (k, v) and (k, k), averaged
// over the valid keys; with causal, over the key blocks wholly before the query block. P_i is the
// coarse share of the row's mass. A few matrix products with N x D operands: ATen on every device.
#pragma once

#include "common/stages.h"

namespace mra {

// True where the term exists: order = 1 and a coarse part to correct.
inline bool has_order1(const Options& o) { return o.order == 1 && o.coarse != Coarse::none; }

// Adds the term to result.out, in place; reads result.share.
void order1_apply(FineResult& result, const Inputs& in, const PooledInputs& pooled,
                  const Options& o);

struct Order1Grads {
  Tensor row;         // [B, H, N] acc: g_i = gamma_i u_i . dO_i, so coarse_delta = delta - row
  Tensor query;       // [B, H, N, D] T
  Tensor key, value;  // [B, Hk, M, D] T, zeros at masked keys
};

// Gradient through C, S, gamma and q. That through P is the caller's: see `row`.
Order1Grads order1_backward(const Tensor& grad_out, const Tensor& share, const Inputs& in,
                            const PooledInputs& pooled, const Options& o);

}  // namespace mra
