// Block means of up to three tensors, one read of each: a warp takes one block of rows, or as many
// neighbouring ones as have kWindow rows.
#include "block_sum.cuh"
#include "pool.h"

namespace mra::cuda {
namespace {

// Six blocks of threads a multiprocessor leave registers for all loads of a batch in flight.
constexpr int kWarps = 4, kCtas = 6, kWindow = 32;

struct PoolGrid : PoolParams {
  int windows[3];  // of a head
  int window[3];   // rows of one
  int ctas[3];
};

template <typename T, int kLanes, bool kWeighted>
__global__ void __launch_bounds__(kWarps * 32, kCtas)
    pool_kernel(const __grid_constant__ PoolGrid p) {
  constexpr int kRows = 32 / kLanes;  // read at once
  int cta = blockIdx.x, which = 0;
  while (cta >= p.ctas[which]) cta -= p.ctas[which++];
  const PoolTensor& t = p.tensor[which];
  const int lane = threadIdx.x % 32, window = p.window[which];
  const int64_t unit = int64_t{cta} * kWarps + threadIdx.x / 32;
  if (unit >= int64_t{p.B} * t.H * p.windows[which]) return;  // whole warps leave
  const int head = static_cast<int>(unit) / p.windows[which];
  const int b = head / t.H, h = head - b * t.H;
  const int64_t first = (unit - int64_t{head} * p.windows[which]) * window;
  const int rows = static_cast<int>(min(int64_t{window}, t.L - first));

  // Bit g: whether row 32 g + lane counts.
  uint32_t counts = (1u << (rows - lane + 31) / 32) - 1;
  if (t.mask != nullptr) {
    const bool* const mask = t.mask + b * t.L + first + lane;
#pragma unroll
    for (int g = 0; g < kBlockWords; ++g) {
      if (counts >> g & 1 && !mask[32 * g]) counts ^= 1u << g;
    }
  }

  const int y0 = static_cast<int>(first >> t.log2_block);
  const int blocks = t.n - y0;  // from here on
  const int64_t mean_at = (int64_t{head} * t.n + y0) * p.D;
  const int count_at = h == 0 && lane == 0 && t.count != nullptr ? b * t.n + y0 : -1;
  const T* const x =
      static_cast<const T*>(t.x) + b * t.stride.b + h * t.stride.h + first * t.stride.l;
  const float* const weights =
      kWeighted ? t.weights + ((int64_t{head} * t.n + y0) << t.log2_block) : nullptr;
  const int chunks = p.D / kVec<T>;
  for (int c = 0; c < chunks; c += kLanes) {
    const int chunk = c + lane % kLanes;
    const T* next = x + lane / kLanes * t.stride.l + chunk * kVec<T>;
    // Where this lane's values go; negative: nowhere.
    const int column = chunk < chunks && lane < kLanes * kVec<T>
                           ? chunk * kVec<T> + first_kept<kVec<T>, kLanes>()
                           : -1;
    float sum[kVec<T>] = {}, before[kVec<T>] = {};  // of 32 rows, of those of the block before
    int count = 0;
    const auto finish = [&](int y) {
      constexpr int kKept = kept<kVec<T>, kLanes>;
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) sum[e] += before[e];
      scatter_sums<kLanes>(sum);
      if constexpr (!kWeighted) {
#pragma unroll
        for (int e = 0; e < kKept; ++e) sum[e] /= static_cast<float>(max(count, 1));
      }
      if (y < blocks) {
        if (column >= 0) {
          const int64_t at = mean_at + y * p.D + column;
          store_values<kKept>(t.mean + at, sum);
          if (t.rounded != nullptr) store_values<kKept>(static_cast<T*>(t.rounded) + at, sum);
        }
        if (c == 0 && count_at >= 0) t.count[count_at + y] = count;
      }
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) sum[e] = before[e] = 0.f;
      count = 0;
    };
#pragma unroll 1
    for (int g = 0; 32 * g < rows; ++g, next += 32 * t.stride.l) {
      const uint32_t live = __ballot_sync(kFullWarp, counts >> g & 1);
      const bool halves = kRows < 32 && t.log2_block == 4;
      count += __popc(halves ? live & 0xffff : live);
      add_rows<T, kLanes>(
          next, kRows * t.stride.l, chunk < chunks ? live : 0,
          [&](int r) {
            if constexpr (kWeighted) return 32 * g + r < rows ? weights[32 * g + r] : 0.f;
            return 1.f;
          },
          [&] {
            if (!halves) return;
            finish(2 * g);
            count = __popc(live >> 16);
          },
          sum);
      // The last row of these 32 that is in the window tells which block it is.
      const int last = min(32 * g + 31, window - 1), y = last >> t.log2_block;
      if (last + 1 == (y + 1) << t.log2_block || last + 1 >= rows) {
        finish(y);
        continue;
      }
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) {
        before[e] += sum[e];
        sum[e] = 0.f;
      }
    }
  }
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
      const int block = 1 << t.log2_block;
      // Blocks of fewer rows than are read at once stay alone.
      p.window[i] = std::max(block, block < 32 / kLanes ? 0 : kWindow);
      const int each = p.window[i] >> t.log2_block;
      p.windows[i] = (t.n + each - 1) / each;
      p.ctas[i] = static_cast<int>((int64_t{p.B} * t.H * p.windows[i] + kWarps - 1) / kWarps);
      ctas += p.ctas[i];
    }
    const auto kernel = p.weighted ? pool_kernel<T, kLanes, true> : pool_kernel<T, kLanes, false>;
    return launch_grid(kernel, ctas, kWarps * 32, 0, stream, Beside{p.beside}, p);
  }
};

template <typename T>
__global__ void __launch_bounds__(256)
    round_pooled_kernel(const float* key, const float* value, T* out, int64_t n) {
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
}

}  // namespace

cudaError_t pool_forward(const PoolParams& params, cudaStream_t stream) {
  return dispatch_rows(params.dtype, params.D, LaunchPool{params, stream});
}

cudaError_t round_pooled(const float* key, const float* value, void* out, int64_t n, Dtype dtype,
                         cudaStream_t stream) {
  const int64_t blocks = (2 * n + 2047) / 2048;
  const auto launch = [&](auto* to) {
    return launch_grid(round_pooled_kernel<std::remove_pointer_t<decltype(to)>>, blocks, 256, 0,
                       stream, key, value, to, n);
  };
  return dtype == Dtype::f16 ? launch(static_cast<__half*>(out))
                             : launch(static_cast<__nv_bfloat16*>(out));
}

}  // namespace mra::cuda
