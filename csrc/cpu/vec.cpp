#include "vec.h"

#include <cmath>
#include <cstring>
#include <limits>

// One body, several instruction sets, chosen by the loader (an ifunc).
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define MRA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define MRA_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MRA_CLONES
#endif
// The bodies have to be inlined into each clone to be compiled for its instruction set.
#define MRA_BODY inline __attribute__((always_inline))

namespace mra::cpu {
namespace {

template <typename A>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  using Bits = int32_t;
  static constexpr int mantissa = 23, bias = 127, degree = 7;
  static constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float lowest = -87.33654f, highest = 88.37626f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};

template <>
struct ExpTraits<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52, bias = 1023, degree = 13;
  static constexpr double round = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double lowest = -708.39, highest = 709.43;
  static constexpr double ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723212e-6;
};

constexpr double inverse_factorial(int k) { return k < 2 ? 1. : inverse_factorial(k - 1) / k; }

template <typename A, int k>
MRA_BODY A taylor(A r) {  // sum of r^(i - k) / i! from i = k up to the degree
  if constexpr (k == ExpTraits<A>::degree) {
    return static_cast<A>(inverse_factorial(k));
  } else {
    return static_cast<A>(inverse_factorial(k)) + r * taylor<A, k + 1>(r);
  }
}

// exp without a branch, so that loops over it vectorise: x = n ln 2 + r with |r| <= ln 2 / 2, then
// the Taylor series of exp(r), whose rest is below one ulp. 0 below the normal range, NaN for NaN.
template <typename A>
MRA_BODY A exp_body(A x) {
  using E = ExpTraits<A>;
  A t = x < E::lowest ? E::lowest : x;
  t = t > E::highest ? E::highest : t;
  const A shifted = t * static_cast<A>(1.44269504088896340736) + E::round;
  const A n = shifted - E::round;
  const A r = (t - n * E::ln2_high) - n * E::ln2_low;
  typename E::Bits bits, zero;
  const A round = E::round;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&zero, &round, sizeof zero);
  bits = (bits - zero + E::bias) << E::mantissa;
  A power;
  std::memcpy(&power, &bits, sizeof power);
  const A y = taylor<A, 0>(r) * power;
  return x < E::lowest ? A(0) : y;
}

template <typename A>
MRA_BODY void add_bias_and_max_body(A* s, int64_t ld, int64_t rows, int64_t cols, const A* bias,
                                    A* row_max) {
  for (int64_t r = 0; r < rows; ++r) {
    A* row = s + r * ld;
    A top = row_max[r];
    if (bias) {
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < cols; ++j) {
        const A v = row[j] + bias[j];
        row[j] = v;
        top = v > top ? v : top;
      }
    } else {
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < cols; ++j) top = row[j] > top ? row[j] : top;
    }
    row_max[r] = top;
  }
}

template <typename A>
MRA_BODY void exp_and_sum_body(A* s, int64_t ld, int64_t rows, int64_t cols, const A* shift,
                               A* row_sum) {
  for (int64_t r = 0; r < rows; ++r) {
    A* row = s + r * ld;
    const A m = shift[r];
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < cols; ++j) {
      const A e = exp_body(row[j] - m);
      row[j] = e;
      sum += e;
    }
    row_sum[r] += sum;
  }
}

template <typename A>
MRA_BODY void exp_shifted_body(A* s, int64_t ld, int64_t rows, int64_t cols, const A* bias,
                               const A* shift) {
  for (int64_t r = 0; r < rows; ++r) {
    A* row = s + r * ld;
    const A m = shift[r];
    if (bias) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) row[j] = exp_body(row[j] + bias[j] - m);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) row[j] = exp_body(row[j] - m);
    }
  }
}

template <typename A>
MRA_BODY void softmax_grad_body(const A* p, A* dp, int64_t ld, int64_t rows, int64_t cols,
                                const A* delta) {
  for (int64_t r = 0; r < rows; ++r) {
    const A* pr = p + r * ld;
    A* dr = dp + r * ld;
    const A d = delta[r];
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) dr[j] = pr[j] * (dr[j] - d);
  }
}

template <typename A>
MRA_BODY void scale_rows_body(A* s, int64_t ld, int64_t rows, int64_t cols, const A* factor) {
  for (int64_t r = 0; r < rows; ++r) {
    A* row = s + r * ld;
    const A f = factor[r];
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) row[j] *= f;
  }
}

template <typename A>
MRA_BODY void score_row_body(const A* q, const A* k_t, int64_t ld, int64_t dim, int64_t n, A a,
                             A* out) {
  for (int64_t y = 0; y < n; ++y) out[y] = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const A f = a * q[d];
    const A* k = k_t + d * ld;
#pragma omp simd
    for (int64_t y = 0; y < n; ++y) out[y] += f * k[y];
  }
}

template <typename T>
MRA_BODY acc_t<T> dot_row_body(const T* x, const T* y, int64_t n) {
  acc_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    sum += static_cast<acc_t<T>>(x[i]) * static_cast<acc_t<T>>(y[i]);
  }
  return sum;
}

}  // namespace

#define MRA_DEFINE_TILES(A)                                                                     \
  MRA_CLONES void add_bias_and_max(A* s, int64_t ld, int64_t rows, int64_t cols, const A* bias, \
                                   A* row_max) {                                                \
    add_bias_and_max_body(s, ld, rows, cols, bias, row_max);                                    \
  }                                                                                             \
  MRA_CLONES void exp_and_sum(A* s, int64_t ld, int64_t rows, int64_t cols, const A* shift,     \
                              A* row_sum) {                                                     \
    exp_and_sum_body(s, ld, rows, cols, shift, row_sum);                                        \
  }                                                                                             \
  MRA_CLONES void exp_shifted(A* s, int64_t ld, int64_t rows, int64_t cols, const A* bias,      \
                              const A* shift) {                                                 \
    exp_shifted_body(s, ld, rows, cols, bias, shift);                                           \
  }                                                                                             \
  MRA_CLONES void softmax_grad(const A* p, A* dp, int64_t ld, int64_t rows, int64_t cols,       \
                               const A* delta) {                                                \
    softmax_grad_body(p, dp, ld, rows, cols, delta);                                            \
  }                                                                                             \
  MRA_CLONES void scale_rows(A* s, int64_t ld, int64_t rows, int64_t cols, const A* factor) {   \
    scale_rows_body(s, ld, rows, cols, factor);                                                 \
  }                                                                                             \
  MRA_CLONES void add_scaled(A* y, const A* x, A a, int64_t n) {                                \
    for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];                                           \
  }                                                                                             \
  MRA_CLONES void score_row(const A* q, const A* k_t, int64_t ld, int64_t dim, int64_t n, A a,  \
                            A* out) {                                                           \
    score_row_body(q, k_t, ld, dim, n, a, out);                                                 \
  }                                                                                             \
  A exp_one(A x) { return exp_body(x); }
MRA_DEFINE_TILES(float)
MRA_DEFINE_TILES(double)

#define MRA_DEFINE_ROWS(T)                                               \
  MRA_CLONES void load_row(const T* x, int64_t n, acc_t<T>* y) {         \
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<acc_t<T>>(x[i]);  \
  }                                                                      \
  MRA_CLONES void store_row(const acc_t<T>* x, int64_t n, T* y) {        \
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(x[i]);         \
  }                                                                      \
  MRA_CLONES void add_row(const T* x, int64_t n, acc_t<T>* y) {          \
    for (int64_t i = 0; i < n; ++i) y[i] += static_cast<acc_t<T>>(x[i]); \
  }                                                                      \
  MRA_CLONES acc_t<T> dot_row(const T* x, const T* y, int64_t n) { return dot_row_body(x, y, n); }
MRA_DEFINE_ROWS(float)
MRA_DEFINE_ROWS(double)
MRA_DEFINE_ROWS(c10::BFloat16)
MRA_DEFINE_ROWS(c10::Half)

}  // namespace mra::cpu
