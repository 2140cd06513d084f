// Made by csrc/cuda/generate.py.
#include "../coarse_backward.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_coarse_backward<128>(const CoarseBackwardParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
