// Made by csrc/cuda/generate.py.
#include "../forward_head.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_forward_head<__nv_bfloat16, 64, HeadForm::sampled>(const HeadParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
