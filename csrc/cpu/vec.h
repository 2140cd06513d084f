// Elementwise work on tiles of acc (float or double), and conversions of rows between T and acc.
//
// Each function is compiled for several instruction sets (vec.cpp) and the best one is picked when
// the library is loaded: a package built on one machine is fast on another, and no -march flag is
// needed. Flags that csrc/cpu wants: `-O3 -fopenmp` when compiling (at::parallel_for and
// `omp simd` are inline code and do nothing without it). Linking needs no -fopenmp: the OpenMP
// runtime is the one libtorch_cpu carries, and a second one would bring its own threads.
//
// A tile is `rows` x `cols`, row r at s + r * ld.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace mra::cpu {

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

#define MRA_DECLARE_TILES(A)                                                                      \
  /* s += bias (unless null); row_max[r] = max(row_max[r], max_j s[r][j]). */                     \
  void add_bias_and_max(A* s, int64_t ld, int64_t rows, int64_t cols, const A* bias, A* row_max); \
  /* s = exp(s - shift[r]); row_sum[r] += sum_j s[r][j]. */                                       \
  void exp_and_sum(A* s, int64_t ld, int64_t rows, int64_t cols, const A* shift, A* row_sum);     \
  /* s = exp(s + bias - shift[r]); bias may be null. */                                           \
  void exp_shifted(A* s, int64_t ld, int64_t rows, int64_t cols, const A* bias, const A* shift);  \
  /* dp = p * (dp - delta[r]). */                                                                 \
  void softmax_grad(const A* p, A* dp, int64_t ld, int64_t rows, int64_t cols, const A* delta);   \
  /* s = s * factor[r]. */                                                                        \
  void scale_rows(A* s, int64_t ld, int64_t rows, int64_t cols, const A* factor);                 \
  /* y += a * x. */                                                                               \
  void add_scaled(A* y, const A* x, A a, int64_t n);                                              \
  /* out[y] = a * sum_d q[d] * k_t[d * ld + y]: every y is summed in the same order, so equal     \
     columns give equal bits wherever they stand. */                                              \
  void score_row(const A* q, const A* k_t, int64_t ld, int64_t dim, int64_t n, A a, A* out);      \
  A exp_one(A x);
MRA_DECLARE_TILES(float)
MRA_DECLARE_TILES(double)
#undef MRA_DECLARE_TILES

#define MRA_DECLARE_ROWS(T)                                        \
  void load_row(const T* x, int64_t n, acc_t<T>* y);  /* y = x */  \
  void store_row(const acc_t<T>* x, int64_t n, T* y); /* y = x */  \
  void add_row(const T* x, int64_t n, acc_t<T>* y);   /* y += x */ \
  acc_t<T> dot_row(const T* x, const T* y, int64_t n);
MRA_DECLARE_ROWS(float)
MRA_DECLARE_ROWS(double)
MRA_DECLARE_ROWS(c10::BFloat16)
MRA_DECLARE_ROWS(c10::Half)
#undef MRA_DECLARE_ROWS

}  // namespace mra::cpu
