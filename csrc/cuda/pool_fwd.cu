// Block means: one warp per block of rows, one read of the input.
#include "block_sum.cuh"
#include "pool.h"

namespace mra::cuda {
namespace {

constexpr int kWarps = 4;

template <typename T, int kLanes>
__global__ void __launch_bounds__(kWarps * 32, 8) pool_kernel(const PoolParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t unit = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (unit >= int64_t{p.B} * p.H * p.n) return;  // whole warps leave; nothing below syncs the block
  const int y = static_cast<int>(unit) % p.n;
  const int head = static_cast<int>(unit) / p.n;
  const int h = head % p.H;
  const int b = head / p.H;
  const int64_t first = int64_t{y} * p.block;

  uint32_t live[kBlockWords];
  int count = 0;
#pragma unroll
  for (int g = 0; g < kBlockWords; ++g) {
    const int r = g * 32 + lane;
    bool valid = r < p.block && first + r < p.L;
    if (valid && p.mask != nullptr) valid = p.mask[b * p.L + first + r];
    live[g] = __ballot_sync(kFullWarp, valid);
    count += __popc(live[g]);
  }
  if (h == 0 && lane == 0) p.count[int64_t{b} * p.n + y] = count;

  const T* rows = static_cast<const T*>(p.x) + b * p.stride.b + h * p.stride.h + first * p.stride.l;
  const float divisor = static_cast<float>(max(count, 1));
  const int chunks = p.D / kVec<T>;
  for (int c = 0; c < chunks; c += kLanes) {
    const int chunk = c + lane % kLanes;
    float sum[kVec<T>];
    block_sum<T, kLanes>(
        rows, p.stride.l, live, chunk, chunks, [](int, int) { return 1.f; }, sum);
    if (lane < kLanes && chunk < chunks) {
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) sum[e] /= divisor;
      store_floats(p.mean + unit * p.D + chunk * kVec<T>, sum);
    }
  }
}

struct LaunchPool {
  const PoolParams& p;
  cudaStream_t stream;

  template <typename T, int kLanes>
  cudaError_t operator()() const {
    const int64_t units = int64_t{p.B} * p.H * p.n;
    const auto grid = static_cast<unsigned>((units + kWarps - 1) / kWarps);
    pool_kernel<T, kLanes><<<grid, kWarps * 32, 0, stream>>>(p);
    return cudaGetLastError();
  }
};

}  // namespace

cudaError_t pool_forward(const PoolParams& params, cudaStream_t stream) {
  return dispatch_rows(params.dtype, params.D, LaunchPool{params, stream});
}

}  // namespace mra::cuda
