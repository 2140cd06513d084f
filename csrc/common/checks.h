// Checks of calls: the one place where an operator decides what it accepts, one function each.
// They raise ValueError, TypeError or NotImplementedError that names the argument, what came and
// what is accepted. Written over symbolic sizes, so that real kernels and Meta share them.
#pragma once

#include "options.h"

namespace mra {

// Row lists that stand for a plan: all three, or none.
struct PlanTensors {
  OptTensor row_start, row_count, row_index;
  bool given() const { return row_start.has_value(); }
};

// What forward kept: means and counts of blocks, moments, and of weighted means their centre,
// weights and mass. Those that the form needs, or none.
struct MeanTensors {
  OptTensor query, key, value, query_count, key_count, moments, centre, weights, mass;
  bool given() const { return key.has_value(); }
};

// input (B, H, L, D) with mask (B, L).
void check_pool(const Tensor& input, const OptTensor& mask, int64_t block);

// query (B, H, N, D) with key (B, Hk, M, D), masks (B, N) and (B, M), a budget.
Options check_plan(const Tensor& query, const Tensor& key, const OptTensor& key_mask,
                   const OptTensor& query_mask, const CallOptions& call);

// As check_plan, and value shaped as key; with a plan no budget is needed.
Options check_forward(const Inputs& in, const PlanTensors& plan, const CallOptions& call);

// As check_forward with a plan; grad_out and out shaped as query, grad_lse, lse and coarse_share
// (B, H, N) float32 (float64 for float64). coarse_share is empty where order 1 doesn't apply, and
// (B, H, resolutions, N) with levels, where nq and nk count the blocks of all resolutions. Means
// (B, heads, blocks, D) of that dtype, counts (B, blocks) int32; moments only beside means.
Options check_backward(const Tensor& grad_out, const OptTensor& grad_lse, const Inputs& in,
                       const Tensor& out, const Tensor& lse, const Tensor& coarse_share,
                       const PlanTensors& plan, const MeanTensors& means, const CallOptions& call);

}  // namespace mra
