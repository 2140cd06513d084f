// Rows to columns: for each key block the query blocks that have it, ascending.
//
// A block of threads owns some columns of one head. It reads the head's rows once, sets one bit for
// each (column, row) in shared memory and counts the entries that belong to earlier columns, which
// is where its own lists start. Bits are read back in order, so the lists come out sorted whatever
// order the threads ran in, and no block waits for another.
#include <algorithm>

#include "grid.cuh"
#include "plan.h"

namespace mra::cuda {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kGroup = 8;         // threads that read one row together
constexpr int kLongRow = 128;     // entries from which a search beats reading the whole row
constexpr int kMaxColumns = 512;  // of one block of threads

// First position in [0, count) whose entry is not below y; `row` ascends.
__device__ int lower_bound(const int32_t* row, int count, int y) {
  int lo = 0, hi = count;
  while (lo < hi) {
    const int mid = (lo + hi) / 2;
    if (row[mid] < y) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

__global__ void plan_transpose_kernel(const TransposeParams p, int columns, int tiles, int words) {
  extern __shared__ uint32_t smem[];
  let_next_start();
  uint32_t* bits = smem;                                       // [columns][words]: bit x of column
  int* size = reinterpret_cast<int*>(bits + columns * words);  // [columns]
  int* before = size + columns;                                // entries of earlier columns
  const int head = blockIdx.x / tiles;
  const int y0 = static_cast<int>(blockIdx.x) % tiles * columns;
  const int y1 = min(y0 + columns, p.nk);
  const int32_t* index = p.row_index + head * p.capacity;

  for (int i = threadIdx.x; i < columns * words; i += blockDim.x) bits[i] = 0;
  if (threadIdx.x == 0) *before = 0;
  clear_queues(p.queues);
  __syncthreads();

  int earlier = 0;
  const int member = threadIdx.x % kGroup;
  for (int x = threadIdx.x / kGroup; x < p.nq; x += blockDim.x / kGroup) {
    const int64_t list = int64_t{head} * p.nq + x;
    // Lists of the caller's own may be wrong, but nothing outside of `index` is read.
    const int64_t start = max(p.row_start[list], 0);
    const int64_t room = max(p.capacity - start, int64_t{0});
    const int count = static_cast<int>(min(int64_t{p.row_count[list]}, room));
    const int32_t* row = index + start;
    int first = 0;
    if (count >= kLongRow) {
      first = lower_bound(row, count, y0);
      if (member == 0) earlier += first - lower_bound(row, first, 0);
    }
    for (int t = first + member; t < count; t += kGroup) {
      const int y = row[t];
      if (y >= y1 && count >= kLongRow) break;  // nothing of ours follows
      if (y >= y0 && y < y1) {
        atomicOr(&bits[(y - y0) * words + x / 32], 1u << x % 32);
      } else if (y >= 0 && y < y0) {
        ++earlier;
      }
    }
  }
  earlier = __reduce_add_sync(kFullWarp, earlier);
  if (threadIdx.x % 32 == 0 && earlier > 0) atomicAdd(before, earlier);
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int c = warp; c < y1 - y0; c += warps) {
    int n = 0;
    for (int w = lane; w < words; w += 32) n += __popc(bits[c * words + w]);
    n = __reduce_add_sync(kFullWarp, n);
    if (lane == 0) size[c] = n;
  }
  __syncthreads();

  for (int c = warp; c < y1 - y0; c += warps) {
    int start = 0;
    for (int i = lane; i < c; i += 32) start += size[i];
    start = __reduce_add_sync(kFullWarp, start) + *before;
    start = static_cast<int>(min(int64_t{start}, p.capacity));
    const int count = static_cast<int>(min(int64_t{size[c]}, p.capacity - start));
    if (lane == 0) {
      const int64_t list = int64_t{head} * p.nk + y0 + c;
      p.start[list] = start;
      p.count[list] = count;
    }
    int32_t* to = p.index + head * p.capacity + start;
    int at = 0;
    for (int w = 0; w < words; w += 32) {
      uint32_t word = w + lane < words ? bits[c * words + w + lane] : 0;
      const int mine = __popc(word);
      const int sum = sum_up_to_lane(mine, lane);
      for (int t = at + sum - mine; word != 0; ++t) {
        if (t < count) to[t] = (w + lane) * 32 + __ffs(static_cast<int>(word)) - 1;
        word &= word - 1;
      }
      at += __shfl_sync(kFullWarp, sum, 31);
    }
  }
}

}  // namespace

cudaError_t plan_transpose(const TransposeParams& p, const Device& device, cudaStream_t stream) {
  const int words = (p.nq + 31) / 32;
  const auto bytes = [&](int64_t columns) { return (columns * words + columns + 1) * 4; };
  // Enough blocks of threads for every multiprocessor, but not so many columns that one block keeps
  // a multiprocessor to itself, unless a single column does.
  int64_t columns = std::max<int64_t>(1, std::min<int64_t>(p.nk, kMaxColumns));
  const int64_t wanted = std::max<int64_t>(1, (2 * device.sms + p.heads - 1) / p.heads);
  columns = std::min(columns, std::max<int64_t>(16, (p.nk + wanted - 1) / wanted));
  while (columns > 1 && bytes(columns) > device.max_smem / 2) columns = (columns + 1) / 2;
  if (bytes(columns) > device.max_smem) return cudaErrorInvalidValue;

  const int tiles = static_cast<int>((p.nk + columns - 1) / columns);
  const int64_t work = std::max<int64_t>(int64_t{p.nq} * kGroup, columns * 32);
  const int threads = static_cast<int>(std::min<int64_t>(512, (work + 127) / 128 * 128));
  return launch_grid(plan_transpose_kernel, int64_t{p.heads} * tiles, threads, bytes(columns),
                     stream, p, static_cast<int>(columns), tiles, words);
}

}  // namespace mra::cuda
