// Made by csrc/cuda/generate.py.
#include "../order1_delta.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_order1_delta<128>(const Order1Delta&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
