// Global selection for maps that one block of threads can't hold (see plan_map.cu): of a head's
// whole map, the pairs with the highest scores relative to their row.
//
// The first kernel writes the map of keys of `score - row maximum`. The second gives each head to
// one block of threads: each warp owns a run of the flat map, so that the lists of all rows, which
// lie one behind the other, come out of one ordered compaction.
#include <algorithm>

#include "plan_block.cuh"
#include "plan_scores.cuh"

namespace mra::cuda {
namespace {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    global_scores_kernel(const PlanParams p, uint32_t* map) {
  constexpr int kRows = Tile::kRows;
  extern __shared__ __align__(16) float ring[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_tiles = (p.nq + kRows - 1) / kRows;
  const int head = static_cast<int>(blockIdx.x) / row_tiles;
  const int x0 = static_cast<int>(blockIdx.x) % row_tiles * kRows;
  uint32_t* keys = map + (int64_t{head} * p.nq + x0) * p.nk;
  const int written = Tile::write(p, head / p.H, head % p.H, x0, ring, keys, p.nk, p.nk);
  __syncthreads();

  for (int r = warp; r < kRows && x0 + r < p.nq; r += Tile::kWarps) {
    uint32_t* row = keys + int64_t{r} * p.nk;
    uint32_t highest = kAbsent;
    for (int y = lane; y < written; y += 32) highest = max(highest, row[y]);
    highest = __reduce_max_sync(kFullWarp, highest);
    for (int y = lane; y < p.nk; y += 32) {
      row[y] = y < written ? relative_key(row[y], highest) : kAbsent;
    }
  }
}

constexpr int kCandidates = 8192;  // keys that fit in shared memory once the search has narrowed

__global__ void __launch_bounds__(1024, 1)
    global_select_kernel(const PlanParams p, int64_t budget, uint32_t* maps) {
  extern __shared__ __align__(16) uint32_t candidates[];  // [kCandidates]
  __shared__ uint32_t reduce_buffer[BlockReduce::kWords];
  __shared__ int cursor;
  const int head = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int size = p.nq * p.nk;
  uint32_t* map = maps + int64_t{head} * size;
  int32_t* start = p.start + int64_t{head} * p.nq;
  int32_t* count = p.count + int64_t{head} * p.nq;
  const int64_t capacity = int64_t{p.nq} * p.row_capacity;
  int32_t* index = p.index + head * capacity;
  BlockReduce reduce(reduce_buffer);

  // This warp's run of the map: steps of 32 elements, none for the last warps of a small map; their
  // product may not fit in 32 bits.
  const int steps = ((size + warps - 1) / warps + 31) / 32;
  const auto first = static_cast<int>(min(int64_t{warp} * steps * 32, int64_t{size}));
  clear_queues(p.queues);

  // f(element, key) in order, by whole warps; elements outside of the map are kAbsent.
  const auto elements = [&](const auto& f) {
#pragma unroll 4
    for (int t = 0; t < steps; ++t) {
      const int i = first + t * 32 + lane;
      f(i, i < size ? map[i] : kAbsent);
    }
  };
  const auto keys = [&](const auto& f) { elements([&](int, uint32_t key) { f(key); }); };
  const auto tier = [&](int i) {
    const int x = i / p.nk;
    return tier_of<true>(p, x, i - x * p.nk);
  };

  // How many pairs exist, by tier.
  int pairs[kTiers] = {0, 0, 0, 0, 0};
  elements([&](int i, uint32_t key) {
    if (key == kAbsent) return;
    const int mine = has_tiers(p) ? tier(i) : 0;
#pragma unroll
    for (int t = 0; t < kTiers; ++t) pairs[t] += mine == t;
  });
  sum_tiers(pairs, has_tiers(p), reduce);

  const Boundary edge = find_boundary(pairs, budget);
  Cut cut{kForced, 0};  // nothing
  if (edge.take > 0) {  // the same for the whole block
    if (has_tiers(p)) {
      elements([&](int i, uint32_t key) {
        if (key != kAbsent) map[i] = key_in_tier(key, tier(i), edge.tier);
      });
    }
    // Each round reads the whole run, until the candidates fit in shared memory.
    Search search = start_search(edge, reduce, keys);
    narrow(search, kCandidates, reduce, 0, keys);
    if (!search.done()) {
      gather(search, candidates, &cursor, keys);
      const int n = search.candidates();
      narrow(search, 0, reduce, search.above, [&](const auto& f) {
        for (int i = threadIdx.x; i < n; i += blockDim.x) f(candidates[i]);
      });
    }
    cut = search.cut();
  }

  int equal = 0, higher = 0;
  keys([&](uint32_t key) {
    equal += key == cut.key;
    higher += key > cut.key;
  });
  const Place place = place_of_warp(higher, equal, cut, reduce);
  cut.ties = place.ties;
  int position = place.first;
  elements([&](int i, uint32_t key) {
    const unsigned taken = take_lanes(key, cut.key, cut.ties);
    const int x = i / p.nk, y = i - x * p.nk;
    if (i < size && y == 0) start[x] = position + __popc(taken & ((1u << lane) - 1));
    append(taken, y, index, position, capacity);
    position += __popc(taken);
  });
  for (int64_t i = place.total + threadIdx.x; i < capacity; i += blockDim.x) index[i] = 0;
  __syncthreads();  // start is written, and this block reads it
  for (int x = threadIdx.x; x < p.nq; x += blockDim.x) {
    count[x] = (x + 1 < p.nq ? start[x + 1] : place.total) - start[x];
  }
}

template <class Tile>
cudaError_t launch_scores(const PlanParams& p, uint32_t* map, cudaStream_t stream) {
  const auto kernel = global_scores_kernel<Tile>;
  const int tiles = p.B * p.H * ((p.nq + Tile::kRows - 1) / Tile::kRows);
  return launch_grid(kernel, tiles, Tile::kThreads, Tile::kRingWords * sizeof(float), stream, p,
                     map);
}

}  // namespace

cudaError_t plan_global(const PlanParams& p, int64_t budget, uint32_t* map, cudaStream_t stream) {
  const cudaError_t error = p.nk <= 128 ? launch_scores<ScoreTile<1, 4, 2, 4>>(p, map, stream)
                                        : launch_scores<ScoreTile<2, 4, 1, 8>>(p, map, stream);
  if (error != cudaSuccess) return error;
  constexpr int kSmem = kCandidates * sizeof(uint32_t);
  return launch_grid(global_select_kernel, p.B * p.H, 1024, kSmem, stream, p, budget, map);
}

}  // namespace mra::cuda
