// The fine stage on CUDA: see Stages in common/stages.h.
#pragma once

#include "../common/stages.h"

namespace mra::cuda {

FineResult fine(const Inputs&, const BlockList& rows, const std::optional<CoarseState>& state,
                const std::optional<PooledInputs>& pooled, const Tensor& moments, const Options&);
Grads fine_backward(const Inputs&, const BlockList& rows, const BlockList& columns,
                    const std::optional<PooledInputs>& pooled, const FineBackward&, const Options&);

}  // namespace mra::cuda
