#include "../common/stages.h"

#include "coarse.h"
#include "fine.h"

namespace mra {
namespace cuda {
Pooled pool(const Tensor& x, const OptTensor& mask, int64_t block);
PooledInputs pool_inputs(const Inputs& in, const Options& o, bool query, bool key);
Planned plan(const Pooled& query, const Pooled& key, const std::optional<PooledInputs>& pooled,
             int64_t N, const Options& o);
BlockList transpose(const BlockList& rows, int64_t nk);
Tensor delta(const Tensor& grad_out, const Tensor& out, const Tensor& grad_lse);
BlockRows block_rows(const Tensor& grad_out, const Tensor& lse, const Tensor& delta,
                     int64_t block_q);
std::pair<Tensor, BlockRows> delta_and_block_rows(const Tensor& grad_out, const Tensor& out,
                                                  const Tensor& grad_lse, const Tensor& lse,
                                                  int64_t block_q);
void order1(FineResult& result, const Inputs& in, PooledInputs& pooled, const Options& o);
Order1Grads order1_backward(const Tensor& grad_out, const Tensor& share, const Tensor& out,
                            const Tensor& grad_lse, const Inputs& in, const PooledInputs& pooled,
                            const Options& o);
std::optional<HeadResult> forward_head(const Inputs& in, const Options& o);
std::optional<Prepared> prepare(const Inputs& in, bool plan, const Options& o);
Centred weigh_keys(const Inputs& in, PooledInputs& plain, bool bias, const Options& o);
void centre(Centred& c, const Inputs& in, bool backward, const Options& o);
void centred_term(FineResult& result, const Inputs& in, const Centred& c, const Options& o);
void centred_delta(FineBackward& grads, const Tensor& out, const Tensor& grad_lse, const Inputs& in,
                   Centred& c, const BlockList& rows, const Options& o);
}  // namespace cuda

const Stages& cuda_stages() {
  static const Stages stages{cuda::pool,
                             cuda::pool_inputs,
                             cuda::plan,
                             cuda::transpose,
                             cuda::coarse,
                             cuda::coarse_backward,
                             cuda::fine,
                             cuda::fine_backward,
                             cuda::delta,
                             cuda::block_rows,
                             cuda::delta_and_block_rows,
                             cuda::order1,
                             cuda::order1_backward,
                             cuda::forward_head,
                             cuda::prepare,
                             cuda::weigh_keys,
                             cuda::centre,
                             cuda::centred_term,
                             cuda::centred_delta};
  return stages;
}

}  // namespace mra
