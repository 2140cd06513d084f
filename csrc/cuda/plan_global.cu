// Global selection for maps that shared memory can't hold (see plan_map.cu): of a head's whole map,
// the pairs with the highest scores relative to their row.
//
// The first kernel writes the map of keys of `score - row maximum`. The second gives each head to
// one block of threads, on Hopper to a cluster of eight: each warp owns a run of the flat map, so
// that the lists of all rows, which lie one behind the other, come out of one ordered compaction.
#include <algorithm>
#include <type_traits>

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
    const float top = relative_to(__reduce_max_sync(kFullWarp, highest));
    for (int y = lane; y < p.nk; y += 32) {
      row[y] = y < written ? relative_key(row[y], top) : kAbsent;
    }
  }
}

// Warps of a block of threads. Of a cluster's two blocks have room on a multiprocessor, as eight
// whole ones next to each other are hard to find.
template <bool kMany>
constexpr int kWarpsOf = kMany ? 16 : 32;

constexpr int kListed = 8192;  // candidates of the search that are kept in shared memory

template <bool kMany>
__global__ void __launch_bounds__(kWarpsOf<kMany> * 32, kMany ? 2 : 1)
    global_select_kernel(const PlanParams p, int64_t budget, uint32_t* maps) {
  extern __shared__ __align__(16) uint32_t list[];  // [kListed]
  constexpr int kWarps = kWarpsOf<kMany>;
  using Reduce = MapReduce<kMany, kWarps>;
  __shared__ typename Reduce::Parts parts;
  __shared__ __align__(16) uint32_t ranked[kRanked];
  __shared__ int cursor[2];
  const Cluster<kMany> cluster;
  const int head = static_cast<int>(blockIdx.x) / cluster.blocks;
  const int lane = threadIdx.x % 32, warps = cluster.blocks * kWarps;
  const int thread = cluster.rank * (kWarps * 32) + static_cast<int>(threadIdx.x);
  const int size = p.nq * p.nk;
  uint32_t* map = maps + int64_t{head} * size;
  int32_t* start = p.start + int64_t{head} * p.nq;
  int32_t* count = p.count + int64_t{head} * p.nq;
  const int64_t capacity = int64_t{p.nq} * p.row_capacity;
  int32_t* index = p.index + head * capacity;
  Reduce reduce(parts, cluster);

  // This warp's run of the map: steps of 32 elements, a multiple of four of them, none for the last
  // warps of a small map; their product may not fit in 32 bits.
  const int steps = ((size + warps - 1) / warps + 127) / 128 * 4;
  const auto first = static_cast<int>(min(int64_t{reduce.warp()} * steps * 32, int64_t{size}));
  clear_queues(p.queues);
  if (kMany) cluster.meet();  // every block has started

  // f(element, key) in order, by whole warps; elements outside of the map are kAbsent.
  const auto elements = [&](const auto& f) {
#pragma unroll 4
    for (int t = 0; t < steps; ++t) {
      const int i = first + t * 32 + lane;
      f(i, i < size ? map[i] : kAbsent);
    }
  };
  // f(key), four neighbouring ones a lane where the map begins at a multiple of 16 bytes.
  const auto keys = [&](const auto& f) {
    if (size % 4 != 0) return elements([&](int, uint32_t key) { f(key); });
#pragma unroll 4
    for (int t = 0; t < steps; t += 4) {
      const int i = first + t * 32 + 4 * lane;
      uint4 four = make_uint4(kAbsent, kAbsent, kAbsent, kAbsent);
      if (i < size) four = *reinterpret_cast<const uint4*>(map + i);
      f(four.x);
      f(four.y);
      f(four.z);
      f(four.w);
    }
  };
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
  if (has_tiers(p) && edge.take > 0) {
    elements([&](int i, uint32_t key) {
      if (key != kAbsent) map[i] = key_in_tier(key, tier(i), edge.tier);
    });
    __syncwarp();  // other lanes read them
  }
  Cut cut = find_cut(cluster, edge, reduce, list, kListed, ranked, cursor, keys);

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
  for (int64_t i = place.total + thread; i < capacity; i += warps * 32) index[i] = 0;
  cluster.meet();  // start is written, and others read it
  for (int x = thread; x < p.nq; x += warps * 32) {
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

cudaError_t plan_global(const PlanParams& p, const Device& device, int64_t budget, uint32_t* map,
                        cudaStream_t stream) {
  const cudaError_t error = p.nk <= 128 ? launch_scores<ScoreTile<1, 4, 2, 4>>(p, map, stream)
                                        : launch_scores<ScoreTile<2, 4, 1, 8>>(p, map, stream);
  if (error != cudaSuccess) return error;
  constexpr int kSmem = kListed * sizeof(uint32_t);
  const auto select = [&](auto many) {
    const int cluster = many ? kMostOfCluster : 1;
    return launch_grid(global_select_kernel<many>, int64_t{p.B} * p.H * cluster,
                       kWarpsOf<many> * 32, kSmem, stream, Together{false, cluster}, p, budget,
                       map);
  };
  return device.major == 9 ? select(std::true_type{}) : select(std::false_type{});
}

}  // namespace mra::cuda
