// Gradients of stage fine. The weights P = exp(S - lse) are made again from the scores, twice:
//
//   by rows:     dQ, and the gradients of the pooled keys and values of coarse = row
//   by columns:  dK and dV of the exact keys; the pooled gradients are spread over their blocks
//
// with dP = dO V', dS = P (dP - delta). Every sum belongs to one thread and runs in one order that
// follows from the shapes, so the bits don't depend on how many threads there are.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>

#include <numeric>

#include "scores.h"
#include "stages_cpu.h"
#include "tiles.h"

namespace mra::cpu {
namespace {

// Query rows that one product by columns takes, at most, and units of work by rows, at least.
constexpr int64_t kRunRows = 256, kUnits = 64, kMaxSlices = 16;

// A tensor of rows as `Heads`, or none.
template <typename T>
std::optional<Heads<T>> optional_heads(const Tensor& t) {
  return t.defined() ? std::optional<Heads<T>>(t) : std::nullopt;
}

template <typename T>
class FineGradients : Sizes {
 public:
  using A = acc_t<T>;

  FineGradients(const Inputs& in, const BlockList& rows, const BlockList& columns,
                const std::optional<PooledInputs>& pooled, const FineBackward& grads,
                const Options& o)
      : Sizes(in, o),
        o_(o),
        pooled_(pooled_keys(o, nk_)),
        slices_(std::clamp<int64_t>(kUnits / (B_ * H_), 1, std::min(nq_, kMaxSlices))),
        query_(in.query),
        key_(in.key),
        scores_(in, pooled, o),
        value_(in.value),
        grad_out_(grads.grad_out),
        query_extra_(optional_heads<T>(grads.query_extra)),
        key_extra_(optional_heads<T>(grads.key_extra)),
        value_extra_(optional_heads<T>(grads.value_extra)),
        query_block_(optional_heads<A>(grads.query_block)),
        key_block_(optional_heads<A>(grads.key_block)),
        value_block_(optional_heads<A>(grads.value_block)),
        key_mask_(in.key_mask),
        query_mask_(in.query_mask),
        rows_(rows),
        columns_(columns),
        delta_(grads.delta.contiguous()),
        coarse_delta_(grads.coarse_delta.defined() ? grads.coarse_delta.contiguous() : delta_) {
    // exp(s - inf) = 0: rows without weight have no part in any gradient.
    const Tensor lse = grads.lse.contiguous();
    shift_.assign(lse.const_data_ptr<A>(), lse.const_data_ptr<A>() + lse.numel());
    std::replace(shift_.begin(), shift_.end(), -kInf<A>, kInf<A>);
    if (grads.coarse_sum.defined()) coarse_sum_ = grads.coarse_sum.mutable_data_ptr<A>();
    if (pooled) {
      coarse_key_.emplace(pooled->key);
      coarse_value_.emplace(pooled->value);
      key_count_ = pooled->key_count.contiguous();
      block_bias_ = BlockBias<A>(*pooled);
      if (pooled->weights.defined()) weights_ = pooled->weights.contiguous();
      if (!o.levels.empty()) cells_.emplace(rows, key_count_, o);
      const auto options = pooled->key.options();
      coarse_grads_ = at::empty({2, B_ * H_, slices_, pooled_, D_}, options);
      if (grads.mass_grad.defined()) {
        mass_grads_ = at::empty({B_ * H_, slices_, pooled_}, options);
        mass_grad_ = grads.mass_grad.mutable_data_ptr<A>();
        pooled_grads_ = grads.pooled_grads.mutable_data_ptr<A>();
      }
    }
  }

  void by_rows(const ResultRows<T>& grad_query) {
    at::parallel_for(0, B_ * H_ * slices_, 1, [&](int64_t begin, int64_t end) {
      const SerialBlas serial;
      KeyTiles<A> tiles(o_, M_, kMaxSegment<T>);
      const int64_t bq = o_.block_q;
      Scratch<A> scratch(2 * bq * tiles.ld() + 3 * bq * D_ + tiles.max_segment() * D_, 6);
      const RowTile t{scratch.take(bq * tiles.ld()), scratch.take(bq * tiles.ld()),
                      scratch.take(bq * D_),         scratch.take(bq * D_),
                      scratch.take(bq * D_),         scratch.take(tiles.max_segment() * D_)};
      CoarseIds ids;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / slices_, slice = balanced(item % slices_, slices_, o_.causal);
        const int64_t last = (slice + 1) * nq_ / slices_;
        for (const int64_t which : {0, 1}) {
          if (coarse_key_) std::fill_n(coarse_grad(which, head, slice, 0), pooled_ * D_, A(0));
        }
        if (mass_grad_) std::fill_n(mass_grad(head, slice), pooled_, A(0));
        for (int64_t x = slice * nq_ / slices_; x < last; ++x) {
          row_block(head / H_, head % H_, slice, x, tiles, ids, t, grad_query);
        }
      }
    });
    if (cells_) spread_coarse();
  }

  void by_columns(const ResultRows<T>& grad_key, const ResultRows<T>& grad_value) {
    at::parallel_for(0, B_ * Hk_ * nk_, 1, [&](int64_t begin, int64_t end) {
      const SerialBlas serial;
      const int64_t bk = o_.block_k;
      Scratch<A> scratch(2 * kRunRows * bk + 3 * bk * D_ + 2 * kRunRows * D_ + 2 * D_ + bk, 10);
      const ColumnTile t{scratch.take(kRunRows * bk),
                         scratch.take(kRunRows * bk),
                         scratch.take(bk * D_),
                         scratch.take(bk * D_),
                         scratch.take(bk * D_),
                         scratch.take(kRunRows * D_),
                         scratch.take(kRunRows * D_),
                         scratch.take(D_),
                         scratch.take(D_),
                         scratch.take(bk)};
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / nk_;
        column_block(head / Hk_, head % Hk_, balanced(item % nk_, nk_, o_.causal), t, grad_key,
                     grad_value);
      }
    });
  }

 private:
  struct RowTile {
    A *p, *ds;                         // [bq, ld]
    A *query, *grad_out, *grad_query;  // [bq, D]
    A* keys;                           // [max_segment, D]
  };

  struct ColumnTile {
    A *p, *ds;                         // [run, bk]
    A *value, *grad_key, *grad_value;  // [bk, D]
    A *query, *grad_out;               // [run, D]
    A *coarse_key, *coarse_value;      // [D]: gradients of the block's means
    A* bias;                           // [bk]
  };

  A scale() const { return static_cast<A>(o_.scale); }

  // Gradients of a head's pooled keys (which = 0) or values (1), from one slice of query blocks.
  A* coarse_grad(int64_t which, int64_t head, int64_t slice, int64_t y) {
    return coarse_grads_.mutable_data_ptr<A>() +
           (((which * B_ * H_ + head) * slices_ + slice) * pooled_ + y) * D_;
  }

  // Gradients of the log masses of a head's blocks, from one slice of query blocks.
  A* mass_grad(int64_t head, int64_t slice) {
    return mass_grads_.mutable_data_ptr<A>() + (head * slices_ + slice) * pooled_;
  }

  // Adds left' right, [count, D], to the gradients of the pooled keys of a segment.
  void add_coarse(int64_t which, int64_t head, int64_t slice, const Segment& s, const int32_t* ids,
                  int64_t rows, A alpha, const A* left, int64_t ld, const AccRows<T>& right,
                  A* buffer) {
    A* to = ids ? buffer : coarse_grad(which, head, slice, s.first);
    gemm(Op::transpose, Op::none, s.count, D_, rows, alpha, left, ld, right.data, right.ld,
         A(ids ? 0 : 1), to, D_);
    for (int64_t t = 0; ids && t < s.count; ++t) {
      add_row(buffer + t * D_, D_, coarse_grad(which, head, slice, ids[t]));
    }
  }

  // delta of the coarse keys of one resolution, for the rows from `at` on.
  const A* coarse_delta(int64_t level, int64_t at) const {
    const int64_t own = coarse_delta_.dim() == 4 ? level * B_ * H_ * N_ : 0;
    return coarse_delta_.const_data_ptr<A>() + own + at;
  }

  void row_block(int64_t b, int64_t h, int64_t slice, int64_t x, KeyTiles<A>& tiles, CoarseIds& ids,
                 const RowTile& t, const ResultRows<T>& grad_query) {
    const int64_t first = x * o_.block_q, rows = std::min(o_.block_q, N_ - first), hk = h / G_;
    const int64_t head = b * H_ + h, at = head * N_ + first, ld = tiles.ld();
    const auto q = load_rows(query_.head(b, h), first, rows, t.query);
    const auto g = load_rows(grad_out_.head(b, h), first, rows, t.grad_out);
    std::fill_n(t.grad_query, rows * D_, A(0));
    if (coarse_sum_) std::fill_n(coarse_sum_ + at, rows, A(0));
    if (cells_) {
      cells_->all_coarse(b, h, x, ids);
      tiles.build(rows_(b, h, x), ids);
    } else {
      tiles.build(rows_(b, h, x), coarse_key_ ? past_blocks(o_, nk_, x) : 0);
    }
    for (const Chunk& chunk : tiles.chunks()) {
      if (chunk.columns == 0) continue;
      for (const Segment* s = tiles.begin(chunk); s != tiles.end(chunk); ++s) {
        scores_.segment(tiles, *s, b, h, q, first, rows, t.keys, t.p);
        const auto v = load_segment(tiles, *s, value_, coarse_value_, b, hk, t.keys);
        gemm(Op::none, Op::transpose, rows, s->count, D_, A(1), g.data, g.ld, v.data, v.ld, A(0),
             t.ds + s->column, ld);
      }
      const A* bias = tiles.bias(chunk, key_mask_, b, block_bias_.head(b, hk));
      exp_shifted(t.p, ld, rows, chunk.columns, bias, shift_.data() + at);
      softmax_grad(t.p, t.ds, ld, rows, chunk.exact, delta_.const_data_ptr<A>() + at);
      for (const Segment* s = tiles.begin(chunk); s != tiles.end(chunk); ++s) {
        if (!s->coarse) continue;
        softmax_grad(t.p + s->column, t.ds + s->column, ld, rows, s->count,
                     coarse_delta(s->level, at));
        for (int64_t r = 0; coarse_sum_ && r < rows; ++r) {
          const A* ds = t.ds + s->column + r * ld;
          coarse_sum_[at + r] += std::accumulate(ds, ds + s->count, A(0));
        }
        for (int64_t r = 0; mass_grad_ && r < rows; ++r) {
          add_row(t.ds + s->column + r * ld, s->count, mass_grad(head, slice) + s->first);
        }
      }
      for (const Segment* s = tiles.begin(chunk); s != tiles.end(chunk); ++s) {
        const auto k = load_segment(tiles, *s, key_, coarse_key_, b, hk, t.keys);
        gemm(Op::none, Op::none, rows, D_, s->count, scale(), t.ds + s->column, ld, k.data, k.ld,
             A(1), t.grad_query, D_);
        if (!s->coarse) continue;
        const int32_t* list = tiles.ids(*s);
        add_coarse(0, head, slice, *s, list, rows, scale(), t.ds + s->column, ld, q, t.keys);
        add_coarse(1, head, slice, *s, list, rows, A(1), t.p + s->column, ld, g, t.keys);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      A* grad = t.grad_query + r * D_;
      if (query_block_ && query_mask_(b, first + r)) {
        add_row(query_block_->head(b, h).row(x), D_, grad);
      }
      if (query_extra_) add_row(query_extra_->head(b, h).row(first + r), D_, grad);
      store_row(grad, D_, grad_query.at(b, h, first + r));
    }
  }

  void column_block(int64_t b, int64_t hk, int64_t y, const ColumnTile& t,
                    const ResultRows<T>& grad_key, const ResultRows<T>& grad_value) {
    const int64_t first = y * o_.block_k, count = std::min(o_.block_k, M_ - first);
    const auto v = load_rows(value_.head(b, hk), first, count, t.value);
    std::fill_n(t.grad_key, count * D_, A(0));
    std::fill_n(t.grad_value, count * D_, A(0));
    for (int64_t j = 0; j < count; ++j) t.bias[j] = key_mask_(b, first + j) ? 0 : -kInf<A>;
    const int64_t run_blocks = kRunRows / o_.block_q;
    for (int64_t h = hk * G_; h < (hk + 1) * G_; ++h) {
      const Entries list = columns_(b, h, y);
      for (const int32_t* entry = list.begin(); entry != list.end();) {
        const int64_t x = *entry++;
        if (x < 0 || x >= nq_) continue;
        int64_t blocks = 1;
        while (entry != list.end() && *entry == x + blocks && x + blocks < nq_ &&
               blocks < run_blocks) {
          ++entry;
          ++blocks;
        }
        column_run(b, h, x * o_.block_q, std::min(blocks * o_.block_q, N_ - x * o_.block_q), first,
                   count, v, t);
      }
    }
    const bool pooled = coarse_key_ && !cells_;
    if (pooled) sum_coarse(b, hk, y, t);
    for (int64_t j = 0; j < count; ++j) {
      const bool valid = key_mask_(b, first + j);
      finish(b, hk, y, first + j, valid, pooled ? t.coarse_key : nullptr, key_block_, key_extra_,
             t.grad_key + j * D_, grad_key.at(b, hk, first + j));
      finish(b, hk, y, first + j, valid, pooled ? t.coarse_value : nullptr, value_block_,
             value_extra_, t.grad_value + j * D_, grad_value.at(b, hk, first + j));
    }
  }

  // Adds what `rows` queries from `query` on give to the block of `count` keys from `key` on.
  void column_run(int64_t b, int64_t h, int64_t query, int64_t rows, int64_t key, int64_t count,
                  const AccRows<T>& v, const ColumnTile& t) const {
    const int64_t at = (b * H_ + h) * N_ + query, ld = o_.block_k;
    const auto q = load_rows(query_.head(b, h), query, rows, t.query);
    const auto g = load_rows(grad_out_.head(b, h), query, rows, t.grad_out);
    scores_.exact(b, h, q, query, rows, key, count, t.p, ld);
    exp_shifted(t.p, ld, rows, count, key_mask_.data ? t.bias : nullptr, shift_.data() + at);
    gemm(Op::transpose, Op::none, count, D_, rows, A(1), t.p, ld, g.data, g.ld, A(1), t.grad_value,
         D_);
    gemm(Op::none, Op::transpose, rows, count, D_, A(1), g.data, g.ld, v.data, v.ld, A(0), t.ds,
         ld);
    softmax_grad(t.p, t.ds, ld, rows, count, delta_.const_data_ptr<A>() + at);
    gemm(Op::transpose, Op::none, count, D_, rows, scale(), t.ds, ld, q.data, q.ld, A(1),
         t.grad_key, D_);
  }

  // Gradients of the means of key block y, shared by the valid rows of the block, or whole where
  // these have weights.
  void sum_coarse(int64_t b, int64_t hk, int64_t y, const ColumnTile& t) {
    const int32_t c = key_count_.const_data_ptr<int32_t>()[b * nk_ + y];
    const A share = weights_.defined() ? A(1) : A(1) / static_cast<A>(std::max<int32_t>(1, c));
    std::fill_n(t.coarse_key, D_, A(0));
    std::fill_n(t.coarse_value, D_, A(0));
    A mass = 0;
    for (int64_t h = hk * G_; h < (hk + 1) * G_; ++h) {
      for (int64_t slice = 0; slice < slices_; ++slice) {
        add_scaled(t.coarse_key, coarse_grad(0, b * H_ + h, slice, y), share, D_);
        add_scaled(t.coarse_value, coarse_grad(1, b * H_ + h, slice, y), share, D_);
        if (mass_grad_) mass += mass_grad(b * H_ + h, slice)[y];
      }
    }
    if (!mass_grad_) return;
    const int64_t block = (b * Hk_ + hk) * nk_ + y;
    std::copy_n(t.coarse_key, D_, pooled_grads_ + block * D_);
    std::copy_n(t.coarse_value, D_, pooled_grads_ + (B_ * Hk_ * nk_ + block) * D_);
    mass_grad_[block] = mass;
  }

  // With levels: the same sums for all resolutions, as what every valid row of a block of block_k
  // gets.
  void spread_coarse() {
    const Tensor sums = at::zeros({2, B_, Hk_, pooled_, D_}, coarse_grads_.options());
    A* to = sums.mutable_data_ptr<A>();
    at::parallel_for(0, 2 * B_ * Hk_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        for (int64_t part = 0; part < G_ * slices_; ++part) {  // of the heads of a key head
          const int64_t which = item / (B_ * Hk_), head = item % (B_ * Hk_) * G_ + part / slices_;
          add_scaled(to + item * pooled_ * D_, coarse_grad(which, head, part % slices_, 0), A(1),
                     pooled_ * D_);
        }
      }
    });
    key_block_.emplace(pool_levels_backward(sums[0], key_count_, o_, false));
    value_block_.emplace(pool_levels_backward(sums[1], key_count_, o_, false));
  }

  void finish(int64_t b, int64_t hk, int64_t y, int64_t j, bool valid, const A* coarse,
              const std::optional<Heads<A>>& block, const std::optional<Heads<T>>& extra, A* sum,
              T* result) const {
    if (coarse && weights_.defined()) {
      const int64_t at = (b * Hk_ + hk) * nk_ * o_.block_k + j;
      add_scaled(sum, coarse, weights_.template const_data_ptr<A>()[at], D_);
    } else if (coarse && valid) {
      add_row(coarse, D_, sum);
    }
    if (block && valid) add_row(block->head(b, hk).row(y), D_, sum);
    if (extra) add_row(extra->head(b, hk).row(j), D_, sum);
    store_row(sum, D_, result);
  }

  Options o_;
  int64_t pooled_;  // pooled keys of a head
  int64_t slices_;  // of a head's query blocks, each with its own sums for the pooled keys
  Heads<T> query_, key_;
  Scores<T> scores_;
  Heads<T> value_, grad_out_;
  std::optional<Heads<T>> query_extra_, key_extra_, value_extra_;
  std::optional<Heads<A>> query_block_, key_block_, value_block_;
  std::optional<Heads<A>> coarse_key_, coarse_value_;
  std::optional<Cells> cells_;  // coarse = row with levels
  Mask key_mask_, query_mask_;
  Lists rows_, columns_;
  Tensor delta_, coarse_delta_;  // [B, H, N]; the second perhaps [resolutions, B, H, N]
  std::vector<A> shift_;         // [B, H, N]: lse, +inf for a row without weight
  Tensor key_count_;             // [B, pooled]
  BlockBias<A> block_bias_;
  Tensor weights_;                                    // of PooledInputs
  A* coarse_sum_ = nullptr;                           // [B, H, N] or null
  Tensor coarse_grads_;                               // [2, B * H, slices, pooled, D]
  Tensor mass_grads_;                                 // [B * H, slices, pooled], or undefined
  A *mass_grad_ = nullptr, *pooled_grads_ = nullptr;  // of FineBackward
};

}  // namespace

Grads fine_backward(const Inputs& in, const BlockList& rows, const BlockList& columns,
                    const std::optional<PooledInputs>& pooled, const FineBackward& grads,
                    const Options& o) {
  const auto empty_grad = [&](const Tensor& of, int which) {
    return at::empty_strided(of.sizes(), in.grad_strides[which], of.options());
  };
  const Grads result{empty_grad(in.query, 0), empty_grad(in.key, 1), empty_grad(in.value, 2)};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, in.query.scalar_type(), "mra_fine_backward", [&] {
        FineGradients<scalar_t> work(in, rows, columns, pooled, grads, o);
        work.by_rows(ResultRows<scalar_t>(result.query));
        work.by_columns(ResultRows<scalar_t>(result.key), ResultRows<scalar_t>(result.value));
      });
  return result;
}

}  // namespace mra::cpu
