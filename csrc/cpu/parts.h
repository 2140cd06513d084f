// Rows of all heads in parts, spread over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "../common/budget.h"
#include "views.h"

namespace mra::cpu {

// Rows of one product, and rows whose sums are kept apart so that a few long heads make work for
// many threads. Neither depends on how many threads there are.
constexpr int64_t kTileRows = 128;
constexpr int64_t kChunkRows = 2048;

// f(part of all, head, first row, end row, scratch of `elements`) for all parts of `rows` rows of
// all heads of `length` rows; `dim`: columns of a row.
template <typename A, typename F>
void for_parts(int64_t heads, int64_t length, int64_t rows, int64_t dim, int64_t elements,
               const F& f) {
  const int64_t parts = ceil_div(length, rows), work = rows * dim * std::max<int64_t>(1, dim / 8);
  at::parallel_for(0, heads * parts, grain(work), [&](int64_t begin, int64_t end) {
    const SerialBlas serial;
    Scratch<A> scratch(elements, 1);
    A* room = scratch.take(elements);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t first = at % parts * rows;
      f(at, at / parts, first, std::min(length, first + rows), room);
    }
  });
}

}  // namespace mra::cpu
