// The order-1 term of the queries. Forward: out_i += P gamma s q C. Backward: dq from it, and the
// weights with which q and dO make dC and dSigma. The steps of weighted means: see RowsStep.
#include "order1_rows.cuh"

namespace mra::cuda {
namespace {

// Whether a step reads dO.
constexpr bool is_backward(RowsStep step) {
  return step != RowsStep::term && step != RowsStep::variance;
}

template <typename T, int DP, bool kBackward>
struct Config {
  static constexpr int kTiles = kBackward ? 2 : 1;  // q, and dO
  static constexpr bool kSmall = DP < 128 || (!kBackward && DP == 128);
  static constexpr int kWarps = kSmall && sizeof(Operand<T>) == 2 ? 8 : 4;
  static constexpr int kMin = 2;  // CTAs on a multiprocessor
};

// Rows g and g + 8 of a warp's tile, dotted with sums that lie as the tile's columns n0.. do.
template <typename S, int DP, int kTiles>
__device__ __forceinline__ void add_dots(float (&dots)[2], const float (&c)[kTiles][4],
                                         const S* tile, int n0) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const S* row = tile + (g + 8 * half) * kLd<S, DP> + n0 + 2 * t;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 x = load_pair(row + 8 * n);
      dots[half] += x.x * c[n][2 * half] + x.y * c[n][2 * half + 1];
    }
  }
}

// What every kernel here starts with.
template <typename T, int DP, bool kBackward>
struct Start {
  using S = Operand<T>;
  using P = Product<S, DP>;
  RowRange range;
  int h, warp;
  int64_t row_base;     // of [B, H, N]
  const float* centre;  // [D] or null
  const float* shift;   // [D], with RowsStep::gradient
  Matrices<S, DP> matrices;
  S* tile;

  __device__ __forceinline__ Start(const Order1Rows& p, unsigned char* shared)
      : range(p, p.H), h(range.head % p.H), warp(threadIdx.x / 32) {
    const int64_t key_head = int64_t{range.b} * p.Hk + h / (p.H / p.Hk);
    row_base = int64_t{range.head} * p.L;
    centre = p.centre == nullptr ? nullptr : p.centre + key_head * p.D;
    shift = p.shift + key_head * DP;
    matrices.from = static_cast<const S*>(p.matrices) +
                    (key_head * p.units + range.unit) * 2 * int64_t{DP * DP};
    matrices.room = reinterpret_cast<S*>(shared);
    tile = matrices.room + P::kMatrices + warp * Config<T, DP, kBackward>::kTiles * P::kTile;
    matrices.prepare();
  }
};

// Of a row's variance t.
__device__ __forceinline__ float row_bias(float t) { return logf(3.f - 2.f / (1.f + t / 4)); }

template <typename T, int DP, RowsStep kStep>
__global__ void __launch_bounds__(Config<T, DP, false>::kWarps * 32, Config<T, DP, false>::kMin)
    forward_kernel(const Order1Rows p) {
  extern __shared__ __align__(16) unsigned char shared[];
  using S = Operand<T>;
  using P = Product<S, DP>;
  Start<T, DP, false> s(p, shared);
  const RowRange& range = s.range;
  const int g = threadIdx.x % 32 / 4;
  const bool tf32 = kSingleTf32<T> || p.tf32;
  const T* q = static_cast<const T*>(p.q) + range.b * p.q_strides.b + s.h * p.q_strides.h;
  T* out = static_cast<T*>(p.out) + range.b * p.out_strides.b + s.h * p.out_strides.h;
  const uint8_t* mask = p.mask == nullptr ? nullptr : p.mask + int64_t{range.b} * p.L;

  for (int row0 = range.first; row0 < range.end; row0 += 16 * p.warps) {
    const int first = row0 + 16 * s.warp;  // the warps keep step: panels are loaded by all of them
    __syncwarp();
    load_tile<T, DP>(s.tile, q + first * p.q_strides.l, p.q_strides.l, s.centre, p.D, [&](int r) {
      return first + r < range.end && (mask == nullptr || mask[first + r]);
    });
    __syncwarp();

    float c[P::kTiles][4];
    float t[2] = {};
#pragma unroll 1
    for (int panel = 0; panel < P::kPanels; ++panel) {  // Sigma is symmetric
      s.matrices.template multiply<false>(c, s.tile, 1, panel, tf32);
      add_dots<S, DP>(t, c, s.tile, panel * P::kPanel);
    }
    if constexpr (kStep == RowsStep::variance) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + g + 8 * half;
        const float variance = p.scale * p.scale * quad_sum(t[half]);
        if (threadIdx.x % 4 == 0 && row < range.end) {
          p.variance[s.row_base + row] = variance;
          p.row_bias[s.row_base + row] = row_bias(variance);
        }
      }
    } else {
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + g + 8 * half;
        const float share = row < range.end ? p.share[s.row_base + row] : 0.f;
        const float gamma = 1.f / (1.f + p.scale * p.scale / 4 * quad_sum(t[half]));
        factor[half] = share == 0.f ? 0.f : share * gamma * p.scale;
      }
      const auto row = [&](int half) -> T* {
        const int i = first + g + 8 * half;
        return i < range.end ? out + i * p.out_strides.l : nullptr;
      };
#pragma unroll 1
      for (int panel = 0; panel < P::kPanels; ++panel) {
        Emit<T, P::kTiles, true> emit;
        emit.fetch(panel * P::kPanel, p.D, row);
        s.matrices.template multiply<false>(c, s.tile, 0, panel, tf32);
        emit.store(panel * P::kPanel, p.D, row, [&](int n, int i) {
          return factor[i / 2] == 0.f ? 0.f : factor[i / 2] * c[n][i];
        });
      }
    }
  }
}

// The same for all resolutions at once, whose matrices stay in shared memory.
template <typename T, int DP>
__global__ void __launch_bounds__(Config<T, DP, false>::kWarps * 32, Config<T, DP, false>::kMin)
    levels_kernel(const Order1Rows p) {
  extern __shared__ __align__(16) unsigned char shared[];
  using S = Operand<T>;
  using P = Product<S, DP>;
  static_assert(P::kResident && P::kPanels == 1);
  const RowRange range(p, p.H);
  const int h = range.head % p.H, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  const bool tf32 = kSingleTf32<T> || p.tf32;
  const int64_t key_head = int64_t{range.b} * p.Hk + h / (p.H / p.Hk);
  S* const room = reinterpret_cast<S*>(shared);
  for (int r = 0; r < p.count; ++r) {
    const S* from = static_cast<const S*>(p.matrices) + r * p.next_matrices +
                    (key_head * p.units + range.unit) * 2 * int64_t{DP * DP};
    Matrices<S, DP>::copy(room + r * P::kMatrices, kLd<S, DP>, from, 2 * DP, DP);
  }
  commit_copies();
  wait_for_copies();
  __syncthreads();
  S* const tile = room + p.count * P::kMatrices + warp * P::kTile;
  const T* q = static_cast<const T*>(p.q) + range.b * p.q_strides.b + h * p.q_strides.h;
  T* out = static_cast<T*>(p.out) + range.b * p.out_strides.b + h * p.out_strides.h;

  for (int row0 = range.first; row0 < range.end; row0 += 16 * p.warps) {
    const int first = row0 + 16 * warp;
    __syncwarp();
    load_tile<T, DP>(tile, q + first * p.q_strides.l, p.q_strides.l, nullptr, p.D,
                     [&](int r) { return first + r < range.end; });
    __syncwarp();

    float sum[P::kTiles][4] = {};
#pragma unroll 1
    for (int r = 0; r < p.count; ++r) {
      Matrices<S, DP> matrices{nullptr, room + r * P::kMatrices};
      float c[P::kTiles][4], t[2] = {}, factor[2];
      matrices.template multiply<false>(c, tile, 1, 0, tf32);
      add_dots<S, DP>(t, c, tile, 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + g + 8 * half;
        const int64_t at = (int64_t{range.head} * p.count + r) * p.L + row;
        const float share = row < range.end ? p.share[at] : 0.f;
        const float gamma = 1.f / (1.f + p.scale * p.scale / 4 * quad_sum(t[half]));
        factor[half] = share == 0.f ? 0.f : share * gamma * p.scale;
      }
      matrices.template multiply<false>(c, tile, 0, 0, tf32);
#pragma unroll
      for (int n = 0; n < P::kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[n][i] += factor[i / 2] == 0.f ? 0.f : factor[i / 2] * c[n][i];
        }
      }
    }
    const auto row = [&](int half) -> T* {
      const int i = first + g + 8 * half;
      return i < range.end ? out + i * p.out_strides.l : nullptr;
    };
    Emit<T, P::kTiles, false> emit;
    const auto value = [&](int n, int i) { return sum[n][i]; };
    emit.store(0, p.D, row, value, true);
  }
}

template <typename T, int DP, RowsStep kStep>
__global__ void __launch_bounds__(Config<T, DP, true>::kWarps * 32, Config<T, DP, true>::kMin)
    backward_kernel(const Order1Rows p) {
  extern __shared__ __align__(16) unsigned char shared[];
  using S = Operand<T>;
  using P = Product<S, DP>;
  Start<T, DP, true> s(p, shared);
  const RowRange& range = s.range;
  const int g = threadIdx.x % 32 / 4;
  const bool tf32 = kSingleTf32<T> || p.tf32;
  const T* q = static_cast<const T*>(p.q) + range.b * p.q_strides.b + s.h * p.q_strides.h;
  const T* grad_out = static_cast<const T*>(p.grad_out) + range.b * p.grad_out_strides.b +
                      s.h * p.grad_out_strides.h;
  T* grad_q = static_cast<T*>(p.grad_q) + range.b * p.grad_q_strides.b + s.h * p.grad_q_strides.h;
  const S *q_tile = s.tile, *grad_tile = s.tile + P::kTile;
  const uint8_t* mask = p.mask == nullptr ? nullptr : p.mask + int64_t{range.b} * p.L;

  for (int row0 = range.first; row0 < range.end; row0 += 16 * p.warps) {
    const int first = row0 + 16 * s.warp;
    const auto valid = [&](int r) { return first + r < range.end; };
    __syncwarp();
    load_tile<T, DP>(s.tile, q + first * p.q_strides.l, p.q_strides.l, s.centre, p.D, valid);
    load_tile<T, DP>(s.tile + P::kTile, grad_out + first * p.grad_out_strides.l,
                     p.grad_out_strides.l, nullptr, p.D, valid);
    __syncwarp();

    float x[P::kTiles][4], w[P::kTiles][4];  // dO C^T and q Sigma
    const auto multiply = [&](int panel) {
      s.matrices.template multiply<true>(x, grad_tile, 0, panel, tf32);
      s.matrices.template multiply<false>(w, q_tile, 1, panel, tf32);
    };
    float u[2] = {}, t[2] = {};
    if constexpr (kStep != RowsStep::gradient) {
#pragma unroll 1
      for (int panel = 0; panel < P::kPanels; ++panel) {
        multiply(panel);
        add_dots<S, DP>(u, x, q_tile, panel * P::kPanel);
        add_dots<S, DP>(t, w, q_tile, panel * P::kPanel);
      }
    } else if constexpr (P::kResident) {
      multiply(0);
    }

    float a[2], b[2];
    bool query[2];  // that counts
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first + g + 8 * half;
      query[half] = i < range.end && (mask == nullptr || mask[i]);
      if constexpr (kStep == RowsStep::gradient) {
        a[half] = i < range.end ? p.weight_c[s.row_base + i] : 0.f;
        b[half] = i < range.end ? p.weight_s[s.row_base + i] : 0.f;
        continue;
      }
      const float share = i < range.end ? p.share[s.row_base + i] : 0.f;
      const float dot = quad_sum(t[half]);
      const float gamma = 1.f / (1.f + p.scale * p.scale / 4 * dot);
      const float gu = gamma * p.scale * quad_sum(u[half]);
      const bool none = share == 0.f;
      a[half] = none ? 0.f : share * gamma * p.scale;
      b[half] = none ? 0.f : share * gamma * gu * (-p.scale * p.scale / 4);
      if (i < range.end && threadIdx.x % 4 == 0) {
        if constexpr (kStep == RowsStep::delta) {
          const float variance = none ? 0.f : p.scale * p.scale * dot;
          p.variance[s.row_base + i] = variance;
          p.row_bias[s.row_base + i] = row_bias(variance);
          p.slope[s.row_base + i] = none ? 0.f : gu;
        } else {
          p.weight_c[s.row_base + i] = a[half];
          p.weight_s[s.row_base + i] = b[half];
        }
        p.coarse_delta[s.row_base + i] = p.delta[s.row_base + i] - (none ? 0.f : gu);
      }
    }
    if constexpr (kStep == RowsStep::delta) continue;
    const auto row = [&](int half) -> T* {
      const int i = first + g + 8 * half;
      return i < range.end ? grad_q + i * p.grad_q_strides.l : nullptr;
    };
    constexpr bool kAdd = kStep == RowsStep::gradient;
#pragma unroll 1
    for (int panel = 0; panel < P::kPanels; ++panel) {
      if constexpr (!P::kResident) multiply(panel);
      Emit<T, P::kTiles, kAdd, false> emit;
      emit.store(
          panel * P::kPanel, p.D, row,
          [&](int n, int i) {
            const int half = i / 2, d = panel * P::kPanel + 8 * n + 2 * (threadIdx.x % 4) + i % 2;
            const float every = kAdd && query[half] ? __ldg(s.shift + d) : 0.f;
            return a[half] == 0.f && b[half] == 0.f
                       ? every
                       : a[half] * x[n][i] + 2 * b[half] * w[n][i] + every;
          },
          kAdd || p.add);
    }
  }
}

}  // namespace

int order1_rows_warps(Dtype dtype, int dim, RowsStep step, const Device& device) {
  int warps = 1;
  dispatch_order1(dtype, dim, [&](auto t, auto dp) {
    using T = typename decltype(t)::type;
    using P = Product<Operand<T>, dp()>;
    warps = is_backward(step) ? P::warps(Config<T, dp(), true>::kWarps, 2, device.max_smem)
                              : P::warps(Config<T, dp(), false>::kWarps, 1, device.max_smem);
    return cudaSuccess;
  });
  return warps;
}

int order1_rows_most(Dtype dtype, int dim, int warps, const Device& device) {
  int most = 1;
  dispatch_order1(dtype, dim, [&](auto t, auto dp) {
    using P = Product<Operand<typename decltype(t)::type>, dp()>;
    const size_t one = P::bytes(0, 0), tiles = P::bytes(warps, 1) - one;
    if constexpr (dp() <= 64) most = static_cast<int>((device.max_smem - tiles) / one);
    return cudaSuccess;
  });
  return most;
}

cudaError_t order1_rows(const Order1Rows& p, cudaStream_t stream) {
  return dispatch_order1(p.dtype, p.dim, [&](auto t, auto dp) {
    using T = typename decltype(t)::type;
    if (p.count > 1) {
      if constexpr (dp() <= 64) {
        using P = Product<Operand<T>, dp()>;
        const size_t bytes = P::bytes(p.warps, 1) + (p.count - 1) * P::bytes(0, 0);
        return launch_products(levels_kernel<T, dp()>, p, p.H, bytes, stream);
      }
      return cudaErrorNotSupported;
    }
    const size_t bytes = Product<Operand<T>, dp()>::bytes(p.warps, is_backward(p.step) ? 2 : 1);
    const auto kernel = [&] {
      switch (p.step) {
        case RowsStep::term:
          return forward_kernel<T, dp(), RowsStep::term>;
        case RowsStep::variance:
          return forward_kernel<T, dp(), RowsStep::variance>;
        case RowsStep::delta:
          return backward_kernel<T, dp(), RowsStep::delta>;
        case RowsStep::gradient:
          return backward_kernel<T, dp(), RowsStep::gradient>;
        default:
          return backward_kernel<T, dp(), RowsStep::backward>;
      }
    }();
    return launch_products(kernel, p, p.H, bytes, stream);
  });
}

}  // namespace mra::cuda
