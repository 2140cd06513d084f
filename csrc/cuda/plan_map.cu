// Global selection for maps that one block of threads can hold: scores, selection, lists and the
// block-coarse state of a head in one launch. Each warp owns a run of whole rows, so that the
// lists, which lie one behind the other, come out of one ordered compaction.
#include "plan_block.cuh"
#include "plan_coarse.cuh"
#include "plan_scores.cuh"

namespace mra::cuda {
namespace {

// What a head's shared memory holds, in words: the ring, the map, and a word for each row. The ring
// is used again for the keys under the boundary, where there are tiers, and for parts of means.
template <class Tile, int kTiles>
struct MapShape {
  int pitch, rows, ring;

  __host__ __device__ explicit MapShape(const PlanParams& p)
      : pitch(score_pitch(p.nk)), rows((p.nq + 8 * kTiles - 1) / (8 * kTiles) * (8 * kTiles)) {
    constexpr int kParts = 128 * kTiles * Tile::kWarps;
    ring = Tile::kRingWords > kParts ? Tile::kRingWords : kParts;
    if (has_tiers(p) && ring < map_words()) ring = map_words();
  }
  __host__ __device__ int map_words() const { return rows * pitch; }
  __host__ int64_t bytes() const { return (int64_t{ring} + map_words() + rows) * 4; }
};

template <class Tile, int kTiles, int kBlocks>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks)
    plan_map_kernel(const PlanParams p, int64_t budget) {
  constexpr int kWarps = Tile::kWarps;
  extern __shared__ __align__(16) float ring[];
  __shared__ __align__(16) uint32_t candidates[kRanked];
  __shared__ uint32_t reduce_buffer[BlockReduce::kWords];
  __shared__ int cursor;
  const MapShape<Tile, kTiles> shape(p);
  uint32_t* map = reinterpret_cast<uint32_t*>(ring + shape.ring);  // [rows][pitch]
  float* per_row = reinterpret_cast<float*>(map + shape.map_words());
  const int head = blockIdx.x, b = head / p.H, h = head % p.H;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int words = shape.map_words(), steps = (p.nk + 31) / 32;
  BlockReduce reduce(reduce_buffer);

  clear_queues(p.queues);
  // The scores come behind the barrier of their first stage.
  for (int i = threadIdx.x; i < words / 4; i += Tile::kThreads) {
    reinterpret_cast<uint4*>(map)[i] = make_uint4(kAbsent, kAbsent, kAbsent, kAbsent);
  }
  for (int x0 = 0; x0 < p.nq; x0 += Tile::kRows) {
    if (x0 > 0) __syncthreads();  // no warp reads the ring any more
    Tile::write(p, b, h, x0, ring, map + x0 * shape.pitch, shape.pitch, shape.pitch);
  }
  __syncthreads();

  // Relative to the row's maximum; how many pairs exist, by tier.
  const int run = (p.nq + kWarps - 1) / kWarps;
  const int first_row = min(warp * run, p.nq), last_row = min(first_row + run, p.nq);
  int pairs[kTiers] = {0, 0, 0, 0, 0};
  for (int x = first_row; x < last_row; ++x) {
    uint32_t* row = map + x * shape.pitch;
    uint32_t highest = kAbsent;
    for (int t = 0; t < steps; ++t) highest = max(highest, row[t * 32 + lane]);
    highest = __reduce_max_sync(kFullWarp, highest);
    if (lane == 0) per_row[x] = fmaxf(score_of(highest), -FLT_MAX);
    for (int t = 0; t < steps; ++t) {
      const int y = t * 32 + lane;
      const uint32_t key = row[y];
      if (key == kAbsent) continue;
      row[y] = relative_key(key, highest);
      if (!has_tiers(p)) {
        ++pairs[0];
        continue;
      }
      const int tier = tier_of<true>(p, x, y);
#pragma unroll
      for (int i = 0; i < kTiers; ++i) pairs[i] += tier == i;
    }
  }
  sum_tiers(pairs, has_tiers(p), reduce);  // its barrier: the map is there for all warps

  const Boundary edge = find_boundary(pairs, budget);
  uint32_t* work = map;  // the keys under the boundary; the map keeps those of every tier
  if (has_tiers(p)) {
    work = reinterpret_cast<uint32_t*>(ring);
    for (int x = first_row; x < last_row; ++x) {
      for (int y = lane; y < shape.pitch; y += 32) {
        uint32_t key = map[x * shape.pitch + y];
        if (key != kAbsent) key = key_in_tier(key, tier_of<true>(p, x, y), edge.tier);
        work[x * shape.pitch + y] = key;
      }
    }
    __syncthreads();
  }

  Cut cut{kForced, 0};  // nothing
  if (edge.take > 0) {  // the same for the whole block
    const int size = p.nq * shape.pitch;
    const auto keys = [&](const auto& f) {
#pragma unroll 2
      for (int i = threadIdx.x; i < size / 4; i += Tile::kThreads) {
        const uint4 four = reinterpret_cast<const uint4*>(work)[i];
        f(four.x);
        f(four.y);
        f(four.z);
        f(four.w);
      }
    };
    Search search = start_search(edge, reduce, keys);
    narrow(search, kRanked, reduce, 0, keys);
    if (search.done()) {
      cut = search.cut();
    } else {
      gather(search, candidates, &cursor, keys);
      cut = rank_cut(candidates, search.m - search.above);
    }
  }

  int equal = 0, higher = 0;
  for (int i = first_row * shape.pitch + lane; i < last_row * shape.pitch; i += 32) {
    const uint32_t key = work[i];
    equal += key == cut.key;
    higher += key > cut.key;
  }
  const Place place = place_of_warp(higher, equal, cut, reduce);
  cut.ties = place.ties;

  // The lists; what is left of each row goes to the coarse part.
  const int64_t capacity = int64_t{p.nq} * p.row_capacity;
  int32_t* index = p.index + head * capacity;
  int position = place.first;
  for (int x = first_row; x < last_row; ++x) {
    const int64_t list = int64_t{head} * p.nq + x;
    const int start = position, past = past_blocks(p, x);
    float* scores = reinterpret_cast<float*>(map + x * shape.pitch);
    for (int t = 0; t < steps; ++t) {
      const int y = t * 32 + lane;
      const uint32_t whole = map[x * shape.pitch + y];  // of any tier
      const unsigned taken = take_lanes(work[x * shape.pitch + y], cut.key, cut.ties);
      const bool mine = append(taken, y, index, position, capacity);
      position += __popc(taken);
      const bool left = !mine && whole != kAbsent && y < past;
      scores[y] = left ? score_of(whole) : -INFINITY;
    }
    if (lane == 0) {
      p.start[list] = start;
      p.count[list] = position - start;
    }
    if (p.v_mean != nullptr) {
      const float inverse = weigh_row(p, b, scores, steps, per_row[x], p.lse + list);
      __syncwarp();  // every lane has read it
      if (lane == 0) per_row[x] = inverse;
    }
  }
  for (int64_t i = place.total + threadIdx.x; i < capacity; i += Tile::kThreads) index[i] = 0;
  if (p.beside && blockIdx.x == 0) wait_for_previous();
  if (p.v_mean == nullptr) return;
  __syncthreads();
  mean_of_values<kTiles, (Tile::kCols > 32 ? 8 : 4)>(
      p, b, h, 0, reinterpret_cast<const float*>(map), shape.pitch, per_row, p.nq,
      past_blocks(p, p.nq - 1), ring);
}

// f(tile, row tiles of 8 a warp takes at once, blocks of threads a multiprocessor), by the map.
template <class F>
auto with_tile(const PlanParams& p, const F& f) {
  using std::integral_constant;
  const int64_t words = int64_t{p.nq} * ((p.nk + 31) / 32 * 32);
  if (p.nk <= 32 && words <= 1024)
    return f(ShortScoreTile{}, integral_constant<int, 2>{}, integral_constant<int, 6>{});
  if (words <= 4096)
    return f(ScoreTile<1, 4, 4, 2>{}, integral_constant<int, 2>{}, integral_constant<int, 2>{});
  return f(ScoreTile<2, 4, 4, 4>{}, integral_constant<int, 4>{}, integral_constant<int, 1>{});
}

constexpr int64_t kMostPairs = 16384;  // more are quicker spread over the device

}  // namespace

bool plan_map_fits(const PlanParams& p, const Device& device) {
  if (int64_t{p.nq} * p.nk > kMostPairs) return false;
  return with_tile(p, [&](auto tile, auto tiles, auto) {
    return MapShape<decltype(tile), tiles>(p).bytes() + 2048 <= device.max_smem;
  });
}

cudaError_t plan_map(const PlanParams& p, int64_t budget, cudaStream_t stream) {
  return with_tile(p, [&](auto tile, auto tiles, auto blocks) {
    using Tile = decltype(tile);
    const auto kernel = plan_map_kernel<Tile, tiles, blocks>;
    return launch_grid(kernel, p.B * p.H, Tile::kThreads, MapShape<Tile, tiles>(p).bytes(), stream,
                       Beside{p.beside}, p, budget);
  });
}

}  // namespace mra::cuda
