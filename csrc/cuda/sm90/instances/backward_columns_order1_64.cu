// Made by csrc/cuda/generate.py.
#include "../backward_columns_order1.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_backward_columns_order1<64>(const ColumnsOrder1&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
