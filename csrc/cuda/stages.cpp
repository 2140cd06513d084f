#include "../common/stages.h"

#include "coarse.h"
#include "fine.h"

namespace mra {
namespace cuda {
Pooled pool(const Tensor& x, const OptTensor& mask, int64_t block);
BlockList plan(const Pooled& query, const Pooled& key, int64_t N, const Options& o);
BlockList transpose(const BlockList& rows, int64_t nk);
Tensor delta(const Tensor& grad_out, const Tensor& out, const Tensor& grad_lse);
BlockRows block_rows(const Tensor& grad_out, const Tensor& lse, const Tensor& delta, int64_t block_q);
}  // namespace cuda

const Stages& cuda_stages() {
  static const Stages stages{cuda::pool,
                             cuda::plan,
                             cuda::transpose,
                             cuda::coarse,
                             cuda::coarse_backward,
                             cuda::fine,
                             cuda::fine_backward,
                             cuda::delta,
                             cuda::block_rows};
  return stages;
}

}  // namespace mra
