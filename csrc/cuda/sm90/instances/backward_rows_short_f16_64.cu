// Made by csrc/cuda/generate.py.
#include "../backward_rows_short.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_backward_rows_short<__half, 64>(const BackwardParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
