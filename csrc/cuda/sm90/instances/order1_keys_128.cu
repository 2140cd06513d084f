// Made by csrc/cuda/generate.py.
#include "../order1_keys.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_order1_keys<128>(const Order1Keys&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
