// Sums over rows of left^T right: the moments C and Sigma of the keys, and in the backward pass
// dC and dSigma from weighted queries. A CTA walks a chunk of rows in steps: rows come to registers
// (the next step's while this one is multiplied), are centred or weighted there, and go to shared
// memory as operands.
#include "order1.cuh"

namespace mra::cuda {
namespace {

// A pair tile holds both matrices whole (dim 32 and 64); beyond that a CTA makes a 128 x 128 tile
// of one of them.
template <typename T, int kCols>
struct Tile {
  using S = Operand<T>;
  static constexpr bool kPair = kCols < 128;
  // Three TF32 products keep more in registers: there a tile has twice the warps.
  static constexpr int kThreads = !kPair && std::is_same_v<T, float> ? 256 : 128;
  static constexpr int kMin = kPair ? 3 : 256 / kThreads;  // CTAs on a multiprocessor
  static constexpr int kRows = (kPair ? 32 : 16) * (sizeof(S) == 2 ? 2 : 1);  // of a step
  static constexpr int kPieces = kCols / kVec<T>;          // 16-byte pieces of a row
  static constexpr int kPer = kRows * kPieces / kThreads;  // consecutive rows of a thread
  // Two warps along m, the others along n or, in a pair, along the matrices.
  static constexpr int kNWarps = kThreads / 64;
  static constexpr int kMTiles = kCols / 32;                         // of 16 rows
  static constexpr int kNTiles = kCols / 8 / (kPair ? 1 : kNWarps);  // of 8 columns
  static constexpr int kLead = kLd<S, kCols>;
  static_assert(kPer >= 1 && 16 % kPer == 0);  // rows of a thread lie in one key block
};

enum class Form { moments, rooted, weighted };  // rooted: moments with weighted means

// Rows of two inputs on their way through registers, and what they are centred or weighted with.
template <typename T, int kPer, Form kForm>
struct Fetched {
  static constexpr bool kWeighted = kForm == Form::weighted;
  uint4 x[kPer], y[kPer];
  float u[kWeighted ? kPer : kVec<T>], w[kWeighted ? kPer : kVec<T>];
  unsigned valid;  // bit i: row i counts
  float root[kForm == Form::rooted ? kPer : 1];
};

// A[m][k] stored as [k][m].
template <typename S>
__device__ __forceinline__ typename Mma<S>::A load_a_trans(const S* s, int ld, int k, int m) {
  const int lane = threadIdx.x % 32;
  typename Mma<S>::A a;
  if constexpr (sizeof(S) == 2) {
    ldmatrix_x4<true>(a.r,
                      smem_address(s + (k + lane % 8 + lane / 16 * 8) * ld + m + lane / 8 % 2 * 8));
  } else {
    const float *even = s + (k + 2 * (lane % 4)) * ld + m + lane / 4, *odd = even + ld;
    a.r[0] = even[0], a.r[1] = even[8], a.r[2] = odd[0], a.r[3] = odd[8];
  }
  return a;
}

template <typename T, int kCols, Form kForm>
__global__ void __launch_bounds__(Tile<T, kCols>::kThreads, Tile<T, kCols>::kMin)
    gram_kernel(const Order1Gram p) {
  using G = Tile<T, kCols>;
  using S = typename G::S;
  constexpr bool kWeighted = kForm == Form::weighted;
  constexpr int kPer = G::kPer, kLead = G::kLead, kPart = G::kRows * kLead;
  constexpr int kParts = G::kPair && kWeighted ? 3 : 2;
  static_assert(kParts * kPart * sizeof(S) <= 48 * 1024);
  __shared__ __align__(16) S parts[kParts * kPart];
  __shared__ int scratch[32];
  __shared__ __align__(16) float centre[kWeighted ? 2 : 1][kCols];  // of the columns of x and y
  const int warp = threadIdx.x / 32;

  // What this CTA makes: matrix `which` from (m0, n0), of chunk `chunk` of a unit.
  int64_t id = blockIdx.x;
  int which = 0, m0 = 0, n0 = 0;
  if constexpr (!G::kPair) {
    const int side = p.dim / kCols;
    n0 = id % side * kCols, id /= side;
    m0 = id % side * kCols, id /= side;
    which = id % 2, id /= 2;
  }
  const int chunk = id % p.chunks;
  id /= p.chunks;
  const int unit = id % p.units, head = id / p.units;
  const int b = head / p.heads, kh = head % p.heads;

  const int row0 = unit * p.unit, end = row0 + min(p.unit, p.L - row0);
  const int run = (end - row0 + G::kRows - 1) / G::kRows;  // steps for one head of the group
  const int first_step = chunk * p.steps, last_step = min(run * p.group, first_step + p.steps);

  // This thread's piece of the columns, and the first of its rows in a step.
  const int piece = threadIdx.x % G::kPieces * kVec<T>, row_in = threadIdx.x / G::kPieces * kPer;
  const bool y_is_x = !G::kPair && which == 1;
  const Strides ys = y_is_x ? p.x_strides : p.y_strides;
  const T* x_base = static_cast<const T*>(p.x) + b * p.x_strides.b + m0 + piece;
  const T* y_base = static_cast<const T*>(y_is_x ? p.x : p.y) + b * ys.b + n0 + piece;
  const bool x_in = m0 + piece < p.D, y_in = n0 + piece < p.D;

  if constexpr (kWeighted) {
    for (int d = threadIdx.x; d < kCols; d += blockDim.x) {
      const float* mean = p.x_mean == nullptr ? nullptr : p.x_mean + int64_t{head} * p.D;
      centre[0][d] = mean != nullptr && m0 + d < p.D ? mean[m0 + d] : 0.f;
      centre[1][d] = mean != nullptr && y_is_x && n0 + d < p.D ? mean[n0 + d] : 0.f;
    }
  }

  using Rows = Fetched<T, kPer, kForm>;
  int h = kh * p.group + first_step / run, next = row0 + first_step % run * G::kRows;
  const auto fetch = [&](Rows& f) {
    const int first = next + row_in;
    const T* x = x_base + h * p.x_strides.h + first * p.x_strides.l;
    const T* y = y_base + h * ys.h + first * ys.l;
    if constexpr (!kWeighted) {
      const int64_t at = (int64_t{head} * p.nk + (first >> p.block_shift)) * p.D + piece;
      load_floats<T>(f.u, p.x_mean + at + m0, x_in && first < end);
      load_floats<T>(f.w, (y_is_x ? p.x_mean : p.y_mean) + at + n0, y_in && first < end);
    }
    f.valid = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      bool valid = first + i < end;
      if constexpr (kWeighted) {
        const int64_t at = (int64_t{b} * p.heads * p.group + h) * p.L + first + i;
        f.u[i] = valid ? p.weight[0][at] : 0.f;
        f.w[i] = valid ? p.weight[1][at] : 0.f;
        valid = f.u[i] != 0.f || f.w[i] != 0.f;  // a row without weight may hold anything
      } else {
        if (valid && p.mask != nullptr) valid = p.mask[int64_t{b} * p.L + first + i];
        if constexpr (kForm == Form::rooted) {
          const int y = first >> p.block_shift;
          const float* weights = p.weight[0] + (int64_t{head} * p.nk << p.block_shift) + first;
          const int64_t count_at = int64_t{b} * p.nk + y;
          f.root[i] = valid ? sqrtf(weights[i] * static_cast<float>(p.key_count[count_at])) : 0.f;
        }
      }
      f.valid |= unsigned{valid} << i;
      f.x[i] = valid && x_in ? load16(x + i * p.x_strides.l) : uint4{};
      f.y[i] = valid && y_in ? load16(y + i * ys.l) : uint4{};
    }
    next += G::kRows;
    if (next >= end) next = row0, ++h;
  };
  const auto place = [&](const Rows& f) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      S* to = parts + (row_in + i) * kLead + piece;
      float x[kVec<T>], y[kVec<T>], z[kVec<T>];
      unpack16<T>(f.x[i], x);
      unpack16<T>(f.y[i], y);
      const bool valid = f.valid >> i & 1;
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) {
        if constexpr (kWeighted) {
          const float wy = y_is_x ? f.w[i] : f.u[i];
          x[e] = valid ? x[e] - centre[0][piece + e] : 0.f;
          y[e] = wy == 0.f ? 0.f : wy * (y[e] - centre[1][piece + e]);
          z[e] = f.w[i] == 0.f ? 0.f : f.w[i] * x[e];
        } else {
          x[e] = valid ? x[e] - f.u[e] : 0.f;
          y[e] = valid ? y[e] - f.w[e] : 0.f;
          if constexpr (kForm == Form::rooted) x[e] *= f.root[i], y[e] *= f.root[i];
        }
      }
      store_operands<T>(to, x);
      store_operands<T>(to + kPart, y);
      if constexpr (kParts == 3) store_operands<T>(to + 2 * kPart, z);
    }
  };

  const int m = warp % 2 * (kCols / 2), n = G::kPair ? 0 : warp / 2 * (8 * G::kNTiles);
  if (G::kPair) which = warp / 2;
  // Pair: the right side of Sigma is the left one itself, or its weighted copy.
  const S* right = parts + (G::kPair && which == 1 ? (kWeighted ? 2 : 0) : 1) * kPart;
  const bool tf32 = kSingleTf32<T> || p.tf32;
  float c[G::kMTiles][G::kNTiles][4] = {};
  Rows rows;
  if (first_step < last_step) fetch(rows);
  for (int step = first_step; step < last_step; ++step) {
    __syncthreads();
    place(rows);
    __syncthreads();
    if (step + 1 < last_step) fetch(rows);
#pragma unroll
    for (int k = 0; k < G::kRows; k += Mma<S>::kStep) {
      typename Mma<S>::A a[G::kMTiles];
#pragma unroll
      for (int i = 0; i < G::kMTiles; ++i) a[i] = load_a_trans(parts, kLead, k, m + 16 * i);
#pragma unroll
      for (int j = 0; j < G::kNTiles; j += 2) {
        const typename Mma<S>::B pair = Mma<S>::load_b_trans(right, kLead, k, n + 8 * j);
#pragma unroll
        for (int i = 0; i < G::kMTiles; ++i) {
          Mma<S>::mma(c[i][j], a[i], pair, 0, tf32);
          Mma<S>::mma(c[i][j + 1], a[i], pair, 1, tf32);
        }
      }
    }
  }

  const bool final = p.sums == nullptr;
  float over_n = 1.f;
  if (final) {
    over_n = 1.f / max(1, sum_counts(p.key_count + int64_t{b} * p.nk, p.nk, scratch));
    if (which == 1) over_n *= p.factor;
  }
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t matrix = ((int64_t{head} * p.units + unit) * p.chunks + chunk) * 2 + which;
#pragma unroll
  for (int i = 0; i < G::kMTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = (matrix * p.dim + m0 + m + 16 * i + 8 * half + g) * p.dim + n0 + n + 2 * t;
#pragma unroll
      for (int j = 0; j < G::kNTiles; ++j) {
        const float u = c[i][j][2 * half], w = c[i][j][2 * half + 1];
        if (final) {
          store_pair(static_cast<S*>(p.matrices) + at + 8 * j, u * over_n, w * over_n);
        } else {
          store_pair(p.sums + at + 8 * j, u, w);
        }
      }
    }
  }
}

// Tiles of 128 columns serve dim 128 and 256.
constexpr int tile_cols(int dim) { return dim < 128 ? dim : 128; }
int tiles_of(int dim) { return dim < 128 ? 1 : 2 * (dim / 128) * (dim / 128); }

}  // namespace

int order1_step_rows(Dtype dtype, int dim) {
  return (dim < 128 ? 32 : 16) * (dtype == Dtype::bf16 ? 2 : 1);
}

int order1_gram_slots(Dtype dtype, int dim, const Device& device) {
  const int ctas = dim < 128 ? 3 : dtype == Dtype::f32 ? 1 : 2;
  const int slots = device.sms * ctas / tiles_of(dim);
  return slots < 1 ? 1 : slots;
}

cudaError_t order1_gram(const Order1Gram& p, cudaStream_t stream) {
  const int64_t blocks = int64_t{p.B} * p.heads * p.units * p.chunks * tiles_of(p.dim);
  return dispatch_order1(p.dtype, p.dim, [&](auto t, auto dim) {
    using T = typename decltype(t)::type;
    constexpr int kCols = tile_cols(dim());
    const auto kernel = p.weighted               ? gram_kernel<T, kCols, Form::weighted>
                        : p.weight[0] != nullptr ? gram_kernel<T, kCols, Form::rooted>
                                                 : gram_kernel<T, kCols, Form::moments>;
    return launch_grid(kernel, blocks, Tile<T, kCols>::kThreads, 0, stream, p);
  });
}

}  // namespace mra::cuda
