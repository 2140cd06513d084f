// What the passes of weighted means share: centred.cpp forward, centred_backward.cpp backward.
#pragma once

#include "centred.h"
#include "centred_grads.h"
#include "order1_term.h"
#include "order1_walk.h"

namespace mra::cuda {

inline Centres centres_of(const Inputs& in, const Options& o) {
  const int64_t nq = ceil_div(in.query.size(2), o.block_q);
  return {static_cast<int>(nq), log2_of(o.block_q), log2_of(o.block_k)};
}

// A launch of shift_queries from `from` to `to`, both [B, H, N, D] T.
inline void shift(const Tensor& from, const Tensor& to, const Tensor& by, float sign,
                  const Inputs& in, const Options& o, const Launch& launch) {
  ShiftQueriesParams p{};
  p.from = from.const_data_ptr();
  p.to = to.mutable_data_ptr();
  p.from_strides = strides_of(from);
  p.to_strides = strides_of(to);
  p.shift = by.const_data_ptr<float>();
  p.mask = mask_of(in.query_mask);
  p.dtype = dtype_of(from);
  p.B = static_cast<int>(from.size(0));
  p.H = static_cast<int>(from.size(1));
  p.Hk = static_cast<int>(in.key.size(1));
  p.N = static_cast<int>(from.size(2));
  p.D = static_cast<int>(from.size(3));
  p.shifts = by.dim() == 4 ? static_cast<int>(by.size(2)) : 1;
  p.log2_block_q = log2_of(o.block_q);
  p.sign = sign;
  launch.check(shift_queries(p, launch.stream));
}

// What order 1 reads: under causal the queries less their centres, zeros where they don't count.
inline Inputs order1_inputs(const Inputs& in, const Centred& c) {
  if (!c.queries.defined()) return in;
  return {c.queries, in.key, in.value, in.key_mask, std::nullopt};
}

// Under causal, where the generic kernels do order 1: sets c.queries, and the moments of each unit.
inline void less_centres(Centred& c, const Inputs& in, const Options& o) {
  const Launch launch(in.query);
  c.queries = empty_heads_last(in.query);
  shift(in.query, c.queries, c.centre, -1.f, in, o, launch);
  const Inputs from = order1_inputs(in, c);
  if (!c.moments.defined()) c.moments = Term(launch, from, c.pooled, o).moments();
}

// A launch of order1_rows with the queries less their centre.
inline Order1Rows centred_rows(const Term& term, const Centred& c, const Tensor& share,
                               RowsStep step) {
  Order1Rows p = term.rows(c.moments, share, step);
  if (!term.o.causal) p.centre = c.centre.const_data_ptr<float>();
  p.mask = mask_of(term.in.query_mask);
  p.variance = data_of<float>(c.pooled.variance);
  p.row_bias = data_of<float>(c.pooled.row_bias);
  return p;
}

inline CentreProductsParams products_of(const Term& term, const Centred& c, const Tensor& result) {
  CentreProductsParams p{};
  p.matrices = c.moments.const_data_ptr();
  p.centre = c.centre.const_data_ptr<float>();
  p.count = c.pooled.query_count.const_data_ptr<int>();
  p.result = result.mutable_data_ptr<float>();
  p.dtype = term.dtype == Dtype::bf16 ? Dtype::bf16 : Dtype::f32;
  p.B = term.B;
  p.H = term.H;
  p.Hk = term.Hk;
  p.D = term.D;
  p.dim = term.dim;
  p.nq = static_cast<int>(c.pooled.query_count.size(1));
  return p;
}

// The centre times C and Sigma, [B, Hk, 2, dim].
inline Tensor centre_matrices(const Term& term, const Centred& c, bool beside = false) {
  const Tensor result = allocate({term.B, term.Hk, 2, term.dim}, term.acc());
  CentreProductsParams p = products_of(term, c, result);
  p.beside = beside;
  term.launch.check(centre_products(p, term.launch.stream));
  return result;
}

// All of centred_delta and, into grads.coarse_rows and query_extra, the coarse part and order 1 of
// the rows; false where no kernel does it.
bool pooled_order1(FineBackward& grads, const Tensor& out, const Tensor& grad_lse, const Term& term,
                   const Centred& c, const BlockList& rows);

}  // namespace mra::cuda
