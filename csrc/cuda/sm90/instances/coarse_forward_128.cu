// Made by csrc/cuda/generate.py.
#include "../coarse_forward.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_coarse_forward<128>(const CoarseForwardParams&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
