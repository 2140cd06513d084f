// Rows of up to four tensors in another order, zeros where there is none: one launch.
#include <type_traits>

#include "grid.cuh"
#include "reorder.h"

namespace mra::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 4;  // vectors of a thread, all in flight
constexpr int kVectors = kThreads * kEach;

// What holds so many bytes.
template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2,
                       std::conditional_t<kBytes == 4, uint32_t,
                                          std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;

// A block of threads writes kVectors neighbouring vectors of one batch entry of one result.
template <int kBytes>
__global__ void __launch_bounds__(kThreads) reorder_kernel(const ReorderParams p) {
  using Vector = Word<kBytes>;
  const uint32_t block = blockIdx.x;
  int which = 0;
  while (block >= p.tensors[which].end) ++which;
  const Reordered& t = p.tensors[which];
  const uint32_t mine = which == 0 ? block : block - p.tensors[which - 1].end;
  const uint32_t per_batch = t.blocks_per_batch, b = mine / per_batch;
  const uint32_t row = static_cast<uint32_t>(t.H) * t.chunks;  // vectors of a place
  const int64_t first = int64_t{mine - b * per_batch} * kVectors;
  const int64_t place = first / row, end = p.P * row;
  const uint32_t within = static_cast<uint32_t>(first - place * row);
  const char* from = t.from + b * t.b;
  Vector* to = reinterpret_cast<Vector*>(t.to) + b * end;

  Vector x[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const uint32_t i = k * kThreads + threadIdx.x;
    x[k] = Vector{};
    if (first + i >= end) continue;
    const uint32_t at = within + i, places = at / row, r = at - places * row;
    const uint32_t h = r / t.chunks, chunk = r - h * t.chunks;
    const int64_t l = __ldg(p.index + place + places);
    if (l < 0 || l >= p.L) continue;
    x[k] = __ldg(reinterpret_cast<const Vector*>(from + l * t.l + h * t.h + chunk * t.d));
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t i = first + k * kThreads + threadIdx.x;
    if (i < end) to[i] = x[k];
  }
}

}  // namespace

int64_t reorder_blocks(int64_t vectors) { return (vectors + kVectors - 1) / kVectors; }

cudaError_t reorder(const ReorderParams& p, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    return launch_grid(kernel, p.tensors[p.count - 1].end, kThreads, 0, stream, p);
  };
  switch (p.width) {
    case 1:
      return launch(reorder_kernel<1>);
    case 2:
      return launch(reorder_kernel<2>);
    case 4:
      return launch(reorder_kernel<4>);
    case 8:
      return launch(reorder_kernel<8>);
    default:
      return launch(reorder_kernel<16>);
  }
}

}  // namespace mra::cuda
