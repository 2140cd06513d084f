// The block-coarse stage on CUDA: see Stages in common/stages.h. Where sm90/coarse_forward.cuh and
// coarse_bwd.cu don't serve, it runs the attention kernels of the fine stage in float32 on block
// means, each query block a row with its own list to leave out.
#pragma once

#include "../common/stages.h"

namespace mra::cuda {

CoarseState coarse(const PooledInputs&, const BlockList& rows, const Options&);
Grads coarse_backward(const PooledInputs&, const BlockList& rows, const BlockList& columns,
                      const BlockRows&, const Options&);

}  // namespace mra::cuda
