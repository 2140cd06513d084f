// How the CPU stages see tensors: rows of one head, lists of one head, scratch of one thread.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>

#include "../common/budget.h"
#include "../common/stages.h"
#include "gemm.h"
#include "vec.h"

namespace mra::cpu {

template <typename A>
constexpr at::ScalarType kType = c10::CppTypeToScalarType<A>::value;

// acc of a tensor's dtype.
inline at::ScalarType acc_type(at::ScalarType t) {
  return t == at::kDouble ? at::kDouble : at::kFloat;
}

// Sizes of a call, in blocks of block_q and block_k.
struct Sizes {
  Sizes(const Inputs& in, const Options& o)
      : B_(in.query.size(0)),
        H_(in.query.size(1)),
        Hk_(in.key.size(1)),
        G_(H_ / Hk_),
        N_(in.query.size(2)),
        M_(in.key.size(2)),
        D_(in.query.size(3)),
        nq_(ceil_div(N_, o.block_q)),
        nk_(ceil_div(M_, o.block_k)) {}

  int64_t B_, H_, Hk_, G_, N_, M_, D_, nq_, nk_;
};

// Rows of one head: row i at data + i * stride, `dim` elements each.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride, dim;

  const T* row(int64_t i) const { return data + i * stride; }
};

// A tensor [B, H, L, D] whose rows a product can read in place; a copy where that isn't so.
template <typename T>
class Heads {
 public:
  explicit Heads(const Tensor& t) : tensor_(t) {
    const bool readable =
        (t.stride(3) == 1 || t.size(3) == 1) &&
        ((t.stride(2) >= t.size(3) && t.stride(2) <= kMaxLeadingDim) || t.size(2) <= 1);
    if (!readable) tensor_ = t.contiguous();
    // The stride of a single row may be anything, and a product checks it all the same.
    row_stride_ = std::max(tensor_.stride(2), tensor_.size(3));
    if (tensor_.size(2) <= 1) row_stride_ = tensor_.size(3);
    data_ = tensor_.template const_data_ptr<T>();
  }

  Rows<T> head(int64_t b, int64_t h) const {
    return {data_ + b * tensor_.stride(0) + h * tensor_.stride(1), row_stride_, tensor_.size(3)};
  }

 private:
  Tensor tensor_;
  const T* data_;
  int64_t row_stride_;
};

// A result [B, H, L, D] that is written row by row.
template <typename T>
struct ResultRows {
  T* data;
  int64_t batch, head, row;  // strides

  explicit ResultRows(const Tensor& t)
      : data(t.mutable_data_ptr<T>()), batch(t.stride(0)), head(t.stride(1)), row(t.stride(2)) {}
  T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

// Rows as acc: in place where T is acc already, else converted into a buffer.
template <typename T>
struct AccRows {
  const acc_t<T>* data;
  int64_t ld;
};

template <typename T>
AccRows<T> load_rows(const Rows<T>& rows, int64_t first, int64_t count, acc_t<T>* buffer) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return {rows.row(first), rows.stride};
  } else {
    for (int64_t i = 0; i < count; ++i) {
      load_row(rows.row(first + i), rows.dim, buffer + i * rows.dim);
    }
    return {buffer, rows.dim};
  }
}

// y += a x for rows of n, rounded once; `sum` [n] is scratch.
template <typename T>
void add_scaled_row(T* y, const acc_t<T>* x, acc_t<T> a, int64_t n, acc_t<T>* sum) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    add_scaled(y, x, a, n);
  } else {
    load_row(y, n, sum);
    add_scaled(sum, x, a, n);
    store_row(sum, n, y);
  }
}

// A mask [B, L] or none.
struct Mask {
  explicit Mask(const OptTensor& mask)
      : tensor(mask ? mask->contiguous() : Tensor()),
        data(mask ? tensor.const_data_ptr<bool>() : nullptr),
        length(mask ? tensor.size(1) : 0) {}

  bool operator()(int64_t b, int64_t i) const { return !data || data[b * length + i]; }

  Tensor tensor;
  const bool* data;
  int64_t length;
};

// The entries of one list. Bounds are cut to what the index tensor holds.
struct Entries {
  const int32_t* first;
  int64_t count;

  const int32_t* begin() const { return first; }
  const int32_t* end() const { return first + count; }
};

class Lists {
 public:
  explicit Lists(const BlockList& list)
      : start_(list.start.contiguous()),
        count_(list.count.contiguous()),
        index_(list.index.contiguous()),
        heads_(start_.size(1)),
        n_(start_.size(2)),
        capacity_(index_.size(2)) {}

  Entries operator()(int64_t b, int64_t h, int64_t r) const {
    const int64_t head = b * heads_ + h;
    const int64_t start =
        std::clamp<int64_t>(start_.const_data_ptr<int32_t>()[head * n_ + r], 0, capacity_);
    const int64_t count =
        std::clamp<int64_t>(count_.const_data_ptr<int32_t>()[head * n_ + r], 0, capacity_ - start);
    return {index_.const_data_ptr<int32_t>() + head * capacity_ + start, count};
  }

 private:
  Tensor start_, count_, index_;
  int64_t heads_, n_, capacity_;
};

// Buffers of one thread: one allocation, cut into pieces that start on cache lines.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t elements, int64_t pieces)
      : memory_(c10::GetCPUAllocator()->allocate((elements + pieces * kLine) * sizeof(A))),
        next_(static_cast<A*>(memory_.get())) {}

  A* take(int64_t elements) {
    A* piece = next_;
    next_ += (elements + kLine - 1) / kLine * kLine;
    return piece;
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(A);
  c10::DataPtr memory_;
  A* next_;
};

// Elements that are worth waking a thread for. Short inputs run a light stage on one thread: on a
// busy machine each parallel region may wait for a time slice.
constexpr int64_t kGrain = 1 << 19;

// Items of `elements` elements each that one thread should take, at least.
inline int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrain / elements); }

// Key blocks [0, n) are wholly in the past of query block x.
inline int64_t past_blocks(const Options& o, int64_t nk, int64_t x) {
  return o.causal ? std::min(nk, x * o.block_q / o.block_k) : nk;
}

// Item `i` of n as a block index. With causal the work grows with the block: taking blocks from
// both ends in turn gives threads that own consecutive items equal shares.
inline int64_t balanced(int64_t i, int64_t n, bool causal) {
  if (!causal) return i;
  return i % 2 == 0 ? i / 2 : n - 1 - i / 2;
}

}  // namespace mra::cpu
