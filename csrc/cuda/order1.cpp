// Stages order1 and order1_backward on CUDA: allocate and launch order1_*.cu.
#include "order1.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/budget.h"
#include "../common/stages.h"
#include "launch.h"
#include "moments.h"
#include "order1_levels.h"
#include "problem.h"
#include "sm90/moments.h"
#include "sm90/order1_keys.h"
#include "sm90/order1_rows.h"

namespace mra::cuda {
namespace {

constexpr int64_t kMinSteps = 8;  // steps of a chunk worth a pair of partial sums
// Rows that a float32 chunk sums: the tensor cores round sums towards zero, which adds up.
constexpr int64_t kMaxRows32 = 512;
constexpr int64_t kMaxTurns = 8;  // tiles of a warp in the rows and keys kernels

// Shapes that every launch needs, and how a head is cut.
struct Term {
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
    return o.causal ? at::empty({B, Hk, units, 2, dim, dim}, options)
                    : at::empty({B, Hk, 2, dim, dim}, options);
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
      sums = at::empty({B, Hk, p.units, p.chunks, 2, dim, dim}, acc());
      p.sums = sums.mutable_data_ptr<float>();
    }
    p.matrices = result.mutable_data_ptr();
    launch.check(order1_gram(p, launch.stream));
    if (!sums.defined()) return result;

    sum(p.sums, p.chunks, p.units, backward, result);
    return result;
  }

  void sum(const float* sums, int chunks, int units, bool backward, const Tensor& result) const {
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
    if (const Tensor made = pool_moments(in, o, nullptr, pooled.key_count); made.defined()) {
      return made;
    }
    Order1Gram p{};
    p.x = in.key.const_data_ptr();
    p.y = in.value.const_data_ptr();
    p.x_strides = strides_of(in.key);
    p.y_strides = strides_of(in.value);
    p.x_mean = key_mean.const_data_ptr<float>();
    p.y_mean = value_mean.const_data_ptr<float>();
    p.mask = mask_of(in.key_mask);
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

  Order1Rows rows(const Tensor& matrices, const Tensor& share, bool backward) const {
    Order1Rows p{};
    fill(p, matrices, N, H, order1_rows_warps(dtype, dim, backward, launch.device));
    p.backward = backward;
    p.scale = static_cast<float>(o.scale);
    p.q = in.query.const_data_ptr();
    p.q_strides = strides_of(in.query);
    p.share = share.const_data_ptr<float>();
    return p;
  }
};

}  // namespace

Tensor order1_moments(const Inputs& in, const PooledInputs& pooled, const Options& o) {
  const Launch launch(in.query);
  return Term(launch, in, pooled, o).moments();
}

bool order1_at_once(FineResult& result, const Inputs& in, const PooledInputs& pooled,
                    const std::vector<Tensor>& moments, const Options& o) {
  const Launch launch(in.query);
  const Term term(launch, in, pooled, o);
  const Tensor all = at::stack(moments);
  Order1Rows p = term.rows(all, result.share, false);
  p.count = static_cast<int>(moments.size());
  if (p.count > order1_rows_most(term.dtype, term.dim, p.warps, launch.device)) return false;
  p.next_matrices = all.stride(0);
  p.out = result.out.mutable_data_ptr();
  p.out_strides = strides_of(result.out);
  launch.check(order1_rows(p, launch.stream));
  return true;
}

void order1(FineResult& result, const Inputs& in, PooledInputs& pooled, const Options& o) {
  if (!o.levels.empty()) return order1_levels(result, in, pooled, o);
  const Launch launch(in.query);
  const Term term(launch, in, pooled, o);
  const Tensor moments = term.moments();
  Order1Rows p = term.rows(moments, result.share, false);
  p.out = result.out.mutable_data_ptr();
  p.out_strides = strides_of(result.out);
  launch.check(order1_rows(p, launch.stream));
  if (keeps_moments(o)) pooled.moments = moments;
}

namespace {

// Rows of the backward on the generic kernels: fills grads.query and grads.coarse_delta, returns dC
// and dSigma.
Tensor backward_rows(const Term& term, const Tensor& moments, const Tensor& grad_out,
                     const Tensor& share, const Tensor& delta, const Order1Grads& grads, bool add) {
  const int64_t B = term.B, H = term.H, N = term.N;
  const Tensor weights = at::empty({2, B, H, N}, term.acc());
  float* weight = weights.mutable_data_ptr<float>();
  Order1Rows p = term.rows(moments, share, true);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_strides = strides_of(grad_out);
  p.delta = delta.const_data_ptr<float>();
  p.coarse_delta = grads.coarse_delta.mutable_data_ptr<float>();
  p.weight_c = weight;
  p.weight_s = weight + B * H * N;
  p.grad_q = grads.query.mutable_data_ptr();
  p.grad_q_strides = strides_of(grads.query);
  p.add = add;
  term.launch.check(order1_rows(p, term.launch.stream));

  Order1Gram g{};
  g.weighted = true;
  g.x = term.in.query.const_data_ptr();
  g.y = grad_out.const_data_ptr();
  g.x_strides = strides_of(term.in.query);
  g.y_strides = strides_of(grad_out);
  g.weight[0] = weight;
  g.weight[1] = weight + B * H * N;
  return term.matrices(g, true);
}

// grads.key and grads.value; false where the kernel doesn't do it.
bool keys_on_hopper(const Term& term, const Tensor& moment_grads, const Order1Grads& grads) {
#ifdef MRA_SM90A
  if (!order1_on_hopper(term.in.key, term.o, term.launch) || term.o.block_k > 64) return false;
  const Device& device = term.launch.device;
  sm90::Order1Keys p{};
  p.k = term.in.key.const_data_ptr();
  p.v = term.in.value.const_data_ptr();
  p.k_strides = strides_of(term.in.key);
  p.v_strides = strides_of(term.in.value);
  p.mask = mask_of(term.in.key_mask);
  p.moment_grads = moment_grads.const_data_ptr();
  p.B = term.B;
  p.Hk = term.Hk;
  p.M = term.M;
  p.D = term.D;
  p.log2_block_k = term.block_shift;
  p.chunks = sm90::tile_chunks(p.B * p.Hk, p.M, term.dim, device);
  p.grad_k = grads.key.mutable_data_ptr();
  p.grad_v = grads.value.mutable_data_ptr();
  p.grad_k_strides = strides_of(grads.key);
  p.grad_v_strides = strides_of(grads.value);
  const cudaError_t error = term.dim == 64
                                ? sm90::launch_order1_keys<64>(p, device, term.launch.stream)
                                : sm90::launch_order1_keys<128>(p, device, term.launch.stream);
  if (error == cudaErrorNotSupported) return false;
  term.launch.check(error);
  return true;
#else
  return false;
#endif
}

// backward_rows in one reading of the rows, or undefined where no kernel does it.
Tensor backward_rows_on_hopper(const Term& term, const Tensor& moments, const Tensor& grad_out,
                               const Tensor& share, const Tensor& delta, const Order1Grads& grads,
                               bool add) {
#ifdef MRA_SM90A
  if (!order1_on_hopper(term.in.key, term.o, term.launch)) return {};
  const Device& device = term.launch.device;
  sm90::Order1Rows p{};
  p.q = term.in.query.const_data_ptr();
  p.grad_out = grad_out.const_data_ptr();
  p.q_strides = strides_of(term.in.query);
  p.grad_out_strides = strides_of(grad_out);
  p.moments = moments.const_data_ptr();
  p.share = share.const_data_ptr<float>();
  p.delta = delta.const_data_ptr<float>();
  p.B = term.B;
  p.H = term.H;
  p.Hk = term.Hk;
  p.N = term.N;
  p.D = term.D;
  p.scale = static_cast<float>(term.o.scale);
  p.chunks = sm90::tile_chunks(p.B * p.H, p.N, term.dim, device);
  p.coarse_delta = grads.coarse_delta.mutable_data_ptr<float>();
  p.grad_q = grads.query.mutable_data_ptr();
  p.grad_q_strides = strides_of(grads.query);
  p.add = add;
  const Tensor sums = at::empty({p.B, p.H, p.chunks, 2, term.dim, term.dim}, term.acc());
  p.sums = sums.mutable_data_ptr<float>();
  const cudaError_t error = term.dim == 64
                                ? sm90::launch_order1_rows<64>(p, device, term.launch.stream)
                                : sm90::launch_order1_rows<128>(p, device, term.launch.stream);
  if (error == cudaErrorNotSupported) return {};
  term.launch.check(error);
  const Tensor result = term.empty_matrices(1);
  term.sum(p.sums, p.H / p.Hk * p.chunks, 1, true, result);
  return result;
#else
  return {};
#endif
}

}  // namespace

Tensor order1_grad_rows(const Tensor& grad_out_in, const Tensor& share, const Tensor& delta,
                        const Inputs& in, const PooledInputs& pooled, const Options& o,
                        const Order1Grads& grads, bool add) {
  const Launch launch(in.query);
  const Term term(launch, in, pooled, o);
  const Tensor grad_out = with_aligned_rows(grad_out_in), moments = term.moments();
  const Tensor moment_grads =
      backward_rows_on_hopper(term, moments, grad_out, share, delta, grads, add);
  if (moment_grads.defined()) return moment_grads;
  return backward_rows(term, moments, grad_out, share, delta, grads, add);
}

void order1_grad_keys(const Tensor& moment_grads, const Inputs& in, const PooledInputs& pooled,
                      const Options& o, const Order1Grads& grads, bool add) {
  const Launch launch(in.query);
  const Term term(launch, in, pooled, o);
  if (!add && keys_on_hopper(term, moment_grads, grads)) return;
  Order1Keys p{};
  term.fill(p, moment_grads, term.M, term.Hk,
            order1_keys_warps(term.dtype, term.dim, launch.device));
  p.k = in.key.const_data_ptr();
  p.v = in.value.const_data_ptr();
  p.k_strides = strides_of(in.key);
  p.v_strides = strides_of(in.value);
  p.k_mean = term.key_mean.const_data_ptr<float>();
  p.v_mean = term.value_mean.const_data_ptr<float>();
  p.mask = mask_of(term.in.key_mask);
  p.nk = term.nk;
  p.block_shift = term.block_shift;
  p.grad_k = grads.key.mutable_data_ptr();
  p.grad_v = grads.value.mutable_data_ptr();
  p.grad_k_strides = strides_of(grads.key);
  p.grad_v_strides = strides_of(grads.value);
  p.add = add;
  launch.check(order1_keys(p, launch.stream));
}

Order1Grads order1_backward(const Tensor& grad_out, const Tensor& share, const Tensor& delta,
                            const Inputs& in, const PooledInputs& pooled, const Options& o) {
  if (!o.levels.empty()) {
    return order1_levels_backward(grad_out, share, delta, in, pooled, o);
  }
  const Launch launch(in.query);
  const Order1Grads grads{at::empty_like(delta), empty_heads_last(in.query),
                          empty_heads_last(in.key), empty_heads_last(in.value)};
  const Tensor moment_grads = order1_grad_rows(grad_out, share, delta, in, pooled, o, grads, false);
  order1_grad_keys(moment_grads, in, pooled, o, grads, false);
  return grads;
}

}  // namespace mra::cuda
