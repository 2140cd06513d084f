// Made by csrc/cuda/generate.py.
#include "../moments.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_moments<128>(const Moments&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
