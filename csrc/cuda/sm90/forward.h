// Hopper's kernels (sm_90a). Each returns cudaErrorNotSupported, and does nothing, for what it does
// not serve.
#pragma once

#include "../sm80/params.h"

namespace mra::cuda::sm90 {

// Half types, head dims up to DP = 64, 128, 192 or 256, query blocks of 64 or 128 rows. bfloat16 up
// to 128: order 1 too, and row_bias made from `centre` where that is set.
template <typename T, int DP>
cudaError_t launch_forward(const ForwardParams&, const Device&, cudaStream_t);
// The same for query blocks of 32 rows, DP = 64 or 128.
template <typename T, int DP>
cudaError_t launch_forward_short(const ForwardParams&, const Device&, cudaStream_t);

}  // namespace mra::cuda::sm90
