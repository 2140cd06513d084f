// More than two resolutions: which blocks there are, and how many cells a row of each resolution
// may take. From shapes alone.
//
// A cell is a pair of blocks of one resolution. Those of the coarsest are all candidates, below it
// the children of cells that were chosen one resolution up; chosen cells of block_q x block_k are
// exact, all others coarse at their own size.
#pragma once

#include "budget.h"

namespace mra {

// Of a call with levels: block_q x block_k first, the coarsest last.
inline std::vector<Resolution> resolutions(const Options& o, int64_t N, int64_t M) {
  std::vector<Resolution> all;
  if (o.levels.empty()) return all;
  const auto add = [&](int64_t block_q, int64_t block_k) {
    const int64_t q = all.empty() ? 0 : all.back().first_q + all.back().nq;
    const int64_t k = all.empty() ? 0 : all.back().first_k + all.back().nk;
    all.push_back({block_q, block_k, ceil_div(N, block_q), ceil_div(M, block_k), q, k});
  };
  add(o.block_q, o.block_k);
  for (size_t i = o.levels.size(); i-- > 0;) add(o.levels[i].block, o.levels[i].block);
  return all;
}

// Blocks of queries, and of keys, of all resolutions.
inline int64_t all_query_blocks(const std::vector<Resolution>& all) {
  return all.back().first_q + all.back().nq;
}
inline int64_t all_key_blocks(const std::vector<Resolution>& all) {
  return all.back().first_k + all.back().nk;
}

constexpr int64_t kManyBlocks = int64_t{1} << 32;  // more than there are, and far from overflow

// Forced pairs lie less than `reach` tokens off the diagonal, or hold one of the `first` keys.
inline int64_t forced_reach(const Options& o) {
  return std::min(o.diagonal_blocks / 2, kManyBlocks) * std::max(o.block_q, o.block_k);
}
inline int64_t forced_first(const Options& o) {
  return std::min(o.first_blocks, kManyBlocks) * o.block_k;
}

// Cells that a row of blocks of `level` may hold at most: its budget, or all that are forced or
// crossed by the diagonal.
inline int64_t level_capacity(const Options& o, const Level& level) {
  int64_t near = o.causal;
  if (o.diagonal_blocks > 0) near = 1 + 2 * ceil_div(forced_reach(o), level.block);
  return std::max(level.cells, near + ceil_div(forced_first(o), level.block));
}

// Room for the list of one row of each resolution, in the order of `all`.
inline std::vector<int64_t> list_capacities(const Options& o, const std::vector<Resolution>& all) {
  std::vector<int64_t> room(all.size());
  for (size_t r = all.size(); r-- > 0;) {
    const bool finest = r == 0, coarsest = r + 1 == all.size();
    const int64_t nk = all[r].nk;
    const int64_t most =
        coarsest ? nk : std::min(nk, room[r + 1] * (all[r + 1].block_k / all[r].block_k));
    room[r] = std::min(
        most, finest ? row_capacity(o, nk) : level_capacity(o, o.levels[all.size() - 1 - r]));
  }
  return room;
}

// Entries of a head's row lists.
inline int64_t plan_capacity(const Options& o, const std::vector<Resolution>& all) {
  const auto room = list_capacities(o, all);
  int64_t total = 0;
  for (size_t r = 0; r < all.size(); ++r) total += all[r].nq * room[r];
  return total;
}

}  // namespace mra
