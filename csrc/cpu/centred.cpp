// pool = centred and sampled: means of blocks that weigh keys as the queries do, and their order 1.
// Moments are made again for the backward pass, in acc.
#include "centred.h"

#include <ATen/ops/empty_like.h>

#include <cmath>
#include <limits>

namespace mra::cpu {
namespace {

template <typename T>
class Forward : CentredHeads<T> {
  using Base = CentredHeads<T>;
  using typename Base::A;
  static constexpr A kMinusInf = -std::numeric_limits<A>::infinity();

 public:
  Forward(const Inputs& in, const Centred& c, const Options& o) : Base(in, c, o) {}

  // Mean valid queries of each group, from the means of blocks and the counts of their rows.
  void make_centres(const Pooled& query, A* to) const {
    const A* const means = this->of(query.mean);
    const int32_t* const count = query.count.const_data_ptr<int32_t>();
    std::vector<A> sum(D_);
    for (int64_t head = 0; head < B_ * Hk_; ++head) {
      std::fill(sum.begin(), sum.end(), A(0));
      int64_t x = 0;
      for (int64_t i = 0; i < centres_; ++i, to += D_) {
        for (; x < (o_.causal ? i : nq_); ++x) {
          const auto rows = static_cast<A>(count[head / Hk_ * nq_ + x]);
          for (int64_t g = 0; g < G_; ++g) {
            add_scaled(sum.data(), means + ((head * G_ + g) * nq_ + x) * D_, rows, D_);
          }
        }
        const A n = this->queries_of(head / Hk_, i);
        for (int64_t d = 0; d < D_; ++d) to[d] = sum[d] / n;
      }
    }
  }

  // Weights within each block, from `given` logarithms [B, Hk, nk * block] or, where it is null,
  // the logits of the block's centre; their entropy; and, where asked for, what a plan adds to the
  // scores of the block: a quarter of the log mass of its keys for the centre, less half the mean
  // of their logits.
  void weigh(const A* given, A* weights, A* mass, A* bias) const {
    const int64_t block = o_.block_k;
    for_parts<A>(B_ * Hk_, M_, this->key_tile(), D_, D_,
                 [&](int64_t, int64_t head, int64_t first, int64_t end, A* buffer) {
                   for (int64_t y = first / block; y * block < end; ++y) {
                     const int64_t at = head * nk_ + y;
                     A* const w = weights + at * block;
                     const Logits of_centre = logits(head, y, w, buffer);
                     Softmax made = softmax(of_centre.count > 0, w);
                     if (bias != nullptr) {
                       const auto count = static_cast<A>(std::max<int64_t>(1, of_centre.count));
                       bias[at] = made.log_sum / 4 - of_centre.sum / (2 * count);
                     }
                     if (given != nullptr) {
                       std::copy_n(given + at * block, block, w);
                       made = softmax(of_centre.count > 0, w);
                     }
                     mass[at] = made.entropy;
                   }
                 });
  }

  // Means of keys and values.
  void make_means(A* key, A* value) const {
    const int64_t block = o_.block_k;
    for_parts<A>(B_ * Hk_, M_, this->key_tile(), D_, D_,
                 [&](int64_t, int64_t head, int64_t first, int64_t end, A* buffer) {
                   const int64_t b = head / Hk_;
                   const A* const weights = this->weights(head);
                   const auto add = [&](A* to, const Heads<T>& x, int64_t j) {
                     add_scaled(to, load_rows(x.head(b, head % Hk_), j, 1, buffer).data, weights[j],
                                D_);
                   };
                   for (int64_t y = first / block; y * block < end; ++y) {
                     const int64_t at = (head * nk_ + y) * D_;
                     std::fill_n(key + at, D_, A(0));
                     std::fill_n(value + at, D_, A(0));
                     for (int64_t j = y * block; j < std::min(M_, (y + 1) * block); ++j) {
                       if (!key_mask_(b, j)) continue;
                       add(key + at, key_, j);
                       add(value + at, value_, j);
                     }
                   }
                 });
  }

  // C and Sigma of each unit.
  void make_moments(A* to) const {
    const int64_t tile = this->key_tile(), chunk = this->key_chunk(), chunks = ceil_div(M_, chunk);
    const Tensor sums = at::empty({B_ * Hk_, chunks, D_, 2 * D_}, options_);
    A* const of_chunks = sums.mutable_data_ptr<A>();
    for_parts<A>(B_ * Hk_, M_, chunk, D_, 3 * tile * D_,
                 [&](int64_t at, int64_t head, int64_t first_row, int64_t end, A* pair) {
                   A* const left = pair + 2 * tile * D_;
                   for (int64_t first = first_row; first < end; first += tile) {
                     const int64_t rows = std::min(tile, end - first);
                     this->deviations(value_, c_.pooled.value, head, first, rows, pair, 2 * D_);
                     this->deviations(key_, c_.pooled.key, head, first, rows, pair + D_, 2 * D_);
                     for (int64_t r = 0; r < rows; ++r) {
                       const A weight = this->weight_in_sums(head, first + r);
                       const A* const kappa = pair + r * 2 * D_ + D_;
                       for (int64_t d = 0; d < D_; ++d) left[r * D_ + d] = weight * kappa[d];
                     }
                     gemm(Op::transpose, Op::none, D_, 2 * D_, rows, A(1), left, D_, pair, 2 * D_,
                          A(first > first_row), of_chunks + at * 2 * D_ * D_, 2 * D_);
                   }
                 });
    // A chunk is a block under causal, where a unit has those before it.
    this->for_matrix_rows(chunks + units_, [&](int64_t head, int64_t d) {
      const int64_t size = 2 * D_ * D_;
      std::vector<A> sum(2 * D_, A(0));
      int64_t chunk = 0;
      for (int64_t unit = 0; unit < units_; ++unit) {
        for (; chunk < (o_.causal ? this->blocks_of(unit) : chunks); ++chunk) {
          add_scaled(sum.data(), of_chunks + (head * chunks + chunk) * size + d * 2 * D_, A(1),
                     2 * D_);
        }
        A* const result = to + (head * units_ + unit) * size;
        const A n = this->keys_of(head / Hk_, unit);
        for (int64_t e = 0; e < D_; ++e) {
          result[d * D_ + e] = sum[e] / n;
          result[(D_ + d) * D_ + e] = sum[D_ + e] / n;
        }
      }
    });
  }

  // t_i, and what it adds to the logits of a row's pooled keys: log(1 + gamma t / 2), for any t.
  void make_variances(A* variance, A* row_bias) const {
    const int64_t tile = this->query_tile();
    for_parts<A>(B_ * H_, N_, tile, D_, 2 * tile * D_,
                 [&](int64_t, int64_t head, int64_t first, int64_t end, A* q) {
                   const int64_t rows = end - first;
                   A* const w = q + tile * D_;
                   this->less_centre(head, first, rows, q);
                   gemm(Op::none, Op::none, rows, D_, D_, A(1), q, D_,
                        this->moments(head / G_, first) + D_ * D_, D_, A(0), w, D_);
                   for (int64_t r = 0; r < rows; ++r) {
                     const A t = s_ * s_ * dot_row(w + r * D_, q + r * D_, D_);
                     variance[head * N_ + first + r] = t;
                     row_bias[head * N_ + first + r] = std::log(3 - 2 / (1 + t / 4));
                   }
                 });
  }

  void add_term(const A* share, const A* variance, const Tensor& out) const {
    const ResultRows<T> to(out);
    const int64_t tile = this->query_tile();
    for_parts<A>(B_ * H_, N_, tile, D_, (2 * tile + 1) * D_,
                 [&](int64_t, int64_t head, int64_t first, int64_t end, A* q) {
                   const int64_t rows = end - first;
                   A *const u = q + tile * D_, *const sum = u + tile * D_;
                   this->less_centre(head, first, rows, q);
                   gemm(Op::none, Op::none, rows, D_, D_, s_, q, D_,
                        this->moments(head / G_, first), D_, A(0), u, D_);
                   for (int64_t r = 0; r < rows; ++r) {
                     const int64_t row = head * N_ + first + r;
                     if (share[row] == 0) continue;  // such a row may hold anything
                     T* const at = to.at(head / H_, head % H_, first + r);
                     add_scaled_row(at, u + r * D_, share[row] / (1 + variance[row] / 4), D_, sum);
                   }
                 });
  }

 private:
  using Base::B_, Base::c_, Base::centres_, Base::D_, Base::G_, Base::H_, Base::Hk_, Base::key_,
      Base::key_mask_, Base::M_, Base::N_, Base::nk_, Base::nq_, Base::o_, Base::options_, Base::s_,
      Base::units_, Base::value_;

  struct Logits {
    A sum = 0;  // of valid keys
    int64_t count = 0;
  };

  // Of the keys of block y, to w; -inf for what is no key.
  Logits logits(int64_t head, int64_t y, A* w, A* buffer) const {
    const int64_t b = head / Hk_;
    const Rows<T> keys = key_.head(b, head % Hk_);
    const A* const centre = this->centre(head, this->centre_of_block(y));
    Logits l;
    for (int64_t i = 0; i < o_.block_k; ++i) {
      const int64_t j = y * o_.block_k + i;
      w[i] = kMinusInf;
      if (j >= M_ || !key_mask_(b, j)) continue;
      w[i] = s_ * dot_row(load_rows(keys, j, 1, buffer).data, centre, D_);
      l.sum += w[i];
      ++l.count;
    }
    return l;
  }

  struct Softmax {
    A log_sum = 0;  // of the exponentials
    A entropy = kMinusInf;
  };

  // Logarithms -> weights; zeros where there is no key.
  Softmax softmax(bool any, A* w) const {
    const int64_t block = o_.block_k;
    if (!any) {
      std::fill_n(w, block, A(0));
      return {};
    }
    const A top = *std::max_element(w, w + block);
    A sum = 0, logs = 0;
    for (int64_t i = 0; i < block; ++i) {
      const A log = w[i] - top;
      w[i] = exp_one(log);
      sum += w[i];
      if (w[i] > 0) logs += w[i] * log;
    }
    for (int64_t i = 0; i < block; ++i) w[i] /= sum;
    const A log_sum = std::log(sum);
    return {top + log_sum, log_sum - logs / sum};
  }
};

}  // namespace

Centred weigh_keys(const Inputs& in, PooledInputs& plain, bool bias, const Options& o) {
  const int64_t B = in.query.size(0), Hk = in.key.size(1), D = in.query.size(3);
  const int64_t nq = plain.query_count.size(1), nk = plain.key_count.size(1);
  const auto options = in.query.options().dtype(acc_type(in.query.scalar_type()));
  Centred c;
  c.centre = o.causal ? at::empty({B, Hk, nq + 1, D}, options) : at::empty({B, Hk, D}, options);
  c.pooled.query_count = plain.query_count;
  c.pooled.key_count = plain.key_count;
  c.pooled.weights = at::empty({B, Hk, nk * o.block_k}, options);
  c.pooled.mass = at::empty({B, Hk, nk}, options);
  if (bias) c.key_bias = at::empty({B, Hk, nk}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, in.query.scalar_type(), "mra_weigh_keys", [&] {
        using A = acc_t<scalar_t>;
        const auto data = [](const Tensor& x) {
          return x.defined() ? x.mutable_data_ptr<A>() : nullptr;
        };
        const Forward<scalar_t> heads(in, c, o);
        heads.make_centres({plain.query, plain.query_count}, data(c.centre));
        Tensor given;
        if (o.pool == Pool::sampled) given = sampled_log_weights(in, c.centre, o);
        heads.weigh(data(given), data(c.pooled.weights), data(c.pooled.mass), data(c.key_bias));
      });
  return c;
}

void centre(Centred& c, const Inputs& in, bool, const Options& o) {
  const int64_t B = in.query.size(0), H = in.query.size(1), N = in.query.size(2);
  const int64_t Hk = in.key.size(1), D = in.query.size(3), nk = c.pooled.key_count.size(1);
  const auto options = c.centre.options();
  const bool means = !c.pooled.key.defined();
  if (means) {
    c.pooled.key = at::empty({B, Hk, nk, D}, options);
    c.pooled.value = at::empty_like(c.pooled.key);
  }
  if (has_order1(o)) {
    c.moments = o.causal ? at::empty({B, Hk, ceil_div(N, o.block_q), 2, D, D}, options)
                         : at::empty({B, Hk, 2, D, D}, options);
    c.pooled.variance = at::empty({B, H, N}, options);
    c.pooled.row_bias = at::empty({B, H, N}, options);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, in.query.scalar_type(), "mra_centre", [&] {
        using A = acc_t<scalar_t>;
        const auto data = [](const Tensor& x) { return x.mutable_data_ptr<A>(); };
        const Forward<scalar_t> heads(in, c, o);
        if (means) heads.make_means(data(c.pooled.key), data(c.pooled.value));
        if (!has_order1(o)) return;
        heads.make_moments(data(c.moments));
        heads.make_variances(data(c.pooled.variance), data(c.pooled.row_bias));
      });
}

void centred_term(FineResult& result, const Inputs& in, const Centred& c, const Options& o) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, in.query.scalar_type(), "mra_centred_term", [&] {
        using A = acc_t<scalar_t>;
        Forward<scalar_t>(in, c, o).add_term(result.share.const_data_ptr<A>(),
                                             c.pooled.variance.const_data_ptr<A>(), result.out);
      });
}

}  // namespace mra::cpu
