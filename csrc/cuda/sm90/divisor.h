// Division by a number that is known when a kernel is launched.
#pragma once

#include <cstdint>

namespace mra::cuda::sm90 {

// n / d for n below 2^31 and d from 1 on, by one product and a shift: n (2^32 + factor) / 2^(32 +
// shift), with the factor rounded up.
struct Divisor {
  unsigned d = 1, factor = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(unsigned d) : d(d) {
    while (shift < 31 && (1u << shift) < d) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - d;
    factor = static_cast<unsigned>((excess << 32) / d + (excess > 0));
  }
  __host__ __device__ unsigned divide(unsigned n) const {
#ifdef __CUDA_ARCH__
    const unsigned high = __umulhi(n, factor);
#else
    const auto high = static_cast<unsigned>(uint64_t{n} * factor >> 32);
#endif
    return high + n >> shift;
  }
};

}  // namespace mra::cuda::sm90
