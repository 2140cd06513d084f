// From dC and dSigma to the keys and values: dv_j = kappa_j dC, dk_j = nu_j dC^T + kappa_j dSigma,
// with kappa and nu the key and value less the means of their block. With weighted means these are
// times the weight and the block's count, and the weight times the gradients of the pooled key and
// value is added.
#include "order1_rows.cuh"

namespace mra::cuda {
namespace {

template <typename T, int DP>
inline constexpr int kKeysWarps = DP < 128 && sizeof(Operand<T>) == 2 ? 8 : 4;

template <typename T, int DP>
__global__ void __launch_bounds__(kKeysWarps<T, DP> * 32, 2) keys_kernel(const Order1Keys p) {
  extern __shared__ __align__(16) unsigned char shared[];
  using S = Operand<T>;
  using P = Product<S, DP>;
  const RowRange range(p, p.Hk);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, h = range.head % p.Hk;
  const bool tf32 = kSingleTf32<T> || p.tf32;
  Matrices<S, DP> matrices;
  matrices.from = static_cast<const S*>(p.matrices) +
                  (int64_t{range.head} * p.units + range.unit) * 2 * int64_t{DP * DP};
  matrices.room = reinterpret_cast<S*>(shared);
  S *k_tile = matrices.room + P::kMatrices + warp * 2 * P::kTile, *v_tile = k_tile + P::kTile;
  matrices.prepare();

  const T* k = static_cast<const T*>(p.k) + range.b * p.k_strides.b + h * p.k_strides.h;
  const T* v = static_cast<const T*>(p.v) + range.b * p.v_strides.b + h * p.v_strides.h;
  const uint8_t* mask = p.mask == nullptr ? nullptr : p.mask + int64_t{range.b} * p.L;
  const int64_t grad_k_at = range.b * p.grad_k_strides.b + h * p.grad_k_strides.h;
  const int64_t grad_v_at = range.b * p.grad_v_strides.b + h * p.grad_v_strides.h;

  for (int row0 = range.first; row0 < range.end; row0 += 16 * p.warps) {
    const int first = row0 + 16 * warp;  // the warps keep step: panels are loaded by all of them
    const auto valid = [&](int r) {
      return first + r < range.end && (mask == nullptr || mask[first + r]);
    };
    // Blocks hold whole tiles of 16 rows. A tile behind the end has no block.
    const int block = min(first >> p.block_shift, p.nk - 1);
    const int64_t mean = (int64_t{range.head} * p.nk + block) * p.D;
    __syncwarp();
    load_tile<T, DP>(k_tile, k + first * p.k_strides.l, p.k_strides.l, p.k_mean + mean, p.D, valid);
    load_tile<T, DP>(v_tile, v + first * p.v_strides.l, p.v_strides.l, p.v_mean + mean, p.D, valid);
    __syncwarp();

    const bool live[2] = {valid(g), valid(g + 8)};
    float weight[2], factor[2] = {1.f, 1.f};
    const float* share = nullptr;  // of the block, in this thread's columns
    if (p.weights != nullptr) {
      const int64_t at = (int64_t{range.head} * p.nk << p.block_shift) + first;
      const float count = static_cast<float>(p.key_count[int64_t{range.b} * p.nk + block]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weight[half] = live[half] ? p.weights[at + g + 8 * half] : 0.f;
        factor[half] = weight[half] * count;
      }
      share = p.shares + mean + 2 * (threadIdx.x % 4);
    }
    // Entry i of tile n of a panel's sums, of keys or of values.
    const int64_t values_at = int64_t{p.B} * p.Hk * p.nk * p.D;
    const auto finish = [&](float sum, int panel, int n, int i, int64_t from) {
      if (!live[i / 2]) return 0.f;
      const int d = panel * P::kPanel + 8 * n;
      if (share == nullptr || d >= p.D) return sum;
      return factor[i / 2] * sum + weight[i / 2] * __ldg(share + from + d + i % 2);
    };
    float c[P::kTiles][4];
    const auto emit = [&](auto* grad, int64_t stride, int panel, int64_t from) {
      using G = std::remove_pointer_t<decltype(grad)>;
      const auto row_of = [&](int half) -> G* {
        const int i = first + g + 8 * half;
        return i < range.end ? grad + i * stride : nullptr;
      };
      Emit<G, P::kTiles, false>{}.store(
          panel * P::kPanel, p.D, row_of,
          [&](int n, int i) { return finish(c[n][i], panel, n, i, from); }, p.add);
    };
    const auto write = [&](void* grad, int64_t at, int64_t stride, int panel, int64_t from) {
      if (p.weights != nullptr) {
        emit(static_cast<float*>(grad) + at, stride, panel, from);
      } else {
        emit(static_cast<T*>(grad) + at, stride, panel, from);
      }
    };
#pragma unroll 1
    for (int panel = 0; panel < P::kPanels; ++panel) {
      matrices.template multiply<true>(c, v_tile, 0, panel, tf32);
      matrices.template multiply_add<false>(c, k_tile, 1, panel, tf32);
      write(p.grad_k, grad_k_at, p.grad_k_strides.l, panel, 0);
      matrices.template multiply<false>(c, k_tile, 0, panel, tf32);
      write(p.grad_v, grad_v_at, p.grad_v_strides.l, panel, values_at);
    }
  }
}

}  // namespace

int order1_keys_warps(Dtype dtype, int dim, const Device& device) {
  int warps = 1;
  dispatch_order1(dtype, dim, [&](auto t, auto dp) {
    using T = typename decltype(t)::type;
    using P = Product<Operand<T>, dp()>;
    warps = P::warps(kKeysWarps<T, dp()>, 2, device.max_smem);
    return cudaSuccess;
  });
  return warps;
}

cudaError_t order1_keys(const Order1Keys& p, cudaStream_t stream) {
  return dispatch_order1(p.dtype, p.dim, [&](auto t, auto dp) {
    using T = typename decltype(t)::type;
    const size_t bytes = Product<Operand<T>, dp()>::bytes(p.warps, 2);
    return launch_products(keys_kernel<T, dp()>, p, p.Hk, bytes, stream);
  });
}

}  // namespace mra::cuda
