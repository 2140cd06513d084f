// Stage plan with levels: one resolution after the other, the coarsest first. A row of cells scores
// the children of what its parent has chosen, so no resolution but the coarsest looks at all pairs.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cells.h"
#include "select.h"
#include "stages_cpu.h"

namespace mra::cpu {
namespace {

// Forcing conditions that a cell of these blocks meets; kCrossing where the diagonal crosses it.
int32_t tier_of(const Options& o, const Resolution& at, int64_t x, int64_t y) {
  const int64_t q = x * at.block_q, k = y * at.block_k;
  if (o.causal && k + at.block_k > q) return kCrossing;
  const int64_t reach = forced_reach(o);
  int32_t tier = k < forced_first(o);
  if (o.diagonal_blocks > 0) tier += k < q + at.block_q + reach && k + at.block_k > q - reach;
  return tier;
}

template <typename A>
class LevelPlan {
 public:
  LevelPlan(const Pooled& query, const Pooled& key, int64_t N, const Options& o, BlockList& lists)
      : o_(o),
        H_(query.mean.size(1)),
        Hk_(key.mean.size(1)),
        D_(query.mean.size(3)),
        N_(N),
        query_(query.mean),
        key_(key.mean),
        query_count_(query.count.contiguous()),
        lists_(lists),
        room_(list_capacities(o, o.resolutions)),
        cells_(lists, key.count, o) {}

  // Fills the lists of resolution r; those one resolution up are there.
  void select(size_t r) const {
    const Resolution& at = o_.resolutions[r];
    const bool finest = r == 0;
    const int64_t heads = query_count_.size(0) * H_, rows = query_count_.size(1);
    const int64_t capacity = lists_.index.size(2), room = room_[r];
    int64_t offset = 0;
    for (size_t finer = 0; finer < r; ++finer) offset += o_.resolutions[finer].nq * room_[finer];
    int32_t* start = lists_.start.template mutable_data_ptr<int32_t>();
    int32_t* count = lists_.count.template mutable_data_ptr<int32_t>();
    int32_t* index = lists_.index.template mutable_data_ptr<int32_t>();
    at::parallel_for(0, heads * at.nq, grain(64 * D_), [&](int64_t begin, int64_t end) {
      std::vector<int64_t> found;
      std::vector<Candidate<A>> all;
      std::vector<A> keys, scores;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / at.nq, x = item % at.nq, b = head / H_, h = head % H_;
        const int64_t row = head * rows + at.first_q + x;
        found.clear();
        if (query_count_.template const_data_ptr<int32_t>()[b * rows + at.first_q + x] > 0) {
          cells_.candidates(b, h, r, x, [&](int64_t y) { found.push_back(y); });
        }
        score(b, h, r, x, found, keys, scores);
        all.clear();
        int64_t kept = 0;  // beyond the budget
        for (size_t t = 0; t < found.size(); ++t) {
          const int32_t tier = tier_of(o_, at, x, found[t]);
          kept += tier >= (finest ? kCrossing : 1);
          all.push_back({ordered(scores[t]), tier, static_cast<int32_t>(found[t])});
        }
        const int64_t budget = finest ? row_budget(o_, N_, at.nk, 0, x)
                                      : o_.levels[o_.resolutions.size() - 1 - r].cells;
        keep_best(all, std::max(budget, kept));
        start[row] = static_cast<int32_t>(offset + x * room);
        count[row] = static_cast<int32_t>(all.size());
        int32_t* list = index + head * capacity + start[row];
        for (size_t t = 0; t < all.size(); ++t) list[t] = all[t].index;
      }
    });
  }

 private:
  // L of query block x and the key blocks `found`. Keys stand one a column, as in score_row.
  void score(int64_t b, int64_t h, size_t r, int64_t x, const std::vector<int64_t>& found,
             std::vector<A>& keys, std::vector<A>& scores) const {
    const Resolution& at = o_.resolutions[r];
    const int64_t n = static_cast<int64_t>(found.size()), ld = ceil_div(n, 16) * 16;
    keys.resize(D_ * ld);
    scores.resize(n);
    const Rows<A> k = key_.head(b, h / (H_ / Hk_));
    for (int64_t t = 0; t < n; ++t) {
      const A* from = k.row(at.first_k + found[t]);
      for (int64_t d = 0; d < D_; ++d) keys[d * ld + t] = from[d];
    }
    score_row(query_.head(b, h).row(at.first_q + x), keys.data(), ld, D_, n,
              static_cast<A>(o_.scale), scores.data());
  }

  Options o_;
  int64_t H_, Hk_, D_, N_;
  Heads<A> query_, key_;
  Tensor query_count_;
  BlockList lists_;
  std::vector<int64_t> room_;
  Cells cells_;
};

}  // namespace

BlockList plan_levels(const Pooled& query, const Pooled& key, int64_t N, const Options& o) {
  const int64_t B = query.mean.size(0), H = query.mean.size(1);
  const int64_t rows = all_query_blocks(o.resolutions);
  const auto ints = query.count.options();
  BlockList lists{at::zeros({B, H, rows}, ints), at::zeros({B, H, rows}, ints),
                  at::zeros({B, H, plan_capacity(o, o.resolutions)}, ints), Tensor()};
  AT_DISPATCH_FLOATING_TYPES(query.mean.scalar_type(), "mra_plan_levels", [&] {
    const LevelPlan<scalar_t> plan(query, key, N, o, lists);
    for (size_t r = o.resolutions.size(); r-- > 0;) plan.select(r);
  });
  return lists;
}

}  // namespace mra::cpu
