// Calls with levels: the cells of a row, as the row lists give them. Common words: common/levels.h.
#pragma once

#include <vector>

#include "../common/levels.h"
#include "views.h"

namespace mra::cpu {

// Coarse cells of one query block: pooled keys by their place among those of all resolutions.
struct CoarseIds {
  std::vector<int32_t> ids;
  std::vector<int64_t> ends;  // of each resolution's, the finest first
};

class Cells {
 public:
  // `rows`: lists of all resolutions; key_count [B, blocks of all resolutions].
  Cells(const BlockList& rows, const Tensor& key_count, const Options& o)
      : all_(o.resolutions), causal_(o.causal), count_(key_count.contiguous()), lists_(rows) {}

  // f(y), ascending, for every key block y of resolution r that is a candidate of its query block
  // x: all that exist in the coarsest one, else the children of what the parent of x has chosen.
  template <typename F>
  void candidates(int64_t b, int64_t h, size_t r, int64_t x, const F& f) const {
    const Resolution& at = all_[r];
    const int64_t last = (x + 1) * at.block_q - 1;
    const int64_t seen = causal_ ? std::min(at.nk, last / at.block_k + 1) : at.nk;
    const int32_t* count = counts(b) + at.first_k;
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t y = begin; y < std::min(end, seen); ++y) {
        if (count[y] > 0) f(y);
      }
    };
    if (r + 1 == all_.size()) return run(0, seen);
    const Resolution& up = all_[r + 1];
    const int64_t children = up.block_k / at.block_k;
    for (const int32_t parent : lists_(b, h, up.first_q + x / (up.block_q / at.block_q))) {
      if (parent >= 0 && parent < up.nk) run(parent * children, (parent + 1) * children);
    }
  }

  // Adds the candidates that were not chosen: the coarse cells of query block x of resolution r.
  void coarse(int64_t b, int64_t h, size_t r, int64_t x, std::vector<int32_t>& ids) const {
    const Resolution& at = all_[r];
    const int64_t past = causal_ ? x * at.block_q / at.block_k : at.nk;
    const Entries chosen = lists_(b, h, at.first_q + x);
    const int32_t* next = chosen.begin();
    candidates(b, h, r, x, [&](int64_t y) {
      while (next != chosen.end() && *next < y) ++next;
      const bool is_chosen = next != chosen.end() && *next == y;
      if (!is_chosen && y < past) ids.push_back(static_cast<int32_t>(at.first_k + y));
    });
  }

  // The same of every resolution, for query block x of block_q.
  void all_coarse(int64_t b, int64_t h, int64_t x, CoarseIds& cells) const {
    cells.ids.clear();
    cells.ends.clear();
    for (size_t r = 0; r < all_.size(); ++r) {
      coarse(b, h, r, x / (all_[r].block_q / all_[0].block_q), cells.ids);
      cells.ends.push_back(static_cast<int64_t>(cells.ids.size()));
    }
  }

 private:
  const int32_t* counts(int64_t b) const {
    return count_.const_data_ptr<int32_t>() + b * count_.size(1);
  }

  std::vector<Resolution> all_;
  bool causal_;
  Tensor count_;
  Lists lists_;
};

}  // namespace mra::cpu
