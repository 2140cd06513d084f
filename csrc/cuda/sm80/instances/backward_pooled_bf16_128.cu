// Made by csrc/cuda/generate.py.
#include "../backward_columns.cuh"

namespace mra::cuda {
template cudaError_t launch_backward_pooled<__nv_bfloat16, 128>(const BackwardParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda
