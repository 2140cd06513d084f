// Made by csrc/cuda/generate.py.
#include "../order1_walk_keys.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_order1_walk_keys<64>(const WalkKeys&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
