// What every launch of order 1 needs, and how heads are cut for them.
#pragma once

#include <ATen/Context.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "../common/budget.h"
#include "../common/stages.h"
#include "launch.h"
#include "moments.h"
#include "order1.h"
#include "problem.h"
#include "sm90/order1_keys.h"
#include "sm90/order1_rows.h"

namespace mra::cuda {

struct Term {
  static constexpr int64_t kMinSteps = 8;  // steps of a chunk worth a pair of partial sums
  // Rows that a float32 chunk sums: the tensor cores round sums towards zero, which adds up.
  static constexpr int64_t kMaxRows32 = 512;
  static constexpr int64_t kMaxTurns = 8;  // tiles of a warp in the rows and keys kernels

  const Launch& launch;
  const Inputs& in;
  const PooledInputs& pooled;
  const Options& o;
  Tensor key_mean, value_mean;  // [B, Hk, nk, D] float32, rows 16-byte aligned
  Dtype dtype;
  bool tf32;
  int B, H, Hk, N, M, D, dim, nk, unit_causal, block_shift;

  Term(const Launch& launch, const Inputs& in, const PooledInputs& pooled, const Options& o)
      : launch(launch),
        in(in),
        pooled(pooled),
        o(o),
        key_mean(with_aligned_rows(pooled.key)),
        value_mean(with_aligned_rows(pooled.value)),
        dtype(dtype_of(in.query)),
        tf32(at::globalContext().allowTF32CuBLAS()),
        B(to_int(in.query.size(0))),
        H(to_int(in.query.size(1))),
        Hk(to_int(in.key.size(1))),
        N(to_int(in.query.size(2))),
        M(to_int(in.key.size(2))),
        D(to_int(in.query.size(3))),
        dim(to_int(moments_dim(D))),
        nk(to_int(pooled.key.size(2))),
        unit_causal(to_int(std::max(o.block_q, o.block_k))),
        block_shift(log2_of(o.block_k)) {
    to_int(in.query.size(0) * in.query.size(1));
  }

  static int to_int(int64_t x) {
    TORCH_CHECK_NOT_IMPLEMENTED(x <= std::numeric_limits<int>::max() / 2,
                                "mra_attention on CUDA takes lengths below 2^30, got ", x);
    return static_cast<int>(x);
  }
  // A unit has its own matrices: under causal a run of rows, else the whole head.
  int unit(int length) const { return o.causal ? unit_causal : length; }
  int units(int length) const { return static_cast<int>(ceil_div(length, unit(length))); }

  at::TensorOptions acc() const { return in.query.options().dtype(at::kFloat); }
  Tensor empty_matrices(int units) const {
    const auto type = dtype == Dtype::bf16 ? at::kBFloat16 : at::kFloat;
    const auto options = in.query.options().dtype(type);
    return o.causal ? allocate({B, Hk, units, 2, dim, dim}, options)
                    : allocate({B, Hk, 2, dim, dim}, options);
  }

  // Cuts a unit of `rows` rows for each of `group` heads into chunks: one wave of CTAs where the
  // chunks stay long enough.
  void cut(Order1Gram& p) const {
    const int64_t step = order1_step_rows(dtype, dim);
    const int64_t all = ceil_div(std::min(p.unit, p.L), step) * p.group;
    const int64_t heads = int64_t{B} * Hk, slots = order1_gram_slots(dtype, dim, launch.device);
    int64_t chunks = o.causal ? 1 : std::max<int64_t>(1, slots / heads);
    // Many heads: chunks of some 32 steps, so that the last wave is short.
    if (!o.causal && heads > slots / 4) chunks = std::max(chunks, all / 32);
    int64_t steps = std::max(ceil_div(all, chunks), o.causal ? all : std::min(all, kMinSteps));
    if (dtype == Dtype::f32 && !o.causal) steps = std::min(steps, kMaxRows32 / step);
    p.steps = static_cast<int>(steps);
    p.chunks = static_cast<int>(ceil_div(all, steps));
  }

  // Runs gram and, unless one chunk was all, sum. Returns the matrices.
  Tensor matrices(Order1Gram& p, bool backward) const {
    p.dtype = dtype;
    p.tf32 = tf32;
    p.B = B;
    p.heads = Hk;
    p.group = backward ? H / Hk : 1;
    p.L = backward ? N : M;
    p.D = D;
    p.dim = dim;
    p.unit = unit(p.L);
    p.units = units(p.L);
    p.key_count = pooled.key_count.const_data_ptr<int>();
    p.nk = nk;
    p.block_shift = block_shift;
    p.factor = backward ? 2.f : 1.f;  // S is quadratic in the keys
    cut(p);
    const Tensor result = empty_matrices(p.units);
    Tensor sums;
    if (o.causal || p.chunks > 1) {
      sums = allocate({B, Hk, p.units, p.chunks, 2, dim, dim}, acc());
      p.sums = sums.mutable_data_ptr<float>();
    }
    p.matrices = result.mutable_data_ptr();
    launch.check(order1_gram(p, launch.stream));
    if (!sums.defined()) return result;

    sum(p.sums, p.chunks, p.units, backward, result);
    return result;
  }

  // dC and dSigma from rows with the weights a and b, [B, H, N] each, of queries less `centre`,
  // [B, Hk, D] or null.
  Tensor weighted_sums(const Tensor& grad_out, const float* a, const float* b,
                       const float* centre = nullptr) const {
    Order1Gram g{};
    g.weighted = true;
    g.x = in.query.const_data_ptr();
    g.y = grad_out.const_data_ptr();
    g.x_strides = strides_of(in.query);
    g.y_strides = strides_of(grad_out);
    g.x_mean = centre;
    g.weight[0] = a;
    g.weight[1] = b;
    return matrices(g, true);
  }

  void sum(float* sums, int chunks, int units, bool backward, const Tensor& result) const {
    Order1Sum s{};
    s.dtype = dtype;
    s.causal = o.causal;
    s.backward = backward;
    s.B = B;
    s.heads = Hk;
    s.units = units;
    s.chunks = chunks;
    s.dim = dim;
    s.key_count = pooled.key_count.const_data_ptr<int>();
    s.nk = nk;
    s.unit_blocks = static_cast<int>(unit_causal / o.block_k);
    s.sums = sums;
    s.matrices = result.mutable_data_ptr();
    s.factor = backward ? 2.f : 1.f;  // Sigma is quadratic in the keys
    launch.check(order1_sum(s, launch.stream));
  }

  Tensor moments() const {
    if (pooled.moments.defined()) return pooled.moments;
    // Weighted ones that one reading makes come with the means.
    Tensor made;
    if (!pooled.weights.defined()) made = pool_moments(in, o, nullptr, pooled.key_count);
    if (made.defined()) return made;
    Order1Gram p{};
    p.x = in.key.const_data_ptr();
    p.y = in.value.const_data_ptr();
    p.x_strides = strides_of(in.key);
    p.y_strides = strides_of(in.value);
    p.x_mean = key_mean.const_data_ptr<float>();
    p.y_mean = value_mean.const_data_ptr<float>();
    p.mask = mask_of(in.key_mask);
    p.weight[0] = data_of<float>(pooled.weights);
    return matrices(p, false);
  }

  // Parts of a unit for CTAs of up to `warps` warps, so that the device is full and no warp walks
  // too long.
  void fill(Order1Products& p, const Tensor& matrices, int length, int heads, int warps) const {
    p.dtype = dtype;
    p.tf32 = tf32;
    p.B = B;
    p.H = H;
    p.Hk = Hk;
    p.L = length;
    p.D = D;
    p.dim = dim;
    p.unit = unit(length);
    p.units = units(length);
    p.matrices = matrices.const_data_ptr();
    p.warps = static_cast<int>(std::min<int64_t>(warps, ceil_div(p.unit, 16)));
    const int64_t turn = 16 * p.warps, turns = ceil_div(p.unit, turn);
    const int64_t all = int64_t{B} * heads * p.units, slots = 2 * launch.device.sms;
    const int64_t parts =
        std::clamp<int64_t>(std::max(slots / all, ceil_div(turns, kMaxTurns)), 1, turns);
    p.part_rows = static_cast<int>(ceil_div(turns, parts) * turn);
    p.parts = static_cast<int>(ceil_div(p.unit, p.part_rows));
  }

  // share: undefined where the step doesn't read it.
  Order1Rows rows(const Tensor& matrices, const Tensor& share, RowsStep step) const {
    Order1Rows p{};
    fill(p, matrices, N, H, order1_rows_warps(dtype, dim, step, launch.device));
    p.step = step;
    p.scale = static_cast<float>(o.scale);
    p.q = in.query.const_data_ptr();
    p.q_strides = strides_of(in.query);
    p.share = data_of<float>(share);
    return p;
  }
};

// dC and dSigma from a kernel that cuts query heads into chunks: where a key head has several of
// them, it leaves their sums, which are added up behind it.
struct RowMatrices {
  Tensor result, sums;  // sums: undefined for one
  int parts;            // of a key head

  RowMatrices(const Term& term, int chunks)
      : result(term.empty_matrices(1)), parts(term.H / term.Hk * chunks) {
    if (parts > 1) sums = allocate({term.B, term.H, chunks, 2, term.dim, term.dim}, term.acc());
  }
  void add_up(const Term& term) const {
    if (parts > 1) term.sum(sums.mutable_data_ptr<float>(), parts, 1, true, result);
  }
};

// Rows of the backward in one reading of them: writes grad_query, or adds to it, and returns dC and
// dSigma; undefined where no kernel does it. `p` says what else the kernel reads and writes;
// row_sums: with weighted means set to what the centre gets, in parts. held: set to what the kernel
// launched last reads, where that is another one, which adds up sums.
Tensor order1_rows_on_hopper(const Term& term, const Tensor& moments, const Tensor& grad_out,
                             const Tensor& grad_query, sm90::Order1Rows p,
                             Tensor* row_sums = nullptr, Tensor* held = nullptr);

// With weighted means: gradients of the pooled keys and values, [2, B, Hk, nk, D], and of the log
// masses, [B, Hk, nk]; the centre, [B, Hk, D]. All float32.
struct WeightGrads {
  Tensor shares, mass_grad, centre;
  // Set where the gradients through the weights were made too: the centre's, [B, Hk, parts, D].
  Tensor centre_grads{};
  // Else: what keys and values get but for those, [B, Hk, M, D] float32.
  Tensor key_part{}, value_part{};
};

// Launches fine's gradients of the keys and values with those of order 1 inside; false, and nothing
// done, where no kernel makes both.
using ColumnsWithOrder1 = std::function<bool(const sm90::Order1Keys&)>;

// Gradients of the keys and values from dC and dSigma, by `columns` where it is given and can, else
// to grads.key and grads.value or the parts of `through`, which is null unless means are weighted.
// `add`: to what is there.
void order1_key_grads(const Term& term, const Tensor& moment_grads, WeightGrads* through,
                      const Grads& grads, bool add = false, const ColumnsWithOrder1& columns = {});

}  // namespace mra::cuda
