// Means of key blocks as attention takes them.
#pragma once

#include "problem.h"

namespace mra::cuda {

// In the dtype that the kernel multiplies, rounded here unless they came so, and for how many keys
// they stand.
struct PooledKeys {
  Tensor key, value, count, mass, row_bias;

  // beside: rounding them may run beside the kernel launched before. attended: else they stay
  // undefined, only the numbers of their keys are asked for.
  PooledKeys(const std::optional<PooledInputs>& pooled, const Inputs& in, const Options& o,
             const Launch& launch, bool beside = false, bool attended = true) {
    if (!pooled) return;
    count = pooled->key_count;
    mass = pooled->mass;
    row_bias = pooled->row_bias;
    if (!attended) return;
    if (!rounds_pooled(in.key, o)) {
      key = pooled->key;
      value = pooled->value;
    } else if (pooled->key_rounded.defined()) {
      key = pooled->key_rounded;
      value = pooled->value_rounded;
    } else {
      const Tensor k = with_aligned_rows(pooled->key), v = with_aligned_rows(pooled->value);
      const Tensor both =
          allocate({2, k.size(0), k.size(1), k.size(2), k.size(3)}, in.key.options());
      launch.check(round_pooled(k.const_data_ptr<float>(), v.const_data_ptr<float>(),
                                both.mutable_data_ptr(), k.numel(), dtype_of(in.key),
                                beside && k.is_same(pooled->key) && v.is_same(pooled->value),
                                launch.stream));
      key = both[0];
      value = both[1];
    }
  }
};

}  // namespace mra::cuda
