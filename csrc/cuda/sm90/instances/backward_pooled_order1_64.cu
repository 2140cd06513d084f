// Made by csrc/cuda/generate.py.
#include "../backward_pooled_order1.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_backward_pooled_order1<64>(const PooledOrder1&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
