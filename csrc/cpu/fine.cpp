// Stage fine: one softmax over the exact keys and the coarse part, one query block at a time.
//
// The scores of a query block are made a chunk of columns at a time (tiles.h). Each row carries
// its maximum, its exact and coarse mass and its sum of values; all are rescaled when the maximum
// moves.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "scores.h"
#include "stages_cpu.h"
#include "tiles.h"

namespace mra::cpu {
namespace {

template <typename T>
class FineForward : Sizes {
 public:
  using A = acc_t<T>;

  FineForward(const Inputs& in, const BlockList& rows, const std::optional<CoarseState>& state,
              const std::optional<PooledInputs>& pooled, const Options& o, FineResult& result)
      : Sizes(in, o),
        o_(o),
        levels_(std::max<int64_t>(1, o.resolutions.size())),
        query_(in.query),
        scores_(in, pooled, o),
        value_(in.value),
        key_mask_(in.key_mask),
        query_mask_(in.query_mask),
        rows_(rows),
        out_(result.out.mutable_data_ptr<T>()),
        lse_(result.lse.mutable_data_ptr<A>()),
        share_(result.share.defined() ? result.share.mutable_data_ptr<A>() : nullptr) {
    if (state) {
      state_mean_ = state->mean.contiguous();
      state_lse_ = state->lse.contiguous();
      if (state->parts.defined()) state_parts_ = state->parts.contiguous();
    }
    if (pooled) {
      coarse_value_.emplace(pooled->value);
      block_bias_ = BlockBias<A>(*pooled);
      if (!o.levels.empty()) cells_.emplace(rows, pooled->key_count, o);
    }
  }

  int64_t items(int64_t B) const { return B * H_ * nq_; }

  void run(int64_t begin, int64_t end) const {
    const SerialBlas serial;
    KeyTiles<A> tiles(o_, M_, kMaxSegment<T>);
    const int64_t bq = o_.block_q;
    Scratch<A> scratch(bq * (tiles.ld() + 2 * D_ + 4 + levels_) + tiles.max_segment() * D_, 9);
    Block block{scratch.take(bq * tiles.ld()),
                scratch.take(bq * D_),
                scratch.take(bq * D_),
                scratch.take(tiles.max_segment() * D_),
                scratch.take(bq),
                scratch.take(bq),
                scratch.take(bq),
                scratch.take(bq),
                scratch.take(bq * levels_)};
    CoarseIds ids;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / nq_;
      attend(head / H_, head % H_, balanced(item % nq_, nq_, o_.causal), tiles, ids, block);
    }
  }

 private:
  struct Block {
    A* scores;                        // [bq, ld]
    A* acc;                           // [bq, D]
    A* query;                         // [bq, D], for half precision
    A* keys;                          // [max_segment, D], likewise, and values
    A *top, *shift, *factor, *exact;  // [bq]
    A* coarse;                        // [levels, bq]
  };

  void attend(int64_t b, int64_t h, int64_t x, KeyTiles<A>& tiles, CoarseIds& ids,
              const Block& t) const {
    const int64_t first = x * o_.block_q, rows = std::min(o_.block_q, N_ - first), hk = h / G_;
    const int64_t ld = tiles.ld();
    const auto q = load_rows(query_.head(b, h), first, rows, t.query);
    start(b, h, x, rows, t);
    if (cells_) {
      cells_->all_coarse(b, h, x, ids);
      tiles.build(rows_(b, h, x), ids);
    } else {
      tiles.build(rows_(b, h, x), coarse_value_ ? past_blocks(o_, nk_, x) : 0);
    }
    for (const Chunk& chunk : tiles.chunks()) {
      if (chunk.columns == 0) continue;
      for (const Segment* s = tiles.begin(chunk); s != tiles.end(chunk); ++s) {
        scores_.segment(tiles, *s, b, h, q, first, rows, t.keys, t.scores);
      }
      softmax(tiles.bias(chunk, key_mask_, b, block_bias_.head(b, hk)), tiles, chunk, ld, rows, t);
      for (const Segment* s = tiles.begin(chunk); s != tiles.end(chunk); ++s) {
        const auto v = load_segment(tiles, *s, value_, coarse_value_, b, hk, t.keys);
        gemm(Op::none, Op::none, rows, D_, s->count, A(1), t.scores + s->column, ld, v.data, v.ld,
             A(1), t.acc, D_);
      }
    }
    finish(b, h, first, rows, t);
  }

  // Every row starts from the state of the block's coarse part, or from nothing.
  void start(int64_t b, int64_t h, int64_t x, int64_t rows, const Block& t) const {
    const int64_t item = (b * H_ + h) * nq_ + x;
    const A lse = state_lse_.defined() ? state_lse_.const_data_ptr<A>()[item] : -kInf<A>;
    const bool has_mass = lse != -kInf<A>;
    std::fill_n(t.top, rows, lse);
    std::fill_n(t.exact, rows, A(0));
    for (int64_t r = 0; r < levels_; ++r) {
      const A* parts =
          state_parts_.defined() ? state_parts_.const_data_ptr<A>() + item * levels_ : nullptr;
      std::fill_n(t.coarse + r * o_.block_q, rows, !has_mass ? A(0) : parts ? parts[r] : A(1));
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (has_mass) {
        std::copy_n(state_mean_.const_data_ptr<A>() + item * D_, D_, t.acc + r * D_);
      } else {
        std::fill_n(t.acc + r * D_, D_, A(0));
      }
    }
  }

  // Scores of a chunk become weights. All that was summed before follows the new maximum.
  void softmax(const A* bias, const KeyTiles<A>& tiles, const Chunk& chunk, int64_t ld,
               int64_t rows, const Block& t) const {
    std::copy_n(t.top, rows, t.factor);
    add_bias_and_max(t.scores, ld, rows, chunk.columns, bias, t.top);
    for (int64_t r = 0; r < rows; ++r) {
      t.shift[r] = t.top[r] == -kInf<A> ? A(0) : t.top[r];
      t.factor[r] = exp_one(t.factor[r] - t.shift[r]);
      t.exact[r] *= t.factor[r];
      for (int64_t l = 0; l < levels_; ++l) t.coarse[l * o_.block_q + r] *= t.factor[r];
    }
    scale_rows(t.acc, D_, rows, D_, t.factor);
    exp_and_sum(t.scores, ld, rows, chunk.exact, t.shift, t.exact);
    for (const Segment* s = tiles.begin(chunk); s != tiles.end(chunk); ++s) {
      if (!s->coarse) continue;
      exp_and_sum(t.scores + s->column, ld, rows, s->count, t.shift,
                  t.coarse + s->level * o_.block_q);
    }
  }

  void finish(int64_t b, int64_t h, int64_t first, int64_t rows, const Block& t) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r, at = (b * H_ + h) * N_ + i;
      A mass = t.exact[r];
      for (int64_t l = 0; l < levels_; ++l) mass += t.coarse[l * o_.block_q + r];
      const bool empty = mass == 0 || !query_mask_(b, i);  // false for NaN, which goes on
      A* acc = t.acc + r * D_;
      if (empty) {
        std::fill_n(acc, D_, A(0));
      } else {
        const A inverse = A(1) / mass;
        for (int64_t d = 0; d < D_; ++d) acc[d] *= inverse;
      }
      store_row(acc, D_, out_ + ((b * N_ + i) * H_ + h) * D_);
      lse_[at] = empty ? -kInf<A> : t.top[r] + std::log(mass);
      for (int64_t l = 0; share_ && l < levels_; ++l) {
        share_[((b * H_ + h) * levels_ + l) * N_ + i] =
            empty ? A(0) : t.coarse[l * o_.block_q + r] / mass;
      }
    }
  }

  Options o_;
  int64_t levels_;  // resolutions
  Heads<T> query_;
  Scores<T> scores_;
  Heads<T> value_;
  std::optional<Heads<A>> coarse_value_;
  std::optional<Cells> cells_;  // coarse = row with levels
  Mask key_mask_, query_mask_;
  Lists rows_;
  Tensor state_mean_, state_lse_, state_parts_;
  BlockBias<A> block_bias_;
  T* out_;    // [B, N, H, D]
  A* lse_;    // [B, H, N]
  A* share_;  // [B, H, levels, N] or null
};

}  // namespace

FineResult fine(const Inputs& in, const BlockList& rows, const std::optional<CoarseState>& state,
                const std::optional<PooledInputs>& pooled, const Tensor&, const Options& o) {
  const int64_t B = in.query.size(0), H = in.query.size(1), N = in.query.size(2);
  const auto acc = in.query.options().dtype(acc_type(in.query.scalar_type()));
  FineResult result;
  result.out = at::empty({B, N, H, in.query.size(3)}, in.query.options()).transpose(1, 2);
  result.lse = at::empty({B, H, N}, acc);
  if (has_order1(o)) {
    const auto levels = static_cast<int64_t>(o.resolutions.size());
    result.share = levels == 0 ? at::empty({B, H, N}, acc) : at::empty({B, H, levels, N}, acc);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, in.query.scalar_type(), "mra_fine", [&] {
        const FineForward<scalar_t> forward(in, rows, state, pooled, o, result);
        at::parallel_for(0, forward.items(B), 1,
                         [&](int64_t begin, int64_t end) { forward.run(begin, end); });
      });
  return result;
}

}  // namespace mra::cpu
