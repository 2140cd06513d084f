// Made by csrc/cuda/generate.py.
#include "../order1_causal_keys.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_order1_causal_keys<128>(const CausalKeys&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
