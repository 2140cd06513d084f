// What the parts of weighted means on the CPU share (centred.cpp, centred_backward.cpp).
//
// Rows of few keys or queries at a time pass through a thread's scratch, in acc. Sums over rows are
// kept apart by chunks, so that bits don't depend on the number of threads.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "parts.h"
#include "stages_cpu.h"

namespace mra::cpu {

// A unit of rows shares a centre and moments: a block of queries under causal, else all of a head.
// Under causal a block of keys has a centre, and gradients of the moments, of its own.
template <typename T>
class CentredHeads : protected Sizes {
 protected:
  using A = acc_t<T>;

  CentredHeads(const Inputs& in, const Centred& c, const Options& o)
      : Sizes(in, o),
        o_(o),
        units_(o.causal ? nq_ : 1),
        centres_(o.causal ? nq_ + 1 : 1),
        s_(static_cast<A>(o.scale)),
        query_(in.query),
        key_(in.key),
        value_(in.value),
        query_mask_(in.query_mask),
        key_mask_(in.key_mask),
        c_(c),
        options_(c.centre.options()),
        key_count_(c.pooled.key_count.template const_data_ptr<int32_t>()) {
    const int32_t* const query_count = c.pooled.query_count.template const_data_ptr<int32_t>();
    const auto at_least_one = [](int64_t n) { return static_cast<A>(std::max<int64_t>(1, n)); };
    for (int64_t b = 0; b < B_; ++b) {
      int64_t n = 0, y = 0;
      for (int64_t unit = 0; unit < units_; ++unit) {
        for (; y < blocks_of(unit); ++y) n += key_count_[b * nk_ + y];
        keys_.push_back(at_least_one(n));
      }
      n = 0;
      for (int64_t x = 0, i = 0; i < centres_; ++i) {
        for (; x < (o.causal ? i : nq_); ++x) n += query_count[b * nq_ + x] * G_;
        queries_.push_back(at_least_one(n));
      }
    }
  }

  // Rows at once, and rows whose sums are one: within a unit; whole blocks of keys, under causal
  // one.
  int64_t query_tile() const { return o_.causal ? std::min(o_.block_q, kTileRows) : kTileRows; }
  int64_t query_chunk() const { return o_.causal ? o_.block_q : std::min(N_, kChunkRows); }
  int64_t key_tile() const { return whole_blocks(kTileRows); }
  int64_t key_chunk() const { return whole_blocks(kChunkRows); }

  int64_t unit_of(int64_t row) const { return o_.causal ? row / o_.block_q : 0; }
  // The centre of a block of keys: under causal that of the first unit that sees all of it.
  int64_t centre_of_block(int64_t y) const {
    return o_.causal ? std::min(units_, ceil_div((y + 1) * o_.block_k, o_.block_q)) : 0;
  }
  // Blocks of keys in the moments of a unit, and their valid keys, at least 1.
  int64_t blocks_of(int64_t unit) const { return past_blocks(o_, nk_, unit); }
  A keys_of(int64_t b, int64_t unit) const { return keys_[b * units_ + unit]; }
  // Valid queries of a group that a centre is the mean of, at least 1.
  A queries_of(int64_t b, int64_t centre) const { return queries_[b * centres_ + centre]; }

  const A* of(const Tensor& x) const { return x.template const_data_ptr<A>(); }
  const A* centre(int64_t key_head, int64_t i) const {
    return of(c_.centre) + (key_head * centres_ + i) * D_;
  }
  // C, then Sigma.
  const A* moments(int64_t key_head, int64_t row) const {
    return of(c_.moments) + (key_head * units_ + unit_of(row)) * 2 * D_ * D_;
  }
  const A* weights(int64_t key_head) const {
    return of(c_.pooled.weights) + key_head * nk_ * o_.block_k;
  }
  // A key in the sums of moments: but for one over the number of keys.
  A weight_in_sums(int64_t key_head, int64_t j) const {
    return weights(key_head)[j] * static_cast<A>(key_count_[key_head / Hk_ * nk_ + j / o_.block_k]);
  }

  // Queries of a head less their centre; masked ones count as zeros.
  void less_centre(int64_t head, int64_t first, int64_t rows, A* to) const {
    const int64_t b = head / H_;
    const Rows<T> q = query_.head(b, head % H_);
    for (int64_t i = first; i < first + rows; ++i, to += D_) {
      if (query_mask_(b, i)) {
        load_row(q.row(i), D_, to);
      } else {
        std::fill_n(to, D_, A(0));
      }
      add_scaled(to, centre(head / G_, unit_of(i)), A(-1), D_);
    }
  }

  // Keys or values of a key head less their blocks' means, zeros where masked, [rows, D] at `ld`.
  void deviations(const Heads<T>& x, const Tensor& means, int64_t key_head, int64_t first,
                  int64_t rows, A* to, int64_t ld) const {
    const int64_t b = key_head / Hk_;
    const Rows<T> from = x.head(b, key_head % Hk_);
    for (int64_t j = first; j < first + rows; ++j, to += ld) {
      if (!key_mask_(b, j)) {
        std::fill_n(to, D_, A(0));
        continue;
      }
      load_row(from.row(j), D_, to);
      add_scaled(to, of(means) + (key_head * nk_ + j / o_.block_k) * D_, A(-1), D_);
    }
  }

  // f(key head, row d) for the rows of all matrices; each looks at `chunks` sums.
  template <typename F>
  void for_matrix_rows(int64_t chunks, const F& f) const {
    at::parallel_for(0, B_ * Hk_ * D_, grain(chunks * 2 * D_), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) f(item / D_, item % D_);
    });
  }

  Options o_;
  int64_t units_, centres_;
  A s_;
  Heads<T> query_, key_, value_;
  Mask query_mask_, key_mask_;
  const Centred& c_;
  at::TensorOptions options_;  // of acc

 private:
  int64_t whole_blocks(int64_t rows) const {
    return (o_.causal ? 1 : std::max<int64_t>(1, rows / o_.block_k)) * o_.block_k;
  }

  const int32_t* key_count_;
  std::vector<A> keys_, queries_;  // keys_of, queries_of
};

// Log weights of pool = sampled, [B, Hk, nk * block_k] acc.
Tensor sampled_log_weights(const Inputs& in, const Tensor& centre, const Options& o);

}  // namespace mra::cpu
