#include "scores.h"

#include <algorithm>
#include <cstring>

namespace mra::cpu {
namespace {

// `kBytes` are those of one register. Eight sums at once hide the latency of two multiply-adds a
// cycle and leave registers to AVX2, which has sixteen.
template <typename A, int kBytes>
inline __attribute__((always_inline)) void score_panel_body(const A* q, int64_t ld_q, int64_t rows,
                                                            const A* panel, int64_t dim,
                                                            int64_t count, A scale, A* s,
                                                            int64_t ld) {
  typedef A V __attribute__((vector_size(kBytes)));
  constexpr int kWidth = kBytes / sizeof(A), kVectors = kPanel / kWidth, kRows = 8 / kVectors;
  for (int64_t first = 0; first < rows; first += kRows) {
    // Past the end: the last row once more, not stored. Loops over registers are unrolled by hand,
    // as the compiler else leaves the sums in memory.
    const A* row[kRows];
    V sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      row[r] = q + std::min<int64_t>(first + r, rows - 1) * ld_q;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = V{};
    }
    for (int64_t d = 0; d < dim; ++d) {
      V k[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        std::memcpy(&k[v], panel + d * kPanel + v * kWidth, sizeof k[v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] += row[r][d] * k[v];
      }
    }
    A whole[kPanel];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      A* const to = first + r < rows && count == kPanel ? s + (first + r) * ld : whole;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const V scaled = sum[r][v] * scale;
        std::memcpy(to + v * kWidth, &scaled, sizeof scaled);
      }
      if (first + r < rows && count < kPanel) {
        std::copy_n(whole, count, s + (first + r) * ld);
      }
    }
  }
}

}  // namespace

// The same for registers of 64, 32 and 16 bytes; the loader picks (as in vec.cpp).
#define MRA_DEFINE_VERSION(A, TARGET, BYTES)                                               \
  TARGET void score_panel_version(const A* q, int64_t ld_q, int64_t rows, const A* panel,  \
                                  int64_t dim, int64_t count, A scale, A* s, int64_t ld) { \
    score_panel_body<A, BYTES>(q, ld_q, rows, panel, dim, count, scale, s, ld);            \
  }
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define MRA_DEFINE_VERSIONS(A)                                   \
  MRA_DEFINE_VERSION(A, __attribute__((target("avx512f"))), 64)  \
  MRA_DEFINE_VERSION(A, __attribute__((target("avx2,fma"))), 32) \
  MRA_DEFINE_VERSION(A, __attribute__((target("default"))), 16)
#else
#define MRA_DEFINE_VERSIONS(A) MRA_DEFINE_VERSION(A, , 16)
#endif
MRA_DEFINE_VERSIONS(float)
MRA_DEFINE_VERSIONS(double)

#define MRA_DEFINE_SCORE_PANEL(A)                                                       \
  void score_panel(const A* q, int64_t ld_q, int64_t rows, const A* panel, int64_t dim, \
                   int64_t count, A scale, A* s, int64_t ld) {                          \
    score_panel_version(q, ld_q, rows, panel, dim, count, scale, s, ld);                \
  }
MRA_DEFINE_SCORE_PANEL(float)
MRA_DEFINE_SCORE_PANEL(double)

}  // namespace mra::cpu
