// Stage coarse with levels, for coarse = block: the coarse cells of every resolution, each a pair
// of means, and what they add up to for a block of queries. A row of cells holds few of them.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cells.h"
#include "stages_cpu.h"
#include "tiles.h"

namespace mra::cpu {
namespace {

template <typename A>
class CoarseLevels {
 public:
  CoarseLevels(const PooledInputs& pooled, const BlockList& rows, const Options& o)
      : o_(o),
        B_(pooled.query.size(0)),
        H_(pooled.query.size(1)),
        Hk_(pooled.key.size(1)),
        D_(pooled.query.size(3)),
        query_blocks_(pooled.query.size(2)),
        key_blocks_(pooled.key.size(2)),
        query_(pooled.query),
        key_(pooled.key),
        value_(pooled.value),
        log_count_(log_counts<A>(pooled.key_count)),
        cells_(rows, pooled.key_count, o) {}

  // mean and lse of every row of cells, [B, H, blocks of all resolutions(, D)].
  void rows_forward(A* mean, A* lse) const {
    for (size_t r = 0; r < o_.resolutions.size(); ++r) {
      const Resolution& at = o_.resolutions[r];
      at::parallel_for(0, B_ * H_ * at.nq, grain(64 * D_), [&](int64_t begin, int64_t end) {
        std::vector<int32_t> ids;
        std::vector<A> w;
        for (int64_t item = begin; item < end; ++item) {
          const int64_t head = item / at.nq, x = item % at.nq;
          const int64_t to = head * query_blocks_ + at.first_q + x;
          log_weights(head / H_, head % H_, r, x, ids, w);
          const Rows<A> v = value_.head(head / H_, head % H_ / (H_ / Hk_));
          A top = -kInf<A>, sum = 0;
          for (const A b : w) top = std::max(top, b);
          std::fill_n(mean + to * D_, D_, A(0));
          for (size_t t = 0; t < ids.size(); ++t) {
            const A p = exp_one(w[t] - top);
            sum += p;
            add_scaled(mean + to * D_, v.row(ids[t]), p, D_);
          }
          lse[to] = ids.empty() ? -kInf<A> : top + std::log(sum);
          for (int64_t d = 0; d < D_ && !ids.empty(); ++d) mean[to * D_ + d] /= sum;
        }
      });
    }
  }

  // The state of every block of block_q queries, from those of the rows that it lies in.
  void combine(const A* mean, const A* lse, CoarseState& state) const {
    const int64_t R = static_cast<int64_t>(o_.resolutions.size()), nq = o_.resolutions[0].nq;
    A* to_mean = state.mean.template mutable_data_ptr<A>();
    A* to_lse = state.lse.template mutable_data_ptr<A>();
    A* parts = state.parts.template mutable_data_ptr<A>();
    at::parallel_for(0, B_ * H_ * nq, grain(R * D_), [&](int64_t begin, int64_t end) {
      std::vector<int64_t> rows(R);
      for (int64_t item = begin; item < end; ++item) {
        A top = -kInf<A>, sum = 0;
        for (int64_t r = 0; r < R; ++r) {
          const Resolution& at = o_.resolutions[r];
          const int64_t x = item % nq / (at.block_q / o_.block_q);
          rows[r] = item / nq * query_blocks_ + at.first_q + x;
          top = std::max(top, lse[rows[r]]);
        }
        const A shift = top == -kInf<A> ? A(0) : top;
        for (int64_t r = 0; r < R; ++r) sum += exp_one(lse[rows[r]] - shift);
        to_lse[item] = top + std::log(sum == 0 ? A(1) : sum);
        std::fill_n(to_mean + item * D_, D_, A(0));
        for (int64_t r = 0; r < R; ++r) {
          const A part = sum == 0 ? A(0) : exp_one(lse[rows[r]] - shift) / sum;
          parts[item * R + r] = part;
          add_scaled(to_mean + item * D_, mean + rows[r] * D_, part, D_);
        }
      }
    });
  }

  // Gradients of all means. Those of a head's keys and values of one resolution are summed by one
  // thread, in order.
  void backward(const BlockRows& rows, A* grad_query, A* grad_key, A* grad_value) const {
    const int64_t R = static_cast<int64_t>(o_.resolutions.size()), G = H_ / Hk_;
    at::parallel_for(0, B_ * Hk_ * R, 1, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> ids;
      std::vector<A> w;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / R, b = head / Hk_, hk = head % Hk_;
        for (int64_t h = hk * G; h < (hk + 1) * G; ++h) {
          for (int64_t x = 0; x < o_.resolutions[item % R].nq; ++x) {
            row_backward(b, h, item % R, x, rows, ids, w, grad_query,
                         grad_key + head * key_blocks_ * D_, grad_value + head * key_blocks_ * D_);
          }
        }
      }
    });
  }

 private:
  // b_xy of the coarse cells of a row.
  void log_weights(int64_t b, int64_t h, size_t r, int64_t x, std::vector<int32_t>& ids,
                   std::vector<A>& w) const {
    ids.clear();
    w.clear();
    cells_.coarse(b, h, r, x, ids);
    const A* q = query_.head(b, h).row(o_.resolutions[r].first_q + x);
    const Rows<A> k = key_.head(b, h / (H_ / Hk_));
    for (const int32_t id : ids) {
      w.push_back(static_cast<A>(o_.scale) * dot_row(q, k.row(id), D_) +
                  log_count_[b * key_blocks_ + id]);
    }
  }

  void row_backward(int64_t b, int64_t h, size_t r, int64_t x, const BlockRows& rows,
                    std::vector<int32_t>& ids, std::vector<A>& w, A* grad_query, A* grad_key,
                    A* grad_value) const {
    const int64_t at = (b * H_ + h) * query_blocks_ + o_.resolutions[r].first_q + x;
    const A lse = rows.lse.template const_data_ptr<A>()[at];
    if (lse == kInf<A>) return;  // no row has weight
    const A* g = rows.grad.template const_data_ptr<A>() + at * D_;
    const A e = rows.delta.template const_data_ptr<A>()[at], s = static_cast<A>(o_.scale);
    const A* q = query_.head(b, h).row(o_.resolutions[r].first_q + x);
    const Rows<A> k = key_.head(b, h / (H_ / Hk_)), v = value_.head(b, h / (H_ / Hk_));
    log_weights(b, h, r, x, ids, w);
    for (size_t t = 0; t < ids.size(); ++t) {
      const A p = exp_one(w[t] - lse), dl = s * p * (dot_row(g, v.row(ids[t]), D_) - e);
      add_scaled(grad_query + at * D_, k.row(ids[t]), dl, D_);
      add_scaled(grad_key + ids[t] * D_, q, dl, D_);
      add_scaled(grad_value + ids[t] * D_, g, p, D_);
    }
  }

  Options o_;
  int64_t B_, H_, Hk_, D_, query_blocks_, key_blocks_;
  Heads<A> query_, key_, value_;
  std::vector<A> log_count_;  // [B, key blocks of all resolutions]
  Cells cells_;
};

}  // namespace

CoarseState coarse_levels(const PooledInputs& pooled, const BlockList& rows, const Options& o) {
  const int64_t B = pooled.query.size(0), H = pooled.query.size(1), D = pooled.query.size(3);
  const int64_t nq = o.resolutions[0].nq, R = static_cast<int64_t>(o.resolutions.size());
  const auto options = pooled.query.options();
  const Tensor mean = at::empty(pooled.query.sizes(), options);
  const Tensor lse = at::empty(pooled.query.sizes().slice(0, 3), options);
  CoarseState state{at::empty({B, H, nq, D}, options), at::empty({B, H, nq}, options),
                    at::empty({B, H, nq, R}, options)};
  AT_DISPATCH_FLOATING_TYPES(pooled.query.scalar_type(), "mra_coarse_levels", [&] {
    const CoarseLevels<scalar_t> levels(pooled, rows, o);
    levels.rows_forward(mean.mutable_data_ptr<scalar_t>(), lse.mutable_data_ptr<scalar_t>());
    levels.combine(mean.const_data_ptr<scalar_t>(), lse.const_data_ptr<scalar_t>(), state);
  });
  return state;
}

Grads coarse_levels_backward(const PooledInputs& pooled, const BlockList& rows,
                             const BlockRows& block_rows, const Options& o) {
  const BlockRows state{block_rows.lse.contiguous(), block_rows.grad.contiguous(),
                        block_rows.delta.contiguous()};
  const Tensor query = at::zeros(pooled.query.sizes(), pooled.query.options());
  const Tensor key = at::zeros(pooled.key.sizes(), pooled.key.options());
  const Tensor value = at::zeros(pooled.key.sizes(), pooled.key.options());
  AT_DISPATCH_FLOATING_TYPES(pooled.query.scalar_type(), "mra_coarse_levels_backward", [&] {
    CoarseLevels<scalar_t>(pooled, rows, o)
        .backward(state, query.mutable_data_ptr<scalar_t>(), key.mutable_data_ptr<scalar_t>(),
                  value.mutable_data_ptr<scalar_t>());
  });
  return {pool_levels_backward(query, pooled.query_count, o, true),
          pool_levels_backward(key, pooled.key_count, o, false),
          pool_levels_backward(value, pooled.key_count, o, false)};
}

}  // namespace mra::cpu
