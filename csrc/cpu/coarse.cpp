// Stage coarse, for coarse = block: every query block over the means of its unselected key blocks.
//
// Block-sized work: a strip of query blocks against all key blocks at a time.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "stages_cpu.h"
#include "tiles.h"

namespace mra::cpu {
namespace {

constexpr int64_t kStrip = 16;    // query blocks at a time
constexpr int64_t kKeyTile = 64;  // key blocks at a time, for the gradients of keys

template <typename A>
class CoarseBlocks {
 public:
  CoarseBlocks(const PooledInputs& pooled, const BlockList& rows, const Options& o)
      : o_(o),
        B_(pooled.query.size(0)),
        H_(pooled.query.size(1)),
        Hk_(pooled.key.size(1)),
        nq_(pooled.query.size(2)),
        nk_(pooled.key.size(2)),
        D_(pooled.query.size(3)),
        query_(pooled.query),
        key_(pooled.key),
        value_(pooled.value),
        query_count_(pooled.query_count.contiguous()),
        log_count_(log_counts<A>(pooled.key_count)),
        rows_(rows) {}

  // Strips of query blocks.
  int64_t strips() const { return ceil_div(nq_, kStrip); }
  int64_t key_tiles() const { return ceil_div(nk_, kKeyTile); }

  // b_xy of query blocks [x0, x0 + n) and key blocks [y0, y1): -inf where the pair is not coarse.
  void log_weights(int64_t b, int64_t h, int64_t x0, int64_t n, int64_t y0, int64_t y1, A* s,
                   int64_t ld) const {
    const Rows<A> q = query_.head(b, h), k = key_.head(b, h / (H_ / Hk_));
    gemm(Op::none, Op::transpose, n, y1 - y0, D_, static_cast<A>(o_.scale), q.row(x0), q.stride,
         k.row(y0), k.stride, A(0), s, ld);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t x = x0 + r;
      const bool exists = query_count_.template const_data_ptr<int32_t>()[b * nq_ + x] > 0;
      const int64_t past = std::clamp(exists ? past_blocks(o_, nk_, x) : 0, y0, y1);
      A* row = s + r * ld;
      for (int64_t y = y0; y < past; ++y) row[y - y0] += log_count_[b * nk_ + y];
      std::fill(row + (past - y0), row + (y1 - y0), -kInf<A>);
      for (const int32_t y : rows_(b, h, x)) {
        if (y >= y0 && y < y1) row[y - y0] = -kInf<A>;
      }
    }
  }

  void forward(CoarseState& state) const {
    A* mean = state.mean.template mutable_data_ptr<A>();
    A* lse = state.lse.template mutable_data_ptr<A>();
    at::parallel_for(0, B_ * H_ * strips(), 1, [&](int64_t begin, int64_t end) {
      const SerialBlas serial;
      const int64_t ld = ceil_div(nk_, 16) * 16;
      Scratch<A> scratch(kStrip * (ld + 2), 3);
      A* s = scratch.take(kStrip * ld);
      A* top = scratch.take(kStrip);
      A* mass = scratch.take(kStrip);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / strips(), b = head / H_, h = head % H_;
        const int64_t x0 = item % strips() * kStrip, n = std::min(kStrip, nq_ - x0);
        log_weights(b, h, x0, n, 0, nk_, s, ld);
        std::fill_n(top, n, -kInf<A>);
        std::fill_n(mass, n, A(0));
        add_bias_and_max(s, ld, n, nk_, static_cast<const A*>(nullptr), top);
        A* row_lse = lse + head * nq_ + x0;
        for (int64_t r = 0; r < n; ++r) {
          row_lse[r] = top[r];
          if (top[r] == -kInf<A>) top[r] = 0;
        }
        exp_and_sum(s, ld, n, nk_, top, mass);
        for (int64_t r = 0; r < n; ++r) {
          row_lse[r] += std::log(mass[r] == 0 ? A(1) : mass[r]);
          mass[r] = mass[r] == 0 ? A(0) : A(1) / mass[r];
        }
        scale_rows(s, ld, n, nk_, mass);
        const Rows<A> v = value_.head(b, h / (H_ / Hk_));
        gemm(Op::none, Op::none, n, D_, nk_, A(1), s, ld, v.data, v.stride, A(0),
             mean + (head * nq_ + x0) * D_, D_);
      }
    });
  }

  // Weights w_xy = exp(b_xy - M_x) in w and the gradients of L_xy, w_xy (g_x . v_y - e_x), in dl.
  void gradients(int64_t b, int64_t h, int64_t x0, int64_t n, int64_t y0, int64_t y1,
                 const BlockRows& rows, A* w, A* dl, int64_t ld) const {
    const int64_t at = (b * H_ + h) * nq_ + x0;
    log_weights(b, h, x0, n, y0, y1, w, ld);
    exp_shifted(w, ld, n, y1 - y0, static_cast<const A*>(nullptr),
                rows.lse.template const_data_ptr<A>() + at);
    const Rows<A> v = value_.head(b, h / (H_ / Hk_));
    gemm(Op::none, Op::transpose, n, y1 - y0, D_, A(1),
         rows.grad.template const_data_ptr<A>() + at * D_, D_, v.row(y0), v.stride, A(0), dl, ld);
    softmax_grad(w, dl, ld, n, y1 - y0, rows.delta.template const_data_ptr<A>() + at);
  }

  void backward_query(const BlockRows& rows, A* grad) const {
    at::parallel_for(0, B_ * H_ * strips(), 1, [&](int64_t begin, int64_t end) {
      const SerialBlas serial;
      const int64_t ld = ceil_div(nk_, 16) * 16;
      Scratch<A> scratch(2 * kStrip * ld, 2);
      A* w = scratch.take(kStrip * ld);
      A* dl = scratch.take(kStrip * ld);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / strips(), b = head / H_, h = head % H_;
        const int64_t x0 = item % strips() * kStrip, n = std::min(kStrip, nq_ - x0);
        gradients(b, h, x0, n, 0, nk_, rows, w, dl, ld);
        const Rows<A> k = key_.head(b, h / (H_ / Hk_));
        gemm(Op::none, Op::none, n, D_, nk_, static_cast<A>(o_.scale), dl, ld, k.data, k.stride,
             A(0), grad + (head * nq_ + x0) * D_, D_);
      }
    });
  }

  // Each tile of key blocks is summed by one thread, over heads and query blocks in order.
  void backward_key(const BlockRows& rows, A* grad_key, A* grad_value) const {
    const int64_t G = H_ / Hk_;
    const A* g = rows.grad.template const_data_ptr<A>();
    at::parallel_for(0, B_ * Hk_ * key_tiles(), 1, [&](int64_t begin, int64_t end) {
      const SerialBlas serial;
      Scratch<A> scratch(2 * kStrip * kKeyTile, 2);
      A* w = scratch.take(kStrip * kKeyTile);
      A* dl = scratch.take(kStrip * kKeyTile);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / key_tiles(), b = head / Hk_, hk = head % Hk_;
        const int64_t y0 = item % key_tiles() * kKeyTile, y1 = std::min(nk_, y0 + kKeyTile);
        A* dk = grad_key + (head * nk_ + y0) * D_;
        A* dv = grad_value + (head * nk_ + y0) * D_;
        std::fill_n(dk, (y1 - y0) * D_, A(0));
        std::fill_n(dv, (y1 - y0) * D_, A(0));
        for (int64_t h = hk * G; h < (hk + 1) * G; ++h) {
          const Rows<A> q = query_.head(b, h);
          for (int64_t x0 = 0; x0 < nq_; x0 += kStrip) {
            const int64_t n = std::min(kStrip, nq_ - x0);
            gradients(b, h, x0, n, y0, y1, rows, w, dl, kKeyTile);
            gemm(Op::transpose, Op::none, y1 - y0, D_, n, static_cast<A>(o_.scale), dl, kKeyTile,
                 q.row(x0), q.stride, A(1), dk, D_);
            gemm(Op::transpose, Op::none, y1 - y0, D_, n, A(1), w, kKeyTile,
                 g + ((b * H_ + h) * nq_ + x0) * D_, D_, A(1), dv, D_);
          }
        }
      }
    });
  }

 private:
  Options o_;
  int64_t B_, H_, Hk_, nq_, nk_, D_;
  Heads<A> query_, key_, value_;
  Tensor query_count_;
  std::vector<A> log_count_;  // [B, nk]
  Lists rows_;
};

}  // namespace

CoarseState coarse(const PooledInputs& pooled, const BlockList& rows, const Options& o) {
  if (!o.levels.empty()) return coarse_levels(pooled, rows, o);
  const auto sizes = pooled.query.sizes();
  CoarseState state{at::empty(sizes, pooled.query.options()),
                    at::empty(sizes.slice(0, 3), pooled.query.options())};
  AT_DISPATCH_FLOATING_TYPES(pooled.query.scalar_type(), "mra_coarse",
                             [&] { CoarseBlocks<scalar_t>(pooled, rows, o).forward(state); });
  return state;
}

Grads coarse_backward(const PooledInputs& pooled, const BlockList& rows, const BlockList&,
                      const BlockRows& block_rows, const Options& o) {
  if (!o.levels.empty()) return coarse_levels_backward(pooled, rows, block_rows, o);
  const auto options = pooled.query.options();
  Grads grads{at::empty(pooled.query.sizes(), options), at::empty(pooled.key.sizes(), options),
              at::empty(pooled.key.sizes(), options)};
  const BlockRows state{block_rows.lse.contiguous(), block_rows.grad.contiguous(),
                        block_rows.delta.contiguous()};
  AT_DISPATCH_FLOATING_TYPES(pooled.query.scalar_type(), "mra_coarse_backward", [&] {
    const CoarseBlocks<scalar_t> blocks(pooled, rows, o);
    blocks.backward_query(state, grads.query.mutable_data_ptr<scalar_t>());
    blocks.backward_key(state, grads.key.mutable_data_ptr<scalar_t>(),
                        grads.value.mutable_data_ptr<scalar_t>());
  });
  const auto share = [](Tensor& grad, const Tensor& count) {
    grad.div_(count.clamp_min(1).unsqueeze(1).unsqueeze(-1));
  };
  share(grads.query, pooled.query_count);
  share(grads.key, pooled.key_count);
  share(grads.value, pooled.key_count);
  return grads;
}

}  // namespace mra::cpu
