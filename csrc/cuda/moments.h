// C and Sigma of order 1 where a kernel makes them from one reading of keys and values.
#pragma once

#include <functional>
#include <optional>
#include <type_traits>

#include "../common/stages.h"
#include "centred.h"
#include "launch.h"

namespace mra::cuda {

// Calls f with the padded head dim of Hopper's kernels of order 1, an integral_constant; false
// where no kernel does it.
template <class F>
bool launch_by_dim(const Launch& launch, int64_t dim, const F& f) {
  const cudaError_t error =
      dim <= 64 ? f(std::integral_constant<int, 64>{}) : f(std::integral_constant<int, 128>{});
  if (error == cudaErrorNotSupported) return false;
  launch.check(error);
  return true;
}

// Whether Hopper's kernels of order 1 serve a call with such keys.
bool order1_on_hopper(const Tensor& key, const Options& o, const Launch& launch);
// Whether Hopper's kernel of fine's gradients of the keys may take those of order 1 along.
bool order1_in_columns(const Tensor& key, const Options& o, const Launch& launch);

// Whether fine adds the order-1 term of a call with such keys, if its kernels on Hopper run.
bool order1_in_fine(const Tensor& key, const Options& o, const Launch& launch);
// Moments as that multiplies them, in the type of `key`; float16 lacks their range: there each
// matrix times a power of two, and [B, Hk, 2] float32, what undoes it.
struct FineMoments {
  Tensor matrices, scales;
};
FineMoments fine_moments(const Tensor& moments, const Tensor& key, const Launch& launch);

// Moments as kept for backward (moments_dim), or undefined where no kernel does it. Fills the key
// part of `pooled` too unless it is null; with pooled->weights, moments and means are weighted, and
// the counts are there already. `launch_beside` launches what may run beside the first of two
// kernels; it is called unless the result is undefined.
Tensor pool_moments(
    const Inputs& in, const Options& o, PooledInputs* pooled, const Tensor& key_count,
    const std::function<void()>& launch_beside = [] {});

// Under causal, how the kernels that walk the sequence (order1_walk.h) cut a head: matrices are
// padded to `dim`; a chunk starts at a multiple of unit_tiles tiles of 64 keys.
struct WalkCut {
  int dim, unit_tiles, chunks;
};
// nullopt where they don't serve the call.
std::optional<WalkCut> walk_cut(const Inputs& in, const Options& o, const Launch& launch);
// Of each chunk the sums that C and Sigma are of the keys in the chunks before it, [B, Hk, chunks,
// 2, dim, dim] float32. The rest as pool_moments.
Tensor moments_before(
    const Inputs& in, const Options& o, const WalkCut& cut, PooledInputs* pooled,
    const std::function<void()>& launch_beside = [] {});

// Whether the kernel of pool_moments makes the weights of keys too (pool = centred and sampled):
// then pool leaves the keys to weigh_keys.
bool weighs_with_moments(const Inputs& in, const Options& o, const Launch& launch);
// That: what `weights` asks for, the means of `pooled`, whose weights, mass and counts have room
// already, and what pool_moments returns; for a plan, which asks for key_bias, plain means of keys.
Tensor weigh_with_moments(const Inputs& in, const Options& o, const WeightsParams& weights,
                          PooledInputs& pooled, PooledInputs& plain);

// The means alone, weighted with pooled.weights: key and value, also in T where attention wants it.
void pool_weighted(PooledInputs& pooled, const Inputs& in, const Options& o);

}  // namespace mra::cuda
