// Parts of cells_candidates.cuh -> what every row of a key block gets of the gradients of its mean.
#include "levels.h"
#include "sm80/levels.cuh"

namespace mra::cuda {
namespace {

constexpr int kThreads = 256;

// A block of threads owns the children of one key block of the coarser resolution, a thread four of
// their columns; parts are added head by head, by ascending query block.
__global__ void __launch_bounds__(kThreads) cells_sum_kernel(const __grid_constant__ CellsSum p) {
  __shared__ int64_t parts[kThreads];  // first of a query block's, -1: it has none
  const ResolutionBlocks &at = p.levels.at[p.r], &up = p.levels.at[p.r + 1];
  const int head = blockIdx.x / up.nk, parent = blockIdx.x - head * up.nk;
  const int b = head / p.Hk, group = p.H / p.Hk, log2_children = up.log2_k - at.log2_k;
  const int quads = p.D / 4, first_child = parent << log2_children;
  const int children = min(1 << log2_children, at.nk - first_child);
  const int64_t all = int64_t{p.B} * p.H * up.nq * p.splits * p.places * quads;
  const int64_t shares = int64_t{p.B} * p.Hk * at.nk * quads;
  for (int first = 0; first < 2 * children * quads; first += kThreads) {
    const int column = first + static_cast<int>(threadIdx.x), d = column % quads;
    const int child = column / quads % children, which = column / quads / children;
    float4 sum{};
    for (int i = 0; i < group; ++i) {
      const int64_t h = int64_t{b} * p.H + head % p.Hk * group + i;
      const List list = list_of(p.parents, h, parent);
      for (int from = 0; from < list.count; from += kThreads) {
        __syncthreads();  // the parts before are no longer read
        const int n = min(kThreads, list.count - from);
        if (static_cast<int>(threadIdx.x) < n) {
          const int x = list.entries[from + threadIdx.x];
          parts[threadIdx.x] = -1;
          if (x >= 0 && x < up.nq) {
            const List chosen = list_of(p.levels.rows, h, up.first_q + x);
            const int place = lower_bound(chosen, parent);
            if (place < chosen.count && chosen.entries[place] == parent &&
                (int64_t{place} + 1) << log2_children <= p.places) {
              parts[threadIdx.x] =
                  (h * up.nq + x) * p.splits * p.places + (int64_t{place} << log2_children);
            }
          }
        }
        __syncthreads();
        if (which > 1) continue;
        const float4* sums = reinterpret_cast<const float4*>(p.sums) + which * all + d;
        for (int split = 0; split < p.splits; ++split) {
          const int64_t place = int64_t{split} * p.places + child;
#pragma unroll 4
          for (int e = 0; e < n; ++e) {
            const bool there = parts[e] >= 0;
            const float4 x = there ? sums[(parts[e] + place) * quads] : float4{};
            sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
          }
        }
      }
    }
    if (which > 1) continue;
    const int y = first_child + child;
    const int count = p.levels.key_count[int64_t{b} * p.levels.key_blocks + at.first_k + y];
    const float n = static_cast<float>(max(count, 1));
    float4* to = reinterpret_cast<float4*>(p.shares) + which * shares +
                 (int64_t{head} * at.nk + y) * quads + d;
    const float4 before = *to;
    *to = make_float4(before.x + sum.x / n, before.y + sum.y / n, before.z + sum.z / n,
                      before.w + sum.w / n);
  }
}

}  // namespace

cudaError_t cells_sum(const CellsSum& p, cudaStream_t stream) {
  const int64_t blocks = int64_t{p.B} * p.Hk * p.levels.at[p.r + 1].nk;
  return launch_grid(cells_sum_kernel, blocks, kThreads, 0, stream, p);
}

}  // namespace mra::cuda
