// The stages of calls with levels on CUDA: see Stages in common/stages.h, and common/levels.h for
// the words. Tensors of blocks hold those of all resolutions, the finest first.
#pragma once

#include "../common/stages.h"
#include "launch.h"
#include "levels.h"

namespace mra::cuda {

// What the kernels read: row lists, and counts of key blocks. Lists may be left to be filled.
Levels levels_of(const BlockList& rows, const Tensor& key_count, const Options& o);
// Of these lists, contiguous, those of resolution r.
BlockList rows_of(const BlockList& rows, const Resolution& r);
// Column lists of resolution r.
BlockList columns_of(const BlockList& rows, const Resolution& r);

// Means and counts of block_q (`queries`) or block_k -> those of all resolutions. `count`: of all
// resolutions where they are there already, else undefined.
Pooled pool_levels(const Pooled& finest, const Tensor& count, const Options& o, bool queries);
// Block rows, n for each head -> those of blocks that hold `children` of them.
BlockRows merge_block_rows(const BlockRows& rows, int64_t children);

Planned plan_levels(const Pooled& query, const Pooled& key, int64_t N, const Options& o);
CoarseState coarse_levels(const PooledInputs&, const BlockList& rows, const Options&);
Grads coarse_levels_backward(const PooledInputs&, const BlockList& rows, const BlockList& columns,
                             const BlockRows&, const Options&);
// share [B, H, N] and CoarseState::parts -> [B, H, resolutions, N].
Tensor split_shares(const Tensor& share, const Tensor& parts, int64_t block_q);

// coarse = row, beside exact attention, which `p` describes; key and value are the means in T.
// Adds the coarse cells to out and lse; shares [B, H, resolutions, N] or undefined.
void cells_forward(const ForwardParams& p, const Tensor& key, const Tensor& value,
                   const Tensor& shares, const Levels& levels, Dtype dtype, const Launch& launch);
// grad_q from the coarse cells alone, added to what is there where p.add is set. coarse_delta as
// FineBackward has it.
void cells_rows(const BackwardParams& p, const Tensor& key, const Tensor& value,
                const Tensor& coarse_delta, const Levels& levels, Dtype dtype,
                const Launch& launch);
// What every row of a block of block_k gets of the gradients of all means that it is part of:
// [2, B, Hk, nk, D], keys, values. `columns`: of block_q.
Tensor cells_columns(const BackwardParams& p, const Tensor& key, const Tensor& value,
                     const Tensor& key_count, const Tensor& coarse_delta, const BlockList& rows,
                     const BlockList& columns, const Options& o, Dtype dtype, const Launch& launch);

}  // namespace mra::cuda
