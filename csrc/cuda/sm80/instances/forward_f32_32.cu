// Made by csrc/cuda/generate.py.
#include "../forward.cuh"

namespace mra::cuda {
template cudaError_t launch_forward<float, 32>(const ForwardParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda
