// The block-coarse part alone on Hopper; see forward.h.
#pragma once

#include "../coarse_params.h"

namespace mra::cuda::sm90 {

// Head dims up to DP = 64 or 128.
template <int DP>
cudaError_t launch_coarse_forward(const CoarseForwardParams&, const Device&, cudaStream_t);
template <int DP>
cudaError_t launch_coarse_backward(const CoarseBackwardParams&, const Device&, cudaStream_t);

}  // namespace mra::cuda::sm90
