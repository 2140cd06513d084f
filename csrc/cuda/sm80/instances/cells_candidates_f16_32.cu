// Made by csrc/cuda/generate.py.
#include "../cells_candidates.cuh"

namespace mra::cuda {
template cudaError_t launch_cells_candidates<__half, 32>(const CellsBackward&, const Device&, cudaStream_t);
}  // namespace mra::cuda
