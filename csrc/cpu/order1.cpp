// The order-1 term on the CPU: stages order1 and order1_backward of common/stages.h.
//
// C and S lie side by side, [D, 2D] acc, so that one product with the keys makes both and one
// product with the queries reads both; so do dC and dS. Rows of few keys or queries at a time pass
// through a thread's scratch: nothing of size N x D is stored but the results.
#include "../common/order1.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "parts.h"
#include "stages_cpu.h"

namespace mra::cpu {
namespace {

template <typename T>
class Order1 : Sizes {
  using A = acc_t<T>;

 public:
  Order1(const Inputs& in, const PooledInputs& pooled, const Tensor& share, const Options& o)
      : Sizes(in, o),
        o_(o),
        unit_(std::max(o.block_q, o.block_k)),
        options_(share.options()),
        query_(in.query),
        key_(in.key),
        value_(in.value),
        key_mask_(in.key_mask),
        pooled_(pooled),
        share_(share.const_data_ptr<A>()) {
    // n of each unit: valid keys before it under causal, else all of them; at least 1.
    const int64_t units = o.causal ? chunks(M_) : 1, blocks = o.causal ? unit_ / o.block_k : nk_;
    const int32_t* count = pooled.key_count.const_data_ptr<int32_t>();
    for (int64_t b = 0; b < B_; ++b) {
      int64_t n = 0;
      for (int64_t u = 0; u < units; ++u) {
        if (o.causal) total_.push_back(static_cast<A>(std::max<int64_t>(1, n)));
        for (int64_t y = u * blocks; y < std::min(nk_, (u + 1) * blocks); ++y)
          n += count[b * nk_ + y];
      }
      if (!o.causal) total_.push_back(static_cast<A>(std::max<int64_t>(1, n)));
    }
  }

  // C and S of every unit, where `matrix` finds them.
  Tensor moments() const {
    Tensor sums = at::empty({B_, Hk_, chunks(M_), D_, 2 * D_}, options_);
    A* to = sums.mutable_data_ptr<A>();
    for_parts<A>(B_ * Hk_, M_, chunk_rows(M_), D_, 2 * tile() * D_,
                 [&](int64_t at, int64_t head, int64_t first, int64_t end, A* pair) {
                   for (int64_t i = first; i < end; i += tile()) {
                     const int64_t rows = std::min(tile(), end - i);
                     centred(head, i, rows, pair);
                     gemm(Op::transpose, Op::none, D_, 2 * D_, rows, A(1), pair + D_, 2 * D_, pair,
                          2 * D_, A(i > first), to + at * pair_size(), 2 * D_);
                   }
                 });
    combine(to, chunks(M_), 1, false);
    return sums;
  }

  // The same as the operator gives them. Its backward on the CPU makes them again: in acc.
  Tensor kept(const Tensor& moments) const {
    const int64_t P = moments_dim(D_);
    const auto options = options_.dtype(moments_type(c10::CppTypeToScalarType<T>::value));
    const Tensor result = at::zeros({B_, Hk_, 2, P, P}, options);
    result.narrow(3, 0, D_).narrow(4, 0, D_).copy_(
        moments.select(2, 0).view({B_, Hk_, D_, 2, D_}).transpose(2, 3));
    return result;
  }

  void apply(const Tensor& moments, const Tensor& result) const {
    const A* from = moments.const_data_ptr<A>();
    T* out = result.mutable_data_ptr<T>();
    for_parts<A>(B_ * H_, N_, tile(), D_, 4 * tile() * D_,
                 [&](int64_t, int64_t head, int64_t first, int64_t end, A* scratch) {
                   const int64_t b = head / H_, h = head % H_, rows = end - first;
                   A *both = scratch, *buffer = scratch + 2 * tile() * D_,
                     *sum = buffer + tile() * D_;
                   const auto q = load_rows(query_.head(b, h), first, rows, buffer);
                   gemm(Op::none, Op::none, rows, 2 * D_, D_, A(1), q.data, q.ld,
                        matrix(from, b, h / G_, 1, chunks(M_), first), 2 * D_, A(0), both, 2 * D_);
                   for (int64_t r = 0; r < rows; ++r) {
                     const A share = share_[head * N_ + first + r];
                     if (share == 0) continue;
                     const A *u = both + r * 2 * D_, gamma = damping(u + D_, q.data + r * q.ld);
                     T* row = out + b * result.stride(0) + h * result.stride(1) +
                              (first + r) * result.stride(2);
                     add_scaled_row(row, u, share * gamma * static_cast<A>(o_.scale), D_, sum);
                   }
                 });
  }

  Order1Grads backward(const Tensor& grad_out, const Tensor& delta, const Inputs& in) const {
    Order1Grads grads{at::empty({B_, H_, N_}, options_),
                      at::empty({B_, H_, N_, D_}, in.query.options()),
                      at::empty({B_, Hk_, M_, D_}, in.key.options()),
                      at::empty({B_, Hk_, M_, D_}, in.value.options())};
    const Tensor moment_grads = backward_rows(moments(), Heads<T>(grad_out), delta, grads);
    backward_keys(moment_grads, grads);
    return grads;
  }

 private:
  // A unit has its own C and S: under causal a run of rows as long as the larger block (N == M),
  // else the whole head. Under causal a chunk is a unit; a tile divides it.
  int64_t tile() const { return o_.causal ? std::min(unit_, kTileRows) : kTileRows; }
  int64_t chunk_rows(int64_t length) const {
    return o_.causal ? unit_ : std::min(length, kChunkRows);
  }
  int64_t chunks(int64_t length) const { return ceil_div(length, chunk_rows(length)); }
  int64_t pair_size() const { return 2 * D_ * D_; }

  // The pair of a row, in sums [B, Hk * group, chunks, D, 2D] after `combine`.
  const A* matrix(const A* sums, int64_t b, int64_t hk, int64_t group, int64_t chunks,
                  int64_t row) const {
    return sums + ((b * Hk_ + hk) * group * chunks + (o_.causal ? row / unit_ : 0)) * pair_size();
  }

  // Rows of a key head as [values | keys], less their block's means; zeros where masked.
  void centred(int64_t head, int64_t first, int64_t rows, A* pair) const {
    const int64_t b = head / Hk_, h = head % Hk_;
    const Rows<T> k = key_.head(b, h), v = value_.head(b, h);
    for (int64_t i = first; i < first + rows; ++i, pair += 2 * D_) {
      if (!key_mask_(b, i)) {
        std::fill_n(pair, 2 * D_, A(0));
        continue;
      }
      const int64_t mean = (head * nk_ + i / o_.block_k) * D_;
      load_row(v.row(i), D_, pair);
      add_scaled(pair, pooled_.value.const_data_ptr<A>() + mean, A(-1), D_);
      load_row(k.row(i), D_, pair + D_);
      add_scaled(pair + D_, pooled_.key.const_data_ptr<A>() + mean, A(-1), D_);
    }
  }

  // Sums of chunks [B, Hk * group, chunks, D, 2D] to matrices, in place: over all chunks over n;
  // under causal over those before each, over n, or in the backward pass over those behind each,
  // every one over its own n. In the backward pass dS comes out doubled, as S is quadratic in k.
  void combine(A* sums, int64_t chunks, int64_t group, bool backward) const {
    const int64_t width = 2 * D_;
    at::parallel_for(0, B_ * Hk_ * D_, grain(group * chunks * width),
                     [&](int64_t begin, int64_t end) {
                       std::vector<A> sum(width), one(width);
                       for (int64_t item = begin; item < end; ++item) {
                         const int64_t head = item / D_;
                         A* row = sums + head * group * chunks * pair_size() + item % D_ * width;
                         const A* n = total_.data() + head / Hk_ * (o_.causal ? chunks : 1);
                         const auto add_chunk = [&](A* to, int64_t c, A factor) {
                           for (int64_t g = 0; g < group; ++g) {
                             add_scaled(to, row + (g * chunks + c) * pair_size(), factor, width);
                           }
                         };
                         const auto store = [&](int64_t c, A factor) {
                           A* to = row + c * pair_size();
                           for (int64_t d = 0; d < width; ++d)
                             to[d] = sum[d] * factor * A(backward && d >= D_ ? 2 : 1);
                         };
                         std::fill(sum.begin(), sum.end(), A(0));
                         if (!o_.causal) {
                           for (int64_t c = 0; c < chunks; ++c) add_chunk(sum.data(), c, A(1));
                           store(0, A(1) / n[0]);
                           continue;
                         }
                         for (int64_t step = 0; step < chunks; ++step) {
                           const int64_t c = backward ? chunks - 1 - step : step;
                           std::fill(one.begin(), one.end(), A(0));
                           add_chunk(one.data(), c, backward ? A(1) / n[c] : A(1));
                           store(c, backward ? A(1) : A(1) / n[c]);
                           add_scaled(sum.data(), one.data(), A(1), width);
                         }
                       }
                     });
  }

  A damping(const A* w, const A* q) const {
    const A s = static_cast<A>(o_.scale);
    return A(1) / (A(1) + s * s / 4 * dot_row(w, q, D_));
  }

  // The query's gradient, coarse_delta, and dC | 2 dS of every unit.
  Tensor backward_rows(const Tensor& moments, const Heads<T>& grad_out, const Tensor& delta,
                       const Order1Grads& grads) const {
    Tensor sums = at::empty({B_, H_, chunks(N_), D_, 2 * D_}, options_);
    const A *from = moments.const_data_ptr<A>(), *delta_in = delta.const_data_ptr<A>();
    A *to = sums.mutable_data_ptr<A>(), *coarse_delta = grads.coarse_delta.mutable_data_ptr<A>();
    T* grad_query = grads.query.mutable_data_ptr<T>();
    const A s = static_cast<A>(o_.scale);
    const int64_t size = tile() * D_;
    for_parts<A>(
        B_ * H_, N_, chunk_rows(N_), D_, 7 * size,
        [&](int64_t at, int64_t head, int64_t first_row, int64_t end, A* scratch) {
          const int64_t b = head / H_, h = head % H_;
          A *x = scratch, *w = x + size, *left = w + size, *pair = left + size;
          A *q_buffer = pair + 2 * size, *g_buffer = q_buffer + size;
          for (int64_t first = first_row; first < end; first += tile()) {
            const int64_t rows = std::min(tile(), end - first);
            const auto q = load_rows(query_.head(b, h), first, rows, q_buffer);
            const auto g = load_rows(grad_out.head(b, h), first, rows, g_buffer);
            const A* c = matrix(from, b, h / G_, 1, chunks(M_), first);
            gemm(Op::none, Op::transpose, rows, D_, D_, A(1), g.data, g.ld, c, 2 * D_, A(0), x, D_);
            gemm(Op::none, Op::none, rows, D_, D_, A(1), q.data, q.ld, c + D_, 2 * D_, A(0), w, D_);
            for (int64_t r = 0; r < rows; ++r) {
              const int64_t row = head * N_ + first + r;
              A *xr = x + r * D_, *pr = pair + r * 2 * D_;
              const A *wr = w + r * D_, *qr = q.data + r * q.ld, *gr = g.data + r * g.ld;
              const A share = share_[row];
              if (share == 0) {  // such a row may hold anything
                std::fill_n(xr, D_, A(0));
                std::fill_n(left + r * D_, D_, A(0));
                std::fill_n(pr, 2 * D_, A(0));
                coarse_delta[row] = delta_in[row];
              } else {
                const A gamma = damping(wr, qr),
                        gu = gamma * s * dot_row(xr, qr, D_);  // gamma u.dO
                const A a = share * gamma * s, weight = -s * s / 4 * share * gamma * gu;
                coarse_delta[row] = delta_in[row] - gu;
                std::copy_n(qr, D_, left + r * D_);
                for (int64_t d = 0; d < D_; ++d) {
                  xr[d] = a * xr[d] + 2 * weight * wr[d];
                  pr[d] = a * gr[d];
                  pr[D_ + d] = weight * qr[d];
                }
              }
              store_row(xr, D_, grad_query + row * D_);
            }
            gemm(Op::transpose, Op::none, D_, 2 * D_, rows, A(1), left, D_, pair, 2 * D_,
                 A(first > first_row), to + at * pair_size(), 2 * D_);
          }
        });
    combine(to, chunks(N_), G_, true);
    return sums;
  }

  // dv_j = kappa_j dC and dk_j = nu_j dC^T + 2 kappa_j dS.
  void backward_keys(const Tensor& moment_grads, const Order1Grads& grads) const {
    const A* from = moment_grads.const_data_ptr<A>();
    T *grad_key = grads.key.mutable_data_ptr<T>(), *grad_value = grads.value.mutable_data_ptr<T>();
    const int64_t size = 2 * tile() * D_;
    for_parts<A>(B_ * Hk_, M_, tile(), D_, 2 * size,
                 [&](int64_t, int64_t head, int64_t first, int64_t end, A* scratch) {
                   const int64_t b = head / Hk_, rows = end - first;
                   A *pair = scratch, *both = scratch + size;
                   const A* c = matrix(from, b, head % Hk_, G_, chunks(N_), first);
                   centred(head, first, rows, pair);
                   gemm(Op::none, Op::none, rows, 2 * D_, D_, A(1), pair + D_, 2 * D_, c, 2 * D_,
                        A(0), both, 2 * D_);
                   gemm(Op::none, Op::transpose, rows, D_, D_, A(1), pair, 2 * D_, c, 2 * D_, A(1),
                        both + D_, 2 * D_);
                   for (int64_t r = 0; r < rows; ++r) {
                     A* row = both + r * 2 * D_;
                     if (!key_mask_(b, first + r)) std::fill_n(row, 2 * D_, A(0));
                     store_row(row, D_, grad_value + (head * M_ + first + r) * D_);
                     store_row(row + D_, D_, grad_key + (head * M_ + first + r) * D_);
                   }
                 });
  }

  Options o_;
  int64_t unit_;
  at::TensorOptions options_;  // of acc
  Heads<T> query_, key_, value_;
  Mask key_mask_;
  PooledInputs pooled_;
  const A* share_;        // [B, H, N]
  std::vector<A> total_;  // [B, units]: n
};

}  // namespace

void order1(FineResult& result, const Inputs& in, PooledInputs& pooled, const Options& o) {
  if (!o.levels.empty()) return order1_of_each(order1, result, in, pooled, o);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, in.query.scalar_type(), "mra_order1",
                                  [&] {
                                    const Order1<scalar_t> term(in, pooled, result.share, o);
                                    const Tensor moments = term.moments();
                                    term.apply(moments, result.out);
                                    if (keeps_moments(o)) pooled.moments = term.kept(moments);
                                  });
}

Order1Grads order1_backward(const Tensor& grad_out, const Tensor& share, const Tensor& out,
                            const Tensor& grad_lse, const Inputs& in, const PooledInputs& pooled,
                            const Options& o) {
  const Tensor delta = cpu::delta(grad_out, out, grad_lse);
  const auto of_one = [&](const Tensor& share, const PooledInputs& pooled, const Options& o) {
    Order1Grads grads;
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kBFloat16, at::kHalf, in.query.scalar_type(), "mra_order1_backward",
        [&] { grads = Order1<scalar_t>(in, pooled, share, o).backward(grad_out, delta, in); });
    return grads;
  };
  Order1Grads grads =
      o.levels.empty() ? of_one(share, pooled, o) : order1_grads_of_each(of_one, share, pooled, o);
  grads.delta = delta;
  return grads;
}

}  // namespace mra::cpu
