// Stage plan: which pairs of blocks are exact, and the same lists read by columns.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <vector>

#include "../common/budget.h"
#include "select.h"
#include "stages_cpu.h"
#include "views.h"

namespace mra::cpu {
namespace {

struct Shape {
  int64_t B, H, Hk, nq, nk, D, N;
};

// Forcing conditions that a pair meets; kCrossing for a pair that the diagonal crosses.
int32_t tier_of(const Options& o, int64_t nk, int64_t x, int64_t y) {
  if (o.causal && y >= past_blocks(o, nk, x)) return kCrossing;
  int32_t tier = 0;
  if (o.diagonal_blocks > 0) {
    const int64_t reach = o.diagonal_blocks / 2 * std::max(o.block_q, o.block_k);
    tier +=
        y * o.block_k < (x + 1) * o.block_q + reach && (y + 1) * o.block_k > x * o.block_q - reach;
  }
  tier += y < o.first_blocks;
  if (o.selection == Selection::global) tier += x < o.first_blocks;
  return tier;
}

// Scores of the pooled inputs, one query block at a time.
template <typename A>
class RowScores {
 public:
  RowScores(const Pooled& query, const Pooled& key, const Shape& s, const Options& o)
      : q_mean_(query.mean.contiguous()),
        q_count_(query.count.contiguous()),
        k_mean_(key.mean.contiguous()),
        k_count_(key.count.contiguous()),
        k_bias_(key.bias.defined() ? key.bias.contiguous() : key.bias),
        shape_(s),
        options_(o) {}

  // k_t [D, ld]: the pooled keys of a head with one key a column.
  void load_keys(int64_t b, int64_t hk, A* k_t, int64_t ld) const {
    const A* k = k_mean_.const_data_ptr<A>() + (b * shape_.Hk + hk) * shape_.nk * shape_.D;
    for (int64_t y = 0; y < shape_.nk; ++y) {
      for (int64_t d = 0; d < shape_.D; ++d) k_t[d * ld + y] = k[y * shape_.D + d];
    }
  }

  // Adds the existing pairs of row x of head (b, h). Returns how many of them are crossings.
  int64_t add(int64_t b, int64_t h, int64_t x, const A* k_t, int64_t ld, A* scores,
              std::vector<Candidate<A>>& out) const {
    const auto& [B, H, Hk, nq, nk, D, N] = shape_;
    if (q_count_.const_data_ptr<int32_t>()[b * nq + x] == 0) return 0;
    const int64_t seen = visible_blocks(options_, N, nk, x);
    const A* q = q_mean_.const_data_ptr<A>() + ((b * H + h) * nq + x) * D;
    score_row(q, k_t, ld, D, seen, static_cast<A>(options_.scale), scores);
    if (k_bias_.defined()) {
      const A* bias = k_bias_.const_data_ptr<A>() + (b * Hk + h / (H / Hk)) * nk;
      for (int64_t y = 0; y < seen; ++y) scores[y] += bias[y];
    }
    const bool global = options_.selection == Selection::global;
    const int32_t* counts = k_count_.const_data_ptr<int32_t>() + b * nk;
    const int32_t first = global ? static_cast<int32_t>(x * nk) : 0;
    const size_t from = out.size();
    int64_t crossings = 0;
    A top = -std::numeric_limits<A>::infinity();
    for (int64_t y = 0; y < seen; ++y) {
      if (counts[y] == 0) continue;
      const int32_t tier = tier_of(options_, nk, x, y);
      crossings += tier == kCrossing;
      const A score = ordered(scores[y]);
      top = std::max(top, score);
      out.push_back({score, tier, first + static_cast<int32_t>(y)});
    }
    if (global) {  // scores count from the row's best
      top = std::max(top, std::numeric_limits<A>::lowest());
      for (size_t i = from; i < out.size(); ++i) out[i].score = ordered(out[i].score - top);
    }
    return crossings;
  }

 private:
  Tensor q_mean_, q_count_, k_mean_, k_count_, k_bias_;
  Shape shape_;
  Options options_;
};

template <typename A>
void select_rows(const RowScores<A>& rows, const Shape& s, const Options& o, int64_t stride,
                 int32_t* start, int32_t* count, int32_t* index) {
  const int64_t capacity = s.nq * stride;
  at::parallel_for(0, s.B * s.H * s.nq, grain(s.nk * s.D), [&](int64_t begin, int64_t end) {
    const int64_t ld = ceil_div(s.nk, 16) * 16;
    std::vector<A> k_t(s.D * ld), scores(s.nk);
    std::vector<Candidate<A>> all;
    int64_t loaded = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / s.nq, x = item % s.nq;
      const int64_t b = head / s.H, h = head % s.H, hk = h / (s.H / s.Hk);
      if (loaded != b * s.Hk + hk) {
        loaded = b * s.Hk + hk;
        rows.load_keys(b, hk, k_t.data(), ld);
      }
      all.clear();
      const int64_t crossings = rows.add(b, h, x, k_t.data(), ld, scores.data(), all);
      keep_best(all, std::max(row_budget(o, s.N, s.nk, h, x), crossings));
      start[item] = static_cast<int32_t>(x * stride);
      count[item] = static_cast<int32_t>(all.size());
      int32_t* list = index + head * capacity + x * stride;
      for (size_t t = 0; t < all.size(); ++t) list[t] = all[t].index;
    }
  });
}

template <typename A>
void select_global(const RowScores<A>& rows, const Shape& s, const Options& o, int64_t stride,
                   int32_t* start, int32_t* count, int32_t* index) {
  const int64_t capacity = s.nq * stride;
  const int64_t budget = map_budget(o, s.N, s.nk);
  at::parallel_for(0, s.B * s.H, grain(s.nq * s.nk * s.D), [&](int64_t begin, int64_t end) {
    const int64_t ld = ceil_div(s.nk, 16) * 16;
    std::vector<A> k_t(s.D * ld), scores(s.nk);
    std::vector<Candidate<A>> all;
    for (int64_t head = begin; head < end; ++head) {
      const int64_t b = head / s.H, h = head % s.H;
      rows.load_keys(b, h / (s.H / s.Hk), k_t.data(), ld);
      all.clear();
      int64_t crossings = 0;
      for (int64_t x = 0; x < s.nq; ++x) {
        crossings += rows.add(b, h, x, k_t.data(), ld, scores.data(), all);
      }
      keep_best(all, std::max(budget, crossings));
      size_t t = 0;
      for (int64_t x = 0; x < s.nq; ++x) {
        const size_t from = t;
        for (; t < all.size() && all[t].index < (x + 1) * s.nk; ++t) {
          index[head * capacity + t] = static_cast<int32_t>(all[t].index - x * s.nk);
        }
        start[head * s.nq + x] = static_cast<int32_t>(from);
        count[head * s.nq + x] = static_cast<int32_t>(t - from);
      }
    }
  });
}

}  // namespace

Planned plan(const Pooled& query, const Pooled& key, const std::optional<PooledInputs>&, int64_t N,
             const Options& o) {
  if (!o.levels.empty()) return {plan_levels(query, key, N, o), std::nullopt};
  const Shape s{query.mean.size(0),
                query.mean.size(1),
                key.mean.size(1),
                query.mean.size(2),
                key.mean.size(2),
                query.mean.size(3),
                N};
  TORCH_CHECK_NOT_IMPLEMENTED(s.nq * s.nk <= std::numeric_limits<int32_t>::max(), "plan: ", s.nq,
                              " x ", s.nk, " pairs of blocks are more than 2^31");
  const int64_t stride = row_capacity(o, s.nk);
  const auto ints = query.count.options();
  BlockList list{at::empty({s.B, s.H, s.nq}, ints), at::empty({s.B, s.H, s.nq}, ints),
                 at::zeros({s.B, s.H, s.nq * stride}, ints)};
  int32_t* start = list.start.mutable_data_ptr<int32_t>();
  int32_t* count = list.count.mutable_data_ptr<int32_t>();
  int32_t* index = list.index.mutable_data_ptr<int32_t>();
  AT_DISPATCH_FLOATING_TYPES(query.mean.scalar_type(), "mra_plan", [&] {
    const RowScores<scalar_t> rows(query, key, s, o);
    const auto select =
        o.selection == Selection::row ? select_rows<scalar_t> : select_global<scalar_t>;
    select(rows, s, o, stride, start, count, index);
  });
  return {list, std::nullopt};
}

BlockList transpose(const BlockList& rows, int64_t nk) {
  const int64_t B = rows.start.size(0), H = rows.start.size(1), nq = rows.start.size(2);
  const Lists lists(rows);
  const auto ints = rows.start.options();
  BlockList columns{at::empty({B, H, nk}, ints), at::zeros({B, H, nk}, ints), Tensor()};
  int32_t* start = columns.start.mutable_data_ptr<int32_t>();
  int32_t* count = columns.count.mutable_data_ptr<int32_t>();
  int64_t capacity = rows.index.size(2);  // more only where given lists overlap
  for (int64_t head = 0; head < B * H; ++head) {
    int32_t* counts = count + head * nk;
    for (int64_t x = 0; x < nq; ++x) {
      for (const int32_t y : lists(head / H, head % H, x)) {
        if (y >= 0 && y < nk) ++counts[y];
      }
    }
    int32_t total = 0;
    for (int64_t y = 0; y < nk; ++y) {
      start[head * nk + y] = total;
      total += counts[y];
    }
    capacity = std::max<int64_t>(capacity, total);
  }
  columns.index = at::zeros({B, H, capacity}, ints);
  int32_t* index = columns.index.mutable_data_ptr<int32_t>();
  at::parallel_for(0, B * H, grain(16 * (capacity + nk)), [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      std::vector<int32_t> next(start + head * nk, start + (head + 1) * nk);
      for (int64_t x = 0; x < nq; ++x) {  // ascending, so every column is
        for (const int32_t y : lists(head / H, head % H, x)) {
          if (y >= 0 && y < nk) index[head * capacity + next[y]++] = static_cast<int32_t>(x);
        }
      }
    }
  });
  return columns;
}

}  // namespace mra::cpu
