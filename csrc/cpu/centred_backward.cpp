// Gradients of weighted means: order 1 with them, and through their weights (docs/algorithm.md,
// Backward).
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "centred.h"

namespace mra::cpu {
namespace {

template <typename T>
class Backward : CentredHeads<T> {
  using Base = CentredHeads<T>;
  using typename Base::A;

 public:
  Backward(const Inputs& in, const Centred& c, const FineBackward& back, const Options& o)
      : Base(in, c, o), back_(back), grad_out_(back.grad_out) {}

  // delta less gamma_i u_i . dO_i.
  void coarse_delta(const A* delta, A* to) const {
    const A *const share = this->of(back_.share), *const variance = this->of(c_.pooled.variance);
    const int64_t tile = this->query_tile(), size = tile * D_;
    for_parts<A>(B_ * H_, N_, tile, D_, 3 * size,
                 [&](int64_t, int64_t head, int64_t first, int64_t end, A* q) {
                   const int64_t rows = end - first;
                   A *const x = q + size, *const buffer = x + size;
                   this->less_centre(head, first, rows, q);
                   const auto g =
                       load_rows(grad_out_.head(head / H_, head % H_), first, rows, buffer);
                   gemm(Op::none, Op::transpose, rows, D_, D_, s_, g.data, g.ld,
                        this->moments(head / G_, first), D_, A(0), x, D_);
                   for (int64_t r = 0; r < rows; ++r) {
                     const int64_t row = head * N_ + first + r;
                     to[row] = delta[row];
                     if (share[row] == 0) continue;  // such a row may hold anything
                     to[row] -= dot_row(x + r * D_, q + r * D_, D_) / (1 + variance[row] / 4);
                   }
                 });
  }

  // What order 1 makes of the rows.
  struct RowGrads {
    Tensor query;     // [B, H, N, D]: of each query but for the centre's part
    Tensor sums;      // [B, H, chunks, D] of these
    Tensor matrices;  // dC and dSigma of each key head, under causal of its blocks: [-1, 2, D, D]
  };
  RowGrads rows() const {
    const int64_t chunk = this->query_chunk(), chunks = ceil_div(N_, chunk);
    const int64_t most = this->query_tile(), tile = most * D_;
    RowGrads result{at::empty({B_, H_, N_, D_}, options_),
                    at::empty({B_, H_, chunks, D_}, options_),
                    at::empty({B_ * Hk_ * (o_.causal ? nk_ : 1), 2, D_, D_}, options_)};
    const Tensor sums = at::empty({B_ * H_, chunks, D_, 2 * D_}, options_);
    A* const of_chunks = sums.mutable_data_ptr<A>();
    A* const grad_q = result.query.template mutable_data_ptr<A>();
    A* const row_sums = result.sums.template mutable_data_ptr<A>();
    const A *const share = this->of(back_.share), *const variance = this->of(c_.pooled.variance);
    const A* const coarse_sum = this->of(back_.coarse_sum);
    for_parts<A>(
        B_ * H_, N_, chunk, D_, 6 * tile,
        [&](int64_t at, int64_t head, int64_t first_row, int64_t end, A* q) {
          A *const x = q + tile, *const w = x + tile, *const pair = w + tile;
          A *const buffer = pair + 2 * tile, *const row_sum = row_sums + at * D_;
          const A* const matrices = this->moments(head / G_, first_row);
          std::fill_n(row_sum, D_, A(0));
          for (int64_t first = first_row; first < end; first += most) {
            const int64_t rows = std::min(most, end - first);
            this->less_centre(head, first, rows, q);
            const auto g = load_rows(grad_out_.head(head / H_, head % H_), first, rows, buffer);
            gemm(Op::none, Op::transpose, rows, D_, D_, A(1), g.data, g.ld, matrices, D_, A(0), x,
                 D_);
            gemm(Op::none, Op::none, rows, D_, D_, A(1), q, D_, matrices + D_ * D_, D_, A(0), w,
                 D_);
            for (int64_t r = 0; r < rows; ++r) {
              const int64_t row = head * N_ + first + r;
              A *const qr = q + r * D_, *const pr = pair + r * 2 * D_,
                       *const to = grad_q + row * D_;
              if (share[row] == 0) {  // such a row may hold anything
                std::fill_n(qr, D_, A(0));
                std::fill_n(pr, 2 * D_, A(0));
                std::fill_n(to, D_, A(0));
                continue;
              }
              const A *const xr = x + r * D_, *const wr = w + r * D_, *const gr = g.data + r * g.ld;
              const A t = variance[row], gamma = 1 / (1 + t / 4), a = share[row] * gamma * s_;
              // Of t, by the damping and by the factor of the mass.
              const A b = s_ * s_ *
                          (a * dot_row(xr, qr, D_) * gamma * A(-0.25) +
                           (A(0.75) / (1 + A(0.75) * t) - gamma / 4) * coarse_sum[row]);
              for (int64_t d = 0; d < D_; ++d) {
                to[d] = a * xr[d] + 2 * b * wr[d];
                pr[d] = a * gr[d];
                pr[D_ + d] = b * qr[d];
              }
              add_scaled(row_sum, to, A(1), D_);
            }
            gemm(Op::transpose, Op::none, D_, 2 * D_, rows, A(1), q, D_, pair, 2 * D_,
                 A(first > first_row), of_chunks + at * 2 * D_ * D_, 2 * D_);
          }
        });
    combine(of_chunks, chunks, result.matrices.template mutable_data_ptr<A>());
    return result;
  }

  // Adds to the gradients of keys and values, with dC and dSigma, which may be undefined; what the
  // centres get of each tile, [B, Hk, tiles, D].
  Tensor keys(const Tensor& matrices, const Grads& grads) const {
    const int64_t tile = this->key_tile(), size = tile * D_;
    const Tensor sums = at::empty({B_, Hk_, ceil_div(M_, tile), D_}, options_);
    A* const to_centres = sums.mutable_data_ptr<A>();
    const ResultRows<T> grad_k(grads.key), grad_v(grads.value);
    const bool order1 = matrices.defined();
    for_parts<A>(B_ * Hk_, M_, tile, D_, 5 * size + tile + D_,
                 [&](int64_t at, int64_t head, int64_t first, int64_t end, A* k) {
                   const int64_t rows = end - first, b = head / Hk_, h = head % Hk_;
                   A *const v = k + size, *const of_k = v + size, *const of_v = of_k + size;
                   A *const kappa_s = of_v + size, *const through = kappa_s + size;
                   A *const sum = through + tile, *const centre_sum = to_centres + at * D_;
                   this->deviations(key_, c_.pooled.key, head, first, rows, k, D_);
                   this->deviations(value_, c_.pooled.value, head, first, rows, v, D_);
                   A over_n = 1;
                   if (order1) {  // kappa dC, kappa dSigma, nu dC' + 2 kappa dSigma
                     if (!o_.causal) over_n /= this->keys_of(b, 0);
                     const int64_t matrix = o_.causal ? head * nk_ + first / o_.block_k : head;
                     const A* const dc = this->of(matrices) + matrix * 2 * D_ * D_;
                     const auto multiply = [&](const A* x, Op op, const A* by, A beta, A* to) {
                       gemm(Op::none, op, rows, D_, D_, A(1), x, D_, by, D_, beta, to, D_);
                     };
                     multiply(k, Op::none, dc, A(0), of_v);
                     multiply(k, Op::none, dc + D_ * D_, A(0), kappa_s);
                     for (int64_t i = 0; i < rows * D_; ++i) of_k[i] = 2 * kappa_s[i];
                     multiply(v, Op::transpose, dc, A(1), of_k);
                   }
                   through_weights(head, first, rows, k, v, order1 ? of_v : nullptr, kappa_s,
                                   over_n, through);
                   std::fill_n(centre_sum, D_, A(0));
                   for (int64_t r = 0; r < rows; ++r) {
                     const int64_t j = first + r;
                     if (!key_mask_(b, j)) continue;
                     add_scaled(centre_sum, k + r * D_, through[r], D_);
                     const A weight = this->weight_in_sums(head, j) * over_n;
                     const A* const centre =
                         this->centre(head, this->centre_of_block(j / o_.block_k));
                     T* const to = grad_k.at(b, h, j);
                     load_row(to, D_, sum);
                     add_scaled(sum, centre, through[r], D_);
                     if (order1) add_scaled(sum, of_k + r * D_, weight, D_);
                     store_row(sum, D_, to);
                     if (!order1) continue;
                     add_scaled_row(grad_v.at(b, h, j), of_v + r * D_, weight, D_, sum);
                   }
                 });
    return sums;
  }

  // Adds to the gradients of valid queries those of order 1, if any, and what each of them gets of
  // the centres that it is in: from of_rows and of_keys.
  void queries(const RowGrads& of_rows, const Tensor& of_keys, const Grads& grads) const {
    const Tensor each = of_centres(of_rows.sums, of_keys);
    const ResultRows<T> to(grads.query);
    const int64_t tile = this->query_tile();
    for_parts<A>(B_ * H_, N_, tile, D_, D_,
                 [&](int64_t, int64_t head, int64_t first, int64_t end, A* sum) {
                   const A* const centre_part =
                       this->of(each) + (head / G_ * units_ + this->unit_of(first)) * D_;
                   for (int64_t i = first; i < end; ++i) {
                     if (!query_mask_(head / H_, i)) continue;
                     T* const at = to.at(head / H_, head % H_, i);
                     load_row(at, D_, sum);
                     add_scaled(sum, centre_part, A(1), D_);
                     if (of_rows.query.defined()) {
                       add_scaled(sum, this->of(of_rows.query) + (head * N_ + i) * D_, A(1), D_);
                     }
                     store_row(sum, D_, at);
                   }
                 });
  }

 private:
  using Base::B_, Base::c_, Base::centres_, Base::D_, Base::G_, Base::H_, Base::Hk_, Base::key_,
      Base::key_mask_, Base::M_, Base::N_, Base::nk_, Base::o_, Base::options_, Base::query_mask_,
      Base::s_, Base::units_, Base::value_;

  // Sums of chunks of rows, [B * H, chunks, D, 2 D], to dC and dSigma: all of them, or under causal
  // for each block of keys those of the units behind it, each over its number of keys.
  void combine(const A* sums, int64_t chunks, A* to) const {
    const int64_t size = 2 * D_ * D_;
    this->for_matrix_rows(G_ * chunks, [&](int64_t head, int64_t d) {
      std::vector<A> sum(2 * D_, A(0));
      int64_t chunk = chunks - 1;
      for (int64_t y = o_.causal ? nk_ - 1 : 0; y >= 0; --y) {
        for (; chunk >= 0 && (!o_.causal || this->blocks_of(chunk) > y); --chunk) {
          const A factor = o_.causal ? 1 / this->keys_of(head / Hk_, chunk) : A(1);
          for (int64_t g = 0; g < G_; ++g) {
            const A* const part = sums + ((head * G_ + g) * chunks + chunk) * size;
            add_scaled(sum.data(), part + d * 2 * D_, factor, 2 * D_);
          }
        }
        A* const result = to + (o_.causal ? head * nk_ + y : head) * size;
        std::copy_n(sum.data(), D_, result + d * D_);
        std::copy_n(sum.data() + D_, D_, result + (D_ + d) * D_);
      }
    });
  }

  // What the queries of each unit get of the centres they are in, [B * Hk, units, D], as these are
  // means: row_sums [B, H, chunks, D], or undefined, are of what was taken off the queries.
  Tensor of_centres(const Tensor& row_sums, const Tensor& of_keys) const {
    const int64_t tiles = of_keys.size(2);
    const Tensor all = at::zeros({B_ * Hk_, centres_, D_}, options_);
    const Tensor result = at::empty({B_ * Hk_, units_, D_}, options_);
    for (int64_t head = 0; head < B_ * Hk_; ++head) {
      A* const grads = all.mutable_data_ptr<A>() + head * centres_ * D_;
      const int64_t chunks = row_sums.defined() ? row_sums.size(2) : 0;
      for (int64_t i = 0; i < G_ * chunks; ++i) {
        add_scaled(grads + (o_.causal ? i % chunks : 0) * D_,
                   this->of(row_sums) + (head * G_ * chunks + i) * D_, A(-1), D_);
      }
      for (int64_t i = 0; i < tiles; ++i) {  // under causal a tile is a block
        add_scaled(grads + this->centre_of_block(i) * D_,
                   this->of(of_keys) + (head * tiles + i) * D_, A(1), D_);
      }
      std::vector<A> sum(D_, A(0));
      for (int64_t unit = units_ - 1; unit >= 0; --unit) {
        const int64_t centre = o_.causal ? unit + 1 : 0;
        add_scaled(sum.data(), grads + centre * D_, 1 / this->queries_of(head / Hk_, centre), D_);
        std::copy_n(sum.data(), D_, result.mutable_data_ptr<A>() + (head * units_ + unit) * D_);
      }
    }
    return result;
  }

  // Gradients of the logits of a tile's weights times the scale: s pi_j (x_j - the block's mean of
  // x by pi), with
  //   x_j = kappa_j . dk_y + nu_j . dv_y - log pi_j da_y
  //         + c_y / n (kappa_j dC nu_j' + kappa_j dSigma kappa_j')
  // where kappa_c is kappa dC, or null, and kappa_s kappa dSigma.
  void through_weights(int64_t head, int64_t first, int64_t rows, const A* k, const A* v,
                       const A* kappa_c, const A* kappa_s, A over_n, A* to) const {
    const int64_t block = o_.block_k;
    const A* const pooled_k = this->of(back_.pooled_grads);
    const A* const pooled_v = pooled_k + back_.pooled_grads.numel() / 2;
    for (int64_t r0 = 0; r0 < rows; r0 += block) {
      const int64_t of_block = head * nk_ + (first + r0) / block, end = std::min(rows, r0 + block);
      const A *const dk = pooled_k + of_block * D_, *const dv = pooled_v + of_block * D_;
      const A da = this->of(back_.mass_grad)[of_block];
      A all = 0;
      for (int64_t r = r0; r < end; ++r) {
        const A pi = this->weights(head)[first + r];
        to[r] = 0;
        if (pi == 0) continue;  // masked, or without any say
        const A *const kr = k + r * D_, *const vr = v + r * D_;
        to[r] = pi * (dot_row(kr, dk, D_) + dot_row(vr, dv, D_) - std::log(pi) * da);
        if (kappa_c != nullptr) {
          to[r] += this->weight_in_sums(head, first + r) * over_n *
                   (dot_row(kappa_c + r * D_, vr, D_) + dot_row(kappa_s + r * D_, kr, D_));
        }
        all += to[r];
      }
      for (int64_t r = r0; r < end; ++r) {
        to[r] = s_ * (to[r] - this->weights(head)[first + r] * all);
      }
    }
  }

  const FineBackward& back_;
  Heads<T> grad_out_;
};

}  // namespace

void centred_delta(FineBackward& grads, const Tensor& out, const Tensor& grad_lse, const Inputs& in,
                   Centred& c, const BlockList&, const Options& o) {
  grads.delta = delta(grads.grad_out, out, grad_lse);
  grads.coarse_delta = at::empty_like(grads.delta);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, in.query.scalar_type(),
                                  "mra_centred_delta", [&] {
                                    using A = acc_t<scalar_t>;
                                    Backward<scalar_t>(in, c, grads, o)
                                        .coarse_delta(grads.delta.const_data_ptr<A>(),
                                                      grads.coarse_delta.mutable_data_ptr<A>());
                                  });
}

void centred_grads(const Grads& grads, const FineBackward& back, const Inputs& in,
                   const Options& o) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, in.query.scalar_type(), "mra_centred_grads", [&] {
        const Backward<scalar_t> heads(in, *back.centred, back, o);
        typename Backward<scalar_t>::RowGrads of_rows;
        if (has_order1(o)) of_rows = heads.rows();
        heads.queries(of_rows, heads.keys(of_rows.matrices, grads), grads);
      });
}

}  // namespace mra::cpu
