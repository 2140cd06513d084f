// Every operator schema of the namespace mra_attention. Implementations register themselves:
// cpu/stages.cpp and cuda/stages.cpp (kernels), meta.cpp, autograd.cpp, autocast.cpp.
#include <torch/library.h>

//
// levels: block, cells per row, block, cells per row, ..., the coarsest first. With them, row
// lists, means and counts hold the blocks of all resolutions, those of block_q and block_k first,
// then coarser and coarser ones; coarse_share is (B, H, resolutions, N), and no moments are kept.
//
// density: one for all heads, or one for each head of query.
//
// pool: how keys weigh in the means of coarse 'row': 'even', 'centred' or 'sampled'. Plans of other
// means than even ones are made of another score. With them come query_centre (B, Hk, D), the mean
// query of each key head (under causal (B, Hk, nq + 1, D): of those before each block of queries
// and of all), key_weights (B, Hk, nk * block_k), the weight of each key within its block, and
// block_mass (B, Hk, nk), what stands for counts, on the CPU its logarithm.
TORCH_LIBRARY(mra_attention, m) {
  // Means over the valid rows of each block of `block` rows. mean (B, H, n, D), count (B, n).
  m.def("pool(Tensor input, Tensor? mask, int block) -> (Tensor mean, Tensor count)");

  // Selection: the row lists of a plan. row_start, row_count (B, H, nq), row_index (B, H,
  // capacity).
  m.def(
      "plan(Tensor query, Tensor key, Tensor? key_mask, Tensor? query_mask, SymInt? "
      "blocks_per_row, "
      "float[1]? density, int block_q, int block_k, str selection, int diagonal_blocks, "
      "int first_blocks, bool is_causal, float? scale, int[]? levels=None, str pool='even') "
      "-> (Tensor row_start, Tensor row_count, Tensor row_index)");

  // Attention, with a given plan (all three row tensors) or one made here (none of them). The row
  // lists come back when they were made here, and are empty otherwise. Means and counts of blocks
  // (as pool gives them) and moments (C and Sigma, (B, Hk, 2, P, P)) come back where backward reads
  // them, and are empty otherwise, or without `keep`.
  m.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? query_mask, "
      "Tensor? row_start, Tensor? row_count, Tensor? row_index, SymInt? blocks_per_row, "
      "float[1]? density, int block_q, int block_k, str coarse, int order, str selection, "
      "int diagonal_blocks, int first_blocks, bool is_causal, float? scale, int[]? levels=None, "
      "str pool='even', bool keep=True) "
      "-> (Tensor out, Tensor lse, Tensor coarse_share, Tensor row_start, Tensor row_count, "
      "Tensor row_index, Tensor query_mean, Tensor key_mean, Tensor value_mean, "
      "Tensor query_count, Tensor key_count, Tensor moments, Tensor query_centre, "
      "Tensor key_weights, Tensor block_mass)");

  // What forward kept and is left out is made again.
  m.def(
      "backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor? key_mask, Tensor? query_mask, Tensor out, Tensor lse, Tensor coarse_share, "
      "Tensor row_start, Tensor row_count, Tensor row_index, int block_q, int block_k, str coarse, "
      "int order, bool is_causal, float? scale, Tensor? query_mean=None, Tensor? key_mean=None, "
      "Tensor? value_mean=None, Tensor? query_count=None, Tensor? key_count=None, "
      "Tensor? moments=None, Tensor? query_centre=None, Tensor? key_weights=None, "
      "Tensor? block_mass=None, int[]? levels=None, str pool='even') "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");

  // Rows in another order: results (B, H, P, D) with [..., p, :] = input[..., index[p], :], zeros
  // where index[p] is none of the L rows. 1 to 4 inputs (B, H, L, D), heads may differ; index int32
  // (P,). inverse, int32 (L,), says where each row comes: the gradient goes back by it.
  m.def("reorder(Tensor[] inputs, Tensor index, Tensor inverse) -> Tensor[]");
}
