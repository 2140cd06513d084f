// Made by csrc/cuda/generate.py.
#include "../cells_forward.cuh"

namespace mra::cuda {
template cudaError_t launch_cells_forward<__half, 128>(const CellsForward&, const Device&, cudaStream_t);
}  // namespace mra::cuda
