// Matrix products through the BLAS that torch carries.
//
// libtorch_cpu exports the Fortran names of its BLAS (MKL or OpenBLAS); its C++ wrapper
// at::native::cpublas::gemm is not exported. The names are weak here: where a build of torch hides
// them, the same product goes through at::addmm_out.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

#include <array>
#include <cstdint>
#include <limits>

extern "C" {
__attribute__((weak)) void sgemm_(const char* transa, const char* transb, const int* m,
                                  const int* n, const int* k, const float* alpha, const float* a,
                                  const int* lda, const float* b, const int* ldb, const float* beta,
                                  float* c, const int* ldc);
__attribute__((weak)) void dgemm_(const char* transa, const char* transb, const int* m,
                                  const int* n, const int* k, const double* alpha, const double* a,
                                  const int* lda, const double* b, const int* ldb,
                                  const double* beta, double* c, const int* ldc);
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
}

namespace mra::cpu {

// Rows of a matrix product must not be further apart than this: BLAS counts in int.
constexpr int64_t kMaxLeadingDim = std::numeric_limits<int>::max();

// While it lives, products on this thread stay on this thread: the work is already spread over
// threads outside, and the split of a product must not depend on how many there are.
class SerialBlas {
 public:
  SerialBlas() {
    if (MKL_Set_Num_Threads_Local) before_ = MKL_Set_Num_Threads_Local(1);
  }
  ~SerialBlas() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  SerialBlas(const SerialBlas&) = delete;
  SerialBlas& operator=(const SerialBlas&) = delete;

 private:
  int before_ = 0;
};

inline bool call_blas(const char* ta, const char* tb, int m, int n, int k, float alpha,
                      const float* a, int lda, const float* b, int ldb, float beta, float* c,
                      int ldc) {
  if (!sgemm_) return false;
  sgemm_(ta, tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
  return true;
}

inline bool call_blas(const char* ta, const char* tb, int m, int n, int k, double alpha,
                      const double* a, int lda, const double* b, int ldb, double beta, double* c,
                      int ldc) {
  if (!dgemm_) return false;
  dgemm_(ta, tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
  return true;
}

enum class Op { none, transpose };

// Row-major C [m, n] = alpha op(A) op(B) + beta C, op(A) [m, k], op(B) [k, n]. With beta 0, C may
// hold anything.
template <typename A>
void gemm(Op op_a, Op op_b, int64_t m, int64_t n, int64_t k, A alpha, const A* a, int64_t lda,
          const A* b, int64_t ldb, A beta, A* c, int64_t ldc) {
  if (m == 0 || n == 0) return;
  // BLAS is column-major: there the product reads C' = op(B)' op(A)'.
  if (call_blas(op_b == Op::none ? "N" : "T", op_a == Op::none ? "N" : "T", static_cast<int>(n),
                static_cast<int>(m), static_cast<int>(k), alpha, b, static_cast<int>(ldb), a,
                static_cast<int>(lda), beta, c, static_cast<int>(ldc))) {
    return;
  }
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
  const auto view = [&](const A* p, Op op, int64_t rows, int64_t cols, int64_t ld) {
    const auto strides =
        op == Op::none ? std::array<int64_t, 2>{ld, 1} : std::array<int64_t, 2>{1, ld};
    return at::from_blob(const_cast<A*>(p), {rows, cols}, strides, options);
  };
  at::Tensor out = view(c, Op::none, m, n, ldc);
  at::addmm_out(out, out, view(a, op_a, m, k, lda), view(b, op_b, k, n, ldb), beta, alpha);
}

}  // namespace mra::cpu
