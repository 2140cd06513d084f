// The one door to the attention kernels: picks the kernel for a dtype, head_dim and device. A
// faster path for one architecture goes in its own folder beside sm80/ and is chosen here.
#pragma once

#include <vector>

#include "coarse_params.h"
#include "sm80/cells.h"
#include "sm90/backward.h"

namespace mra::cuda {

// Every kernel takes head dims of multiples of 8 up to 256, padded to the next compiled size.
// Clears `moments` and `term` where the kernel leaves out the order-1 term. cudaErrorNotSupported
// where none makes row_bias from `centre`: it is to be given then.
cudaError_t forward(ForwardParams&, Dtype, const Device&, cudaStream_t);
cudaError_t backward_rows(const BackwardParams&, Dtype, const Device&, cudaStream_t);
cudaError_t backward_columns(const BackwardParams&, Dtype, const Device&, cudaStream_t);
// With order 1 of the keys inside; cudaErrorNotSupported where no kernel makes both.
cudaError_t backward_columns_order1(const sm90::ColumnsOrder1&, const Device&, cudaStream_t);
cudaError_t backward_pooled(const BackwardParams&, Dtype, const Device&, cudaStream_t);
// The block-coarse state for half types; cudaErrorNotSupported where `forward` has to make it.
cudaError_t coarse_forward(const CoarseForwardParams&, const Device&, cudaStream_t);
// Coarse cells of calls with levels.
cudaError_t cells_forward(const CellsForward&, Dtype, const Device&, cudaStream_t);
cudaError_t cells_rows(const CellsBackward&, Dtype, const Device&, cudaStream_t);
cudaError_t cells_candidates(const CellsBackward&, Dtype, const Device&, cudaStream_t);
cudaError_t cells_columns(const CellsBackward&, Dtype, const Device&, cudaStream_t);

// A row of the table that info() prints.
struct KernelInfo {
  const char *stage, *kernel, *file, *arch, *dtypes, *head_dims;
};
std::vector<KernelInfo> kernel_table();

}  // namespace mra::cuda
