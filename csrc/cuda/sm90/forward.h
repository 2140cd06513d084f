// Hopper's kernels (sm_90a). Each returns cudaErrorNotSupported, and does nothing, for what it does
// not serve.
#pragma once

#include "../sm80/params.h"

namespace mra::cuda::sm90 {

// Half types, head dims up to DP = 64, 128, 192 or 256, query blocks of 64 or 128 rows; order 1 up
// to 128.
template <typename T, int DP>
cudaError_t launch_forward(const ForwardParams&, const Device&, cudaStream_t);
// The same for query blocks of 32 rows, without order 1, DP = 64 or 128.
template <typename T, int DP>
cudaError_t launch_forward_short(const ForwardParams&, const Device&, cudaStream_t);

}  // namespace mra::cuda::sm90
