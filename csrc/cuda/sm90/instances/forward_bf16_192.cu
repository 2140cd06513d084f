// Made by csrc/cuda/generate.py.
#include "../forward.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_forward<__nv_bfloat16, 192>(const ForwardParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
