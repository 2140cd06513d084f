// The functions that fill the CPU's table of stages; what each does is said in common/stages.h.
#pragma once

#include "../common/stages.h"

namespace mra::cpu {

Pooled pool(const Tensor& x, const OptTensor& mask, int64_t block);
PooledInputs pool_inputs(const Inputs&, const Options&, bool query, bool key);

Planned plan(const Pooled& query, const Pooled& key, const std::optional<PooledInputs>&, int64_t N,
             const Options&);
BlockList transpose(const BlockList& rows, int64_t nk);

CoarseState coarse(const PooledInputs&, const BlockList& rows, const Options&);
Grads coarse_backward(const PooledInputs&, const BlockList& rows, const BlockList& columns,
                      const BlockRows&, const Options&);

// With levels: pool_levels adds the blocks of the coarser resolutions to those of block_q or
// block_k
// (`queries`), the other way its backward adds their gradients, [B, heads, blocks of all, D] of the
// means, to those of the blocks that they hold, each divided by the count of its block.
Pooled pool_levels(const Pooled& finest, const Options&, bool queries);
Tensor pool_levels_backward(const Tensor& grad, const Tensor& count, const Options&, bool queries);
BlockList plan_levels(const Pooled& query, const Pooled& key, int64_t N, const Options&);
CoarseState coarse_levels(const PooledInputs&, const BlockList& rows, const Options&);
Grads coarse_levels_backward(const PooledInputs&, const BlockList& rows, const BlockRows&,
                             const Options&);

FineResult fine(const Inputs&, const BlockList& rows, const std::optional<CoarseState>&,
                const std::optional<PooledInputs>&, const Tensor& moments, const Options&);
Grads fine_backward(const Inputs&, const BlockList& rows, const BlockList& columns,
                    const std::optional<PooledInputs>&, const FineBackward&, const Options&);

Tensor delta(const Tensor& grad_out, const Tensor& out, const Tensor& grad_lse);
BlockRows block_rows(const Tensor& grad_out, const Tensor& lse, const Tensor& delta,
                     int64_t block_q);
std::pair<Tensor, BlockRows> delta_and_block_rows(const Tensor& grad_out, const Tensor& out,
                                                  const Tensor& grad_lse, const Tensor& lse,
                                                  int64_t block_q);

void order1(FineResult& result, const Inputs&, PooledInputs&, const Options&);
Order1Grads order1_backward(const Tensor& grad_out, const Tensor& share, const Tensor& out,
                            const Tensor& grad_lse, const Inputs&, const PooledInputs&,
                            const Options&);

Centred weigh_keys(const Inputs&, PooledInputs& plain, bool bias, const Options&);
void centre(Centred&, const Inputs&, bool backward, const Options&);
void centred_term(FineResult& result, const Inputs&, const Centred&, const Options&);
void centred_delta(FineBackward& grads, const Tensor& out, const Tensor& grad_lse, const Inputs&,
                   Centred&, const BlockList& rows, const Options&);
void centred_grads(const Grads&, const FineBackward&, const Inputs&, const Options&);

}  // namespace mra::cpu
