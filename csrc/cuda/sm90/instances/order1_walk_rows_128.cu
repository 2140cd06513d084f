// Made by csrc/cuda/generate.py.
#include "../order1_walk_rows.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_order1_walk_rows<128>(const WalkRows&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
