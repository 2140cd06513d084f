// Made by csrc/cuda/generate.py.
#include "../backward_columns.cuh"

namespace mra::cuda {
template cudaError_t launch_backward_pooled<float, 64>(const BackwardParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda
