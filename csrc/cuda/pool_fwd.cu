// Block means of up to three tensors, one read of each: a warp takes one block of rows, or as many
// neighbouring ones as have kPoolWindow rows.
#include "pool_rows.cuh"

namespace mra::cuda {
namespace {

// Six blocks of threads a multiprocessor leave registers for all loads of a batch in flight.
constexpr int kWarps = 4, kCtas = 6;

struct PoolGrid : PoolParams {
  int windows[3];  // of a head
  int window[3];   // rows of one
  int ctas[3];
};

template <typename T, int kLanes, bool kWeighted>
__global__ void __launch_bounds__(kWarps * 32, kCtas)
    pool_kernel(const __grid_constant__ PoolGrid p) {
  int cta = blockIdx.x, which = 0;
  while (cta >= p.ctas[which]) cta -= p.ctas[which++];
  const PoolTensor& t = p.tensor[which];
  const int window = p.window[which];
  const int64_t unit = int64_t{cta} * kWarps + threadIdx.x / 32;
  if (unit >= int64_t{p.B} * t.H * p.windows[which]) return;  // whole warps leave
  const int head = static_cast<int>(unit) / p.windows[which];
  const int b = head / t.H, h = head - b * t.H;
  const int64_t first = (unit - int64_t{head} * p.windows[which]) * window;
  pool_rows<T, kLanes, kWeighted>(t, p.D, head, b, h, first, window,
                                  h == 0 && t.count != nullptr ? t.count + b * t.n : nullptr);
  if (p.beside && blockIdx.x == 0) wait_for_previous();
}

struct LaunchPool {
  const PoolParams& params;
  cudaStream_t stream;

  template <typename T, int kLanes>
  cudaError_t operator()() const {
    PoolGrid p{params};
    int64_t ctas = 0;
    for (int i = 0; i < p.tensors; ++i) {
      const PoolTensor& t = p.tensor[i];
      p.window[i] = pool_window_rows<kLanes>(t.log2_block);
      const int each = p.window[i] >> t.log2_block;
      p.windows[i] = (t.n + each - 1) / each;
      p.ctas[i] = static_cast<int>((int64_t{p.B} * t.H * p.windows[i] + kWarps - 1) / kWarps);
      ctas += p.ctas[i];
    }
    const auto kernel = p.weighted ? pool_kernel<T, kLanes, true> : pool_kernel<T, kLanes, false>;
    return launch_grid(kernel, ctas, kWarps * 32, 0, stream, Together{p.beside}, p);
  }
};

template <typename T>
__global__ void __launch_bounds__(256)
    round_pooled_kernel(const float* key, const float* value, T* out, int64_t n) {
  let_next_start();
  const int64_t i = (int64_t{blockIdx.x} * 256 + threadIdx.x) * 8;
  if (i >= 2 * n) return;
  const float* const from = i < n ? key + i : value + i - n;
  float v[8];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 bits = load16(from + 4 * half);
    unpack16<float>(bits, reinterpret_cast<float(&)[4]>(v[4 * half]));
  }
  store_values<8>(out + i, v);
  if (blockIdx.x == 0) wait_for_previous();
}

}  // namespace

cudaError_t pool_forward(const PoolParams& params, cudaStream_t stream) {
  return dispatch_rows(params.dtype, params.D, LaunchPool{params, stream});
}

cudaError_t round_pooled(const float* key, const float* value, void* out, int64_t n, Dtype dtype,
                         bool beside, cudaStream_t stream) {
  const int64_t blocks = (2 * n + 2047) / 2048;
  const auto launch = [&](auto* to) {
    return launch_grid(round_pooled_kernel<std::remove_pointer_t<decltype(to)>>, blocks, 256, 0,
                       stream, Together{beside}, key, value, to, n);
  };
  return dtype == Dtype::f16 ? launch(static_cast<__half*>(out))
                             : launch(static_cast<__nv_bfloat16*>(out));
}

}  // namespace mra::cuda
