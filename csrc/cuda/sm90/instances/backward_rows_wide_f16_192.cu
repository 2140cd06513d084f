// Made by csrc/cuda/generate.py.
#include "../backward_rows_wide.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_backward_rows_wide<__half, 192>(const BackwardParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
