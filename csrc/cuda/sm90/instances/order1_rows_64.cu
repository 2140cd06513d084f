// Made by csrc/cuda/generate.py.
#include "../order1_rows.cuh"

namespace mra::cuda::sm90 {
template cudaError_t launch_order1_rows<64>(const Order1Rows&, const Device&, cudaStream_t);
}  // namespace mra::cuda::sm90
