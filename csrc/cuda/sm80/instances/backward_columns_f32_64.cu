// Made by csrc/cuda/generate.py.
#include "../backward_columns.cuh"

namespace mra::cuda {
template cudaError_t launch_backward_columns<float, 64>(const BackwardParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda
