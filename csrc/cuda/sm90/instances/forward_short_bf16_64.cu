// Made by csrc/cuda/generate.py.
#include "../forward_short.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_forward_short<__nv_bfloat16, 64>(const ForwardParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
