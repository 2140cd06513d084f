// Tensors of the stages -> the plain parameters of the attention kernels.
#pragma once

#include "../common/stages.h"
#include "kernels.h"
#include "launch.h"
#include "plan.h"
#include "pool.h"

namespace mra::cuda {

inline Lists lists_of(const BlockList& l) {
  return {l.start.const_data_ptr<int>(), l.count.const_data_ptr<int>(),
          l.index.const_data_ptr<int>(), l.index.size(2), static_cast<int>(l.start.size(2))};
}

inline const uint8_t* mask_of(const OptTensor& mask) {
  return mask ? reinterpret_cast<const uint8_t*>(mask->const_data_ptr<bool>()) : nullptr;
}

// Whether attention multiplies the means of keys and values in a type of their own: T.
inline bool rounds_pooled(const Tensor& key, const Options& o) {
  return o.coarse == Coarse::row && key.scalar_type() != at::kFloat;
}

// Raises NotImplementedError for what the kernels can't do.
void check_supported(const Options& o);

// The fine stage: tokens against tokens. `pooled_key` and `pooled_value` have the dtype of the
// inputs and are undefined unless coarse = row.
void fill(Problem& p, const Inputs& in, const BlockList& rows, const Tensor& pooled_key,
          const Tensor& pooled_value, const Tensor& key_count, const Options& o);

// The block-coarse stage: means of query blocks against means of key blocks, float32.
void fill(Problem& p, const PooledInputs& in, const BlockList& rows, const Options& o);

// The plan stage: shapes and options; pointers are left null.
PlanParams plan_params(int64_t B, int64_t H, int64_t Hk, int64_t nq, int64_t nk, int64_t D,
                       int64_t N, const Options& o);
// Empty lists of rows for that, with queues, to which its pointers are set.
BlockList empty_rows(PlanParams& p, const at::TensorOptions& ints);

// One tensor of the stage pool, its rows in blocks of `block`, and where its means go; no counts.
PoolTensor pool_tensor(const Tensor& x, const OptTensor& mask, int64_t block, const Tensor& mean);

// Gradients of the pooled keys and values of `p`, divided by the count of their block: what each of
// its rows gets; whole where there is pooled_mass. [2, B, Hk, nk, D] float32: keys, values. The
// rows are cut into parts so that the device is full; the parts' sums take O(multiprocessors)
// memory. *mass_grad, unless null, gets the gradients of the masses' logarithms, [B, Hk, nk]
// float32. Sets p.coarse_sum to null where no kernel makes it.
Tensor pooled_shares(BackwardParams& p, Dtype dtype, const Launch& launch, const Tensor& like,
                     Tensor* mass_grad = nullptr);

}  // namespace mra::cuda
