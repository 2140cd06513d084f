// Made by csrc/cuda/generate.py.
#include "../cells_columns.cuh"

namespace mra::cuda {
template cudaError_t launch_cells_columns<__half, 32>(const CellsBackward&, const Device&, cudaStream_t);
}  // namespace mra::cuda
