// Made by csrc/cuda/generate.py.
#include "../order1_walk_wide.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_order1_walk_wide<__nv_bfloat16>(const WalkWide&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
