// Global selection for maps that one block of threads can hold, or on Hopper a cluster of up to
// eight of them: scores, selection, lists and the block-coarse state of a head in one launch. Each
// block owns a run of the rows, and of these each warp, so that the lists, which lie one behind the
// other, come out of one ordered compaction.
#include "plan_block.cuh"
#include "plan_map_rows.cuh"
#include "plan_scores.cuh"

namespace mra::cuda {
namespace {

// How a head is shared out, and what a block's shared memory holds, in words: the ring, its rows of
// the map, a word for each, and how many keys each key block has. The ring is used again for the
// keys under the boundary, where there are tiers, and for parts of means.
template <class Tile, int kTiles, bool kMany>
struct MapShape {
  // What they are a multiple of: no block's tiles of scores reach into the next one's rows.
  static constexpr int kUnit = kMany && Tile::kRows > 8 * kTiles ? Tile::kRows : 8 * kTiles;
  int pitch, rows, ring;

  __host__ __device__ MapShape(const PlanParams& p, int blocks)
      : pitch(score_pitch(p.nk)), rows(round_up(divide_up(p.nq, blocks), kUnit)) {
    constexpr int kParts = 128 * kTiles * Tile::kWarps;
    ring = Tile::kRingWords > kParts ? Tile::kRingWords : kParts;
    if (has_tiers(p) && ring < map_words()) ring = map_words();
  }
  __host__ __device__ int map_words() const { return rows * pitch; }
  __host__ int64_t bytes() const { return (int64_t{ring} + map_words() + rows + pitch) * 4; }

 private:
  static __host__ __device__ int divide_up(int a, int b) { return (a + b - 1) / b; }
  static __host__ __device__ int round_up(int a, int b) { return divide_up(a, b) * b; }
};

constexpr int kListed = 1024;  // candidates of the search that are looked at by themselves

template <class Tile, int kTiles, int kBlocks, bool kMany>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks)
    plan_map_kernel(const PlanParams p, int64_t budget) {
  constexpr int kWarps = Tile::kWarps;
  extern __shared__ __align__(16) float ring[];
  __shared__ __align__(16) uint32_t ranked[kRanked], list[kListed];
  using Reduce = MapReduce<kMany, kWarps>;
  __shared__ typename Reduce::Parts parts;
  __shared__ int cursor[2];
  const Cluster<kMany> cluster;
  const MapShape<Tile, kTiles, kMany> shape(p, cluster.blocks);
  uint32_t* map = reinterpret_cast<uint32_t*>(ring + shape.ring);  // [rows][pitch]
  float* per_row = reinterpret_cast<float*>(map + shape.map_words());
  float* counts = per_row + shape.rows;  // [pitch]
  const int head = static_cast<int>(blockIdx.x) / cluster.blocks, b = head / p.H, h = head % p.H;
  const int x0 = cluster.rank * shape.rows, rows = min(shape.rows, p.nq - x0);  // of this block
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pitch = shape.pitch, width = (p.nk + 31) / 32 * 32, words = shape.map_words();
  Reduce reduce(parts, cluster);

  clear_queues(p.queues);
  // The scores come behind the barrier of their first stage.
  for (int i = threadIdx.x; i < words / 4; i += Tile::kThreads) {
    reinterpret_cast<uint4*>(map)[i] = make_uint4(kAbsent, kAbsent, kAbsent, kAbsent);
  }
  for (int y = threadIdx.x; y < width; y += Tile::kThreads) {
    counts[y] = static_cast<float>(y < p.nk ? p.k_count[int64_t{b} * p.nk + y] : 0);
  }
  for (int r = 0; r < rows; r += Tile::kRows) {
    if (r > 0) __syncthreads();  // no warp reads the ring any more
    Tile::write(p, b, h, x0 + r, ring, map + r * pitch, pitch, pitch);
  }
  cluster.meet();

  // Relative to the row's maximum; how many pairs exist, by tier.
  const int run = (rows + kWarps - 1) / kWarps;
  const int first_row = min(warp * run, rows), last_row = min(first_row + run, rows);
  int pairs[kTiers] = {0, 0, 0, 0, 0};
#pragma unroll 1
  for (int r = first_row; r < last_row; ++r) {
    pairs[0] += relate_row(map + r * pitch, width, per_row + r);
  }
  if (has_tiers(p)) {
    pairs[0] = 0;
    __syncwarp();  // other lanes have written what this one reads
#pragma unroll 1
    for (int r = first_row; r < last_row; ++r) {
#pragma unroll 1
      for (int y = lane; y < width; y += 32) {
        if (map[r * pitch + y] == kAbsent) continue;
        const int tier = tier_of<true>(p, x0 + r, y);
#pragma unroll
        for (int t = 0; t < kTiers; ++t) pairs[t] += tier == t;
      }
    }
  }
  sum_tiers(pairs, has_tiers(p), reduce);  // its barrier: the map is there for all warps

  const Boundary edge = find_boundary(pairs, budget);
  uint32_t* work = map;  // the keys under the boundary; the map keeps those of every tier
  if (has_tiers(p)) {
    work = reinterpret_cast<uint32_t*>(ring);
#pragma unroll 1
    for (int r = first_row; r < last_row; ++r) {
#pragma unroll 1
      for (int y = lane; y < pitch; y += 32) {
        uint32_t key = map[r * pitch + y];
        if (key != kAbsent) key = key_in_tier(key, tier_of<true>(p, x0 + r, y), edge.tier);
        work[r * pitch + y] = key;
      }
    }
    __syncthreads();
  }

  const int size = rows * pitch;
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
  const int listed = min(kListed, max(kRanked, p.nq * p.nk / 8));
  Cut cut = find_cut(cluster, edge, reduce, list, listed, ranked, cursor, keys);

  int equal = 0, higher = 0;
#pragma unroll 1
  for (int i = first_row * pitch + 4 * lane; i < last_row * pitch; i += 128) {
    const Fours four(work + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      equal += four.key[e] == cut.key;
      higher += four.key[e] > cut.key;
    }
  }
  const Place place = place_of_warp(higher, equal, cut, reduce);
  cut.ties = place.ties;

  // The lists; what is left of each row goes to the coarse part.
  const int room = p.nq * p.row_capacity;  // plan.cpp: it fits
  int32_t* index = p.index + int64_t{head} * room;
  const int64_t first_list = int64_t{head} * p.nq + x0;
  float* const scores = reinterpret_cast<float*>(map);
  int position = place.first;
#pragma unroll 1
  for (int r = first_row; r < last_row; ++r) {
    const int start = position, past = past_blocks(p, x0 + r);
#pragma unroll 1
    for (int y0 = 0; y0 < width; y0 += 128) {
      const int y = y0 + 4 * lane, at = r * pitch + min(y, width);  // nothing exists from there on
      const Fours whole(map + at);                                  // of any tier
      const Taken taken(Fours(work + at), cut.key, cut.ties);
      int to = position + taken.before;
      position += taken.total;
      float left[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool mine = (taken.mine >> e & 1) != 0;
        if (mine && to < room) index[to] = y + e;
        to += mine;
        const bool is_left = !mine && whole.key[e] != kAbsent && y + e < past;
        left[e] = is_left ? score_of(whole.key[e]) : -INFINITY;
      }
      if (y < width) {
        *reinterpret_cast<float4*>(scores + at) = make_float4(left[0], left[1], left[2], left[3]);
      }
    }
    if (lane == 0) {
      p.start[first_list + r] = start;
      p.count[first_list + r] = position - start;
    }
  }
  const int thread = cluster.rank * Tile::kThreads + static_cast<int>(threadIdx.x);
  const int threads = cluster.blocks * Tile::kThreads;
  for (int i = place.total + thread; i < room; i += threads) index[i] = 0;
  if (p.beside && blockIdx.x == 0) wait_for_previous();
  if (p.v_mean == nullptr) return;
#pragma unroll 1
  for (int r = first_row; r < last_row; ++r) {
    weigh_row(scores + r * pitch, width, counts, p.tf32, per_row + r, p.lse + first_list + r);
  }
  __syncthreads();
  mean_of_values<kTiles, (Tile::kCols > 32 ? 8 : 4)>(p, b, h, x0, scores, pitch, per_row, rows,
                                                     past_blocks(p, x0 + rows - 1), ring);
}

constexpr int64_t kMostPairs = 16384;  // of one block of threads; more are quicker spread out

// f(tile, row tiles of 8 a warp takes at once, blocks of threads a multiprocessor, whether they
// form clusters), by the map.
template <class F>
auto with_tile(const PlanParams& p, const Device& device, const F& f) {
  using std::bool_constant, std::integral_constant;
  const int64_t words = int64_t{p.nq} * ((p.nk + 31) / 32 * 32);
  if (p.nk <= 32 && words <= 1024)
    return f(ShortScoreTile{}, integral_constant<int, 2>{}, integral_constant<int, 6>{},
             bool_constant<false>{});
  if (words <= 4096)
    return f(ScoreTile<1, 4, 4, 2>{}, integral_constant<int, 2>{}, integral_constant<int, 2>{},
             bool_constant<false>{});
  // A block of threads for each head, unless they would leave most of the device idle.
  const bool alone = words <= kMostPairs && 3 * int64_t{p.B} * p.H > device.sms;
  if (device.major != 9 || alone)
    return f(ScoreTile<2, 4, 4, 4>{}, integral_constant<int, 4>{}, integral_constant<int, 1>{},
             bool_constant<false>{});
  return f(ScoreTile<1, 4, 2, 4>{}, integral_constant<int, 4>{}, integral_constant<int, 2>{},
           bool_constant<true>{});
}

// Blocks of threads that share a head: each has as many rows as a tile of scores, or more.
template <class Tile, int kTiles, bool kMany>
int blocks_of_head(const PlanParams& p) {
  if (!kMany) return 1;
  const int most = std::min(kMostOfCluster, (p.nq + Tile::kRows - 1) / Tile::kRows);
  const int rows = MapShape<Tile, kTiles, kMany>(p, most).rows;
  return (p.nq + rows - 1) / rows;
}

}  // namespace

bool plan_map_fits(const PlanParams& p, const Device& device) {
  return with_tile(p, device, [&](auto tile, auto tiles, auto per_sm, auto many) {
    using Tile = decltype(tile);
    const int64_t words = int64_t{p.nq} * score_pitch(p.nk), most = many ? 1 << 20 : kMostPairs;
    if ((many ? words : int64_t{p.nq} * p.nk) > most) return false;
    const MapShape<Tile, tiles, many> shape(p, blocks_of_head<Tile, tiles, many>(p));
    // Eight multiprocessors next to each other that have room for one block of a cluster are hard
    // to find: there is room for two.
    constexpr int kStatic =
        2048 + 4 * kListed + sizeof(typename MapReduce<many, Tile::kWarps>::Parts);
    return (shape.bytes() + kStatic) * (many ? per_sm : 1) <= device.max_smem;
  });
}

cudaError_t plan_map(const PlanParams& p, const Device& device, int64_t budget,
                     cudaStream_t stream) {
  return with_tile(p, device, [&](auto tile, auto tiles, auto blocks, auto many) {
    using Tile = decltype(tile);
    const int cluster = blocks_of_head<Tile, tiles, many>(p);
    const MapShape<Tile, tiles, many> shape(p, cluster);
    const auto kernel = plan_map_kernel<Tile, tiles, blocks, many>;
    return launch_grid(kernel, int64_t{p.B} * p.H * cluster, Tile::kThreads, shape.bytes(), stream,
                       Together{p.beside, cluster}, p, budget);
  });
}

}  // namespace mra::cuda
