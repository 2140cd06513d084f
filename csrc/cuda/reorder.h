// What ../reorder.cpp and reorder.cpp hand to reorder_rows.cu.
#pragma once

#include "types.h"

namespace mra::cuda {

constexpr int kMostReordered = 4;  // tensors in one launch

// One tensor, in vectors of `width` bytes: rows of `chunks` of them.
struct Reordered {
  const char* from;          // [B, H, L, D]
  char* to;                  // [B, P, H, D] contiguous
  int64_t b, h, l, d;        // bytes from one entry to the next; d from one vector
  int H, chunks;             // H * chunks < 2^30
  int64_t blocks_per_batch;  // of threads
  int64_t end;               // blocks of threads of this tensor and those before it, < 2^31
};

struct ReorderParams {
  Reordered tensors[kMostReordered];
  int count;
  const int32_t* index;  // [P]: a row of the input, or none where it isn't in [0, L)
  int64_t P, L;
  int width;  // bytes of a vector: 1, 2, 4, 8 or 16
};

// Blocks of threads for `vectors` vectors of a batch entry.
int64_t reorder_blocks(int64_t vectors);
cudaError_t reorder(const ReorderParams& params, cudaStream_t stream);

}  // namespace mra::cuda
