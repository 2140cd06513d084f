// Scores; those of exact keys with the same bits wherever they are made.
//
// Forward and backward make the scores again and again: by runs of selected blocks, by columns of
// query blocks. The weights exp(s - lse) fit forward's lse only if every time gives the same s: for
// large scores one different rounding is larger than the errors of everything else. A BLAS doesn't
// promise that (MKL sums 32 keys in another order than 64), so that these products are our own: one
// sum over d in order for each score, whatever stands beside it.
//
// The keys lie in panels of kPanel keys, [D, kPanel] each, in acc: made once for all query blocks.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "tiles.h"

namespace mra::cpu {

constexpr int64_t kPanel = 16;  // divides block_k

// s[r, j] = scale * q[r] . k[j] for the first `count` keys of a panel [dim, kPanel].
void score_panel(const float* q, int64_t ld_q, int64_t rows, const float* panel, int64_t dim,
                 int64_t count, float scale, float* s, int64_t ld);
void score_panel(const double* q, int64_t ld_q, int64_t rows, const double* panel, int64_t dim,
                 int64_t count, double scale, double* s, int64_t ld);

template <typename T>
class KeyPanels {
 public:
  using A = acc_t<T>;

  // key [B, H, M, D]
  explicit KeyPanels(const Tensor& key)
      : heads_(key.size(1)),
        M_(key.size(2)),
        D_(key.size(3)),
        panels_(ceil_div(M_, kPanel)),
        data_(
            at::empty({key.size(0), heads_, panels_, D_, kPanel}, key.options().dtype(kType<A>))) {
    const Heads<T> keys(key);
    A* to = data_.template mutable_data_ptr<A>();
    at::parallel_for(0, key.size(0) * heads_ * panels_, grain(D_ * kPanel),
                     [&](int64_t begin, int64_t end) {
                       std::vector<A> buffer(kPanel * D_);
                       for (int64_t i = begin; i < end; ++i) {
                         const int64_t head = i / panels_, first = i % panels_ * kPanel;
                         pack(keys.head(head / heads_, head % heads_), first, buffer.data(),
                              to + i * D_ * kPanel);
                       }
                     });
  }

  // s[r, j] = scale * q[r] . key[first + j], [rows, count]; `first` is where a block starts.
  void scores(int64_t b, int64_t h, int64_t first, int64_t count, const AccRows<T>& q, int64_t rows,
              A scale, A* s, int64_t ld) const {
    const A* panel = data_.template const_data_ptr<A>() +
                     ((b * heads_ + h) * panels_ + first / kPanel) * D_ * kPanel;
    for (int64_t j = 0; j < count; j += kPanel, panel += D_ * kPanel) {
      score_panel(q.data, q.ld, rows, panel, D_, std::min(kPanel, count - j), scale, s + j, ld);
    }
  }

 private:
  void pack(const Rows<T>& keys, int64_t first, A* buffer, A* panel) const {
    const int64_t count = std::min(kPanel, M_ - first);
    const AccRows<T> rows = load_rows(keys, first, count, buffer);
    if (count < kPanel) std::fill_n(panel, D_ * kPanel, A(0));
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t d = 0; d < D_; ++d) panel[d * kPanel + j] = rows.data[j * rows.ld + d];
    }
  }

  int64_t heads_, M_, D_, panels_;
  Tensor data_;  // [B, H, panels, D, kPanel]
};

// Scores of what a query block attends to, exact or pooled: those that the causal mask drops are
// -inf, the bias of a query row is added to those of pooled keys.
template <typename T>
class Scores {
 public:
  using A = acc_t<T>;

  Scores(const Inputs& in, const std::optional<PooledInputs>& pooled, const Options& o)
      : o_(o),
        heads_(in.query.size(1)),
        N_(in.query.size(2)),
        D_(in.query.size(3)),
        group_(heads_ / in.key.size(1)),
        exact_(in.key) {
    if (!pooled) return;
    coarse_.emplace(pooled->key);
    if (pooled->row_bias.defined()) row_bias_ = pooled->row_bias.contiguous();
  }

  // Of queries first.. of head h and the keys first_key..: s [rows, count].
  void exact(int64_t b, int64_t h, const AccRows<T>& q, int64_t first, int64_t rows,
             int64_t first_key, int64_t count, A* s, int64_t ld) const {
    exact_.scores(b, h / group_, first_key, count, q, rows, static_cast<A>(o_.scale), s, ld);
    if (o_.causal && first_key + count - 1 > first) {
      mask_future(s, ld, first, rows, first_key, count);
    }
  }

  // Of a segment's keys, into its columns of `tile`. `buffer` [max_segment, D].
  void segment(const KeyTiles<A>& tiles, const Segment& s, int64_t b, int64_t h,
               const AccRows<T>& q, int64_t first, int64_t rows, A* buffer, A* tile) const {
    A* const to = tile + s.column;
    const int64_t ld = tiles.ld();
    if (!s.coarse) return exact(b, h, q, first, rows, s.first, s.count, to, ld);
    const auto k = load_pooled(coarse_->head(b, h / group_), s, tiles.ids(s), buffer);
    gemm(Op::none, Op::transpose, rows, s.count, D_, static_cast<A>(o_.scale), q.data, q.ld, k.data,
         k.ld, A(0), to, ld);
    if (row_bias_.defined()) {
      add_to_rows(to, ld, rows, s.count,
                  row_bias_.template const_data_ptr<A>() + (b * heads_ + h) * N_ + first);
    }
  }

 private:
  Options o_;
  int64_t heads_, N_, D_, group_;
  KeyPanels<T> exact_;
  std::optional<Heads<A>> coarse_;
  Tensor row_bias_;  // [B, H, N], or undefined
};

}  // namespace mra::cpu
