// Made by csrc/cuda/generate.py.
#include "../backward_columns_wide.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_backward_columns_wide<__nv_bfloat16, 192>(const BackwardParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
