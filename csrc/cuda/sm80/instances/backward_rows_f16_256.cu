// Made by csrc/cuda/generate.py.
#include "../backward_rows.cuh"

namespace mra::cuda {
template cudaError_t launch_backward_rows<__half, 256>(const BackwardParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda
