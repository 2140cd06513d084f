// What a query block attends to, cut into chunks of score columns that fit a buffer.
//
// The exact keys come first: runs of consecutive keys of the selected blocks. Then the pooled keys
// of coarse = row: all that are not in the future, those of selected or empty blocks with the log
// weight -inf. One matrix product a segment fills its columns of the scores.
//
// With levels the pooled keys are those of the coarse cells (CoarseIds), and `first` of a segment
// is a place among them.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cells.h"

namespace mra::cpu {

template <typename A>
constexpr A kInf = std::numeric_limits<A>::infinity();

// Pooled keys of a head.
inline int64_t pooled_keys(const Options& o, int64_t nk) {
  return o.resolutions.empty() ? nk : all_key_blocks(o.resolutions);
}

// Elements of a tile of scores: several tiles together fit the second-level cache.
constexpr int64_t kTileElements = 32768;

struct Segment {
  int64_t first, count;  // keys, or pooled keys
  int64_t column;        // where they stand in the scores
  bool coarse;
  int64_t level = 0;  // resolution of pooled keys
};

struct Chunk {
  size_t begin, end;       // segments
  int64_t exact, columns;  // columns of exact keys, of all
};

// log c_y, [B, nk]; -inf for an empty block.
template <typename A>
std::vector<A> log_counts(const Tensor& key_count) {
  const Tensor counts = key_count.contiguous();
  const int32_t* c = counts.const_data_ptr<int32_t>();
  std::vector<A> logs(counts.numel());
  for (size_t i = 0; i < logs.size(); ++i) logs[i] = c[i] > 0 ? std::log(A(c[i])) : -kInf<A>;
  return logs;
}

// What is added to the scores of pooled keys, for each key head: log_counts or weighted means'.
template <typename A>
class BlockBias {
 public:
  BlockBias() = default;
  explicit BlockBias(const PooledInputs& pooled)
      : bias_(log_counts<A>(pooled.key_count)), blocks_(pooled.key_count.size(1)) {
    if (!pooled.mass.defined()) return;
    const Tensor mass = pooled.mass.contiguous();
    bias_.assign(mass.const_data_ptr<A>(), mass.const_data_ptr<A>() + mass.numel());
    heads_ = mass.size(1);
  }
  const A* head(int64_t b, int64_t hk) const {
    return bias_.data() + (heads_ > 0 ? b * heads_ + hk : b) * blocks_;
  }

 private:
  std::vector<A> bias_;  // [B, blocks] or [B, heads, blocks]
  int64_t blocks_ = 0, heads_ = 0;
};

// s += bias[r]
template <typename A>
void add_to_rows(A* s, int64_t ld, int64_t rows, int64_t columns, const A* bias) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns; ++j) s[r * ld + j] += bias[r];
  }
}

// Rows of pooled keys or values: in place, or those of a list copied into a buffer.
template <typename A>
AccRows<A> load_pooled(const Rows<A>& rows, const Segment& s, const int32_t* ids, A* buffer) {
  if (!ids) return {rows.row(s.first), rows.stride};
  for (int64_t t = 0; t < s.count; ++t) {
    std::copy_n(rows.row(ids[t]), rows.dim, buffer + t * rows.dim);
  }
  return {buffer, rows.dim};
}

template <typename A>
class KeyTiles {
 public:
  // `max_segment` bounds the keys of one segment that are copied.
  KeyTiles(const Options& o, int64_t M, int64_t max_segment)
      : o_(o),
        M_(M),
        nk_(ceil_div(M, o.block_k)),
        width_(std::max(o.block_k,
                        std::min(kTileElements / o.block_q,
                                 nk_ * o.block_k + ceil_div(pooled_keys(o, nk_), 16) * 16))),
        max_segment_(std::min(max_segment, width_)),
        bias_(width_) {}

  int64_t width() const { return width_; }
  int64_t max_segment() const { return max_segment_; }
  // Distance of two rows of scores: whole cache lines, and not a power of two.
  int64_t ld() const { return ceil_div(width_, 16) * 16 + 16; }

  // `coarse_keys` pooled keys, 0 without coarse = row.
  void build(const Entries& selected, int64_t coarse_keys) {
    add_exact(selected);
    add_coarse(0, coarse_keys, width_, 0);
    chunks_.back().end = segments_.size();
  }

  // The same with levels. `cells` must live as long as this is read.
  void build(const Entries& selected, const CoarseIds& cells) {
    add_exact(selected);
    ids_ = cells.ids.data();
    for (size_t r = 0; r < cells.ends.size(); ++r) {
      add_coarse(r == 0 ? 0 : cells.ends[r - 1], cells.ends[r], max_segment_, r);
    }
    chunks_.back().end = segments_.size();
  }

  const std::vector<Chunk>& chunks() const { return chunks_; }
  const Segment* begin(const Chunk& c) const { return segments_.data() + c.begin; }
  const Segment* end(const Chunk& c) const { return segments_.data() + c.end; }
  // Pooled keys of a coarse segment, with levels; else null.
  const int32_t* ids(const Segment& s) const { return ids_ ? ids_ + s.first : nullptr; }

  // What is added to every row of a chunk's scores, [columns], or null for nothing:
  // -inf for a masked key, the log weight of a pooled key. log_count [blocks of all resolutions].
  const A* bias(const Chunk& chunk, const Mask& key_mask, int64_t b, const A* log_count) {
    if (!key_mask.data && chunk.exact == chunk.columns) return nullptr;
    for (const Segment* s = begin(chunk); s != end(chunk); ++s) {
      A* bias = bias_.data() + s->column;
      if (s->coarse && ids_) {
        for (int64_t t = 0; t < s->count; ++t) bias[t] = log_count[ids(*s)[t]];
      } else if (s->coarse) {
        std::copy_n(log_count + s->first, s->count, bias);
        for (const int32_t y : selected_) {
          if (y >= s->first && y < s->first + s->count) bias[y - s->first] = -kInf<A>;
        }
      } else {
        for (int64_t j = 0; j < s->count; ++j) bias[j] = key_mask(b, s->first + j) ? 0 : -kInf<A>;
      }
    }
    return bias_.data();
  }

 private:
  void add_exact(const Entries& selected) {
    segments_.clear();
    chunks_.clear();
    selected_ = selected;
    chunks_.push_back({0, 0, 0, 0});
    for (const int32_t y : selected) {
      if (y < 0 || y >= nk_) continue;
      const int64_t first = y * o_.block_k, count = std::min(o_.block_k, M_ - first);
      if (chunks_.back().columns + count > width_) next_chunk();
      Chunk& chunk = chunks_.back();
      const bool extends = segments_.size() > chunk.begin &&
                           segments_.back().first + segments_.back().count == first &&
                           segments_.back().count + count <= max_segment_;
      if (extends) {
        segments_.back().count += count;
      } else {
        segments_.push_back({first, count, chunk.columns, false});
      }
      chunk.columns += count;
      chunk.exact = chunk.columns;
    }
  }

  void add_coarse(int64_t first, int64_t end, int64_t longest, int64_t level) {
    while (first < end) {
      if (chunks_.back().columns == width_) next_chunk();
      Chunk& chunk = chunks_.back();
      const int64_t count = std::min({end - first, width_ - chunk.columns, longest});
      segments_.push_back({first, count, chunk.columns, true, level});
      chunk.columns += count;
      first += count;
    }
  }

  void next_chunk() {
    chunks_.back().end = segments_.size();
    chunks_.push_back({segments_.size(), segments_.size(), 0, 0});
  }

  Options o_;
  int64_t M_, nk_, width_, max_segment_;
  Entries selected_{nullptr, 0};
  const int32_t* ids_ = nullptr;
  std::vector<Segment> segments_;
  std::vector<Chunk> chunks_;
  std::vector<A> bias_;
};

// Keys or values of a segment of a head, exact or pooled, as acc.
template <typename T>
AccRows<T> load_segment(const KeyTiles<acc_t<T>>& tiles, const Segment& s, const Heads<T>& exact,
                        const std::optional<Heads<acc_t<T>>>& coarse, int64_t b, int64_t hk,
                        acc_t<T>* buffer) {
  if (!s.coarse) return load_rows(exact.head(b, hk), s.first, s.count, buffer);
  const auto rows = load_pooled(coarse->head(b, hk), s, tiles.ids(s), buffer);
  return {rows.data, rows.ld};
}

// -inf for keys in a row's future: scores [rows, count] of queries first_query.. and keys
// first_key.. .
template <typename A>
void mask_future(A* s, int64_t ld, int64_t first_query, int64_t rows, int64_t first_key,
                 int64_t count) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t seen = std::clamp<int64_t>(first_query + r - first_key + 1, 0, count);
    std::fill(s + r * ld + seen, s + r * ld + count, -kInf<A>);
  }
}

// Keys that a product takes at once: a copy of half-precision keys should stay in cache.
template <typename T>
constexpr int64_t kMaxSegment = std::is_same_v<T, acc_t<T>> ? kTileElements : 128;

}  // namespace mra::cpu
