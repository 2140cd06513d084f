#include "order1.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

namespace mra {
namespace {

// Rows summed by one matrix product of a long Gram matrix; the rest becomes batch, so that a few
// long heads still fill the device.
constexpr int64_t kGramRows = 2048;

c10::ScalarType acc_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// dtype of the N x D operands: half types stay as they are where the device has matrix products
// that take them and sum in float32; elsewhere they are widened.
c10::ScalarType work_dtype(const Tensor& x) {
  return x.is_cuda() ? x.scalar_type() : acc_dtype(x);
}

// A unit is a run of rows with the same C and S: without causal the whole head, with causal as many
// rows as the larger block. Units tile queries and keys alike, since causal has N == M.
int64_t unit_rows(const Options& o, int64_t length) {
  return o.causal ? std::max(o.block_q, o.block_k) : length;
}

// [B, H, L, ...] -> [B, H, units, unit, ...], zeros behind the end.
Tensor to_units(const Tensor& x, int64_t unit) {
  const int64_t tail = (unit - x.size(2) % unit) % unit;
  if (tail == 0) return x.unflatten(2, {-1, unit});
  std::vector<int64_t> padding(2 * (x.dim() - 2), 0);
  padding.back() = tail;
  return at::constant_pad_nd(x, padding).unflatten(2, {-1, unit});
}

Tensor from_units(const Tensor& x, int64_t length) { return x.flatten(2, 3).narrow(2, 0, length); }

// a [..., L, m], b [..., L, n] -> a^T b [..., m, n] acc.
Tensor gram_once(const Tensor& a, const Tensor& b) {
  std::vector<int64_t> shape(a.sizes().begin(), a.sizes().end() - 2);
  shape.insert(shape.end(), {a.size(-1), b.size(-1)});
  // Flatten before transposing: a copy, where the strides ask for one, then keeps its layout.
  const Tensor a3 = a.reshape({-1, a.size(-2), a.size(-1)}).transpose(1, 2);
  const Tensor b3 = b.reshape({-1, b.size(-2), b.size(-1)});
  const auto acc = acc_dtype(a);
  return (acc == a.scalar_type() ? at::bmm(a3, b3) : at::bmm(a3, b3, acc)).view(shape);
}

Tensor gram(const Tensor& a, const Tensor& b) {
  const int64_t L = a.size(-2), main = L / kGramRows * kGramRows;
  if (L <= kGramRows) return gram_once(a, b);
  const auto chunks = [&](const Tensor& x) {
    return x.narrow(-2, 0, main).unflatten(-2, {-1, kGramRows});
  };
  Tensor sum = gram_once(chunks(a), chunks(b)).sum(-3);
  if (main < L) sum += gram_once(a.narrow(-2, main, L - main), b.narrow(-2, main, L - main));
  return sum;
}

// Sums over the units before each unit (dim 2), and over those behind it.
Tensor sum_before(const Tensor& x) {
  std::vector<int64_t> shift(2 * (x.dim() - 2), 0);
  *(shift.end() - 2) = 1;
  *(shift.end() - 1) = -1;
  return at::constant_pad_nd(x, shift).cumsum(2);
}
Tensor sum_behind(const Tensor& x) { return sum_before(x.flip({2})).flip({2}); }

// [B, Hk, ...] -> [B, H, ...], a key head for each query head, and the sum back.
Tensor to_query_heads(const Tensor& x, int64_t H) {
  if (x.size(1) == H) return x;
  std::vector<int64_t> shape = x.sizes().vec();
  shape.insert(shape.begin() + 2, H / x.size(1));
  return x.unsqueeze(2).expand(shape).flatten(1, 2);
}
Tensor sum_query_heads(const Tensor& x, int64_t Hk) {
  return x.size(1) == Hk ? x : x.unflatten(1, {Hk, -1}).sum(2);
}

// A matrix in the work dtype. float16 has too little range for moments of large keys, so there the
// matrix is divided by its largest entry, which `scale` remembers.
struct Scaled {
  Tensor value;  // [..., m, n] work
  Tensor scale;  // [..., 1] acc, undefined for 1
  Tensor times(const Tensor& x) const { return scale.defined() ? x * scale : x; }
};

Scaled to_work(const Tensor& x, c10::ScalarType work) {
  if (work != at::kHalf) return {x.to(work), {}};
  const Tensor largest = x.abs().amax({-2, -1}, /*keepdim=*/true).clamp_min(1e-30);
  return {(x / largest).to(work), largest.squeeze(-1)};
}

Tensor zero_masked(const Tensor& x, const OptTensor& mask) {  // x [B, H, L, D], mask [B, L]
  return mask ? x.masked_fill(mask->logical_not().unsqueeze(1).unsqueeze(-1), 0) : x;
}

// Rows less the mean of their block, zeros at masked rows. [B, Hk, units, unit, D] work.
Tensor centred(const Tensor& x, const Tensor& mean, const OptTensor& mask, const Options& o) {
  const int64_t M = x.size(2), blocks = M / o.block_k, rows = blocks * o.block_k;
  const Tensor result = at::empty(x.sizes(), x.options().dtype(work_dtype(x)));
  if (rows > 0) {
    const auto by_block = [&](const Tensor& t) {
      return t.narrow(2, 0, rows).unflatten(2, {blocks, o.block_k});
    };
    Tensor to = by_block(result);
    at::sub_out(to, by_block(x), mean.narrow(2, 0, blocks).unsqueeze(3));
  }
  if (rows < M) {
    Tensor to = result.narrow(2, rows, M - rows);
    at::sub_out(to, x.narrow(2, rows, M - rows), mean.narrow(2, blocks, 1));
  }
  return to_units(zero_masked(result, mask), unit_rows(o, M));
}

// Valid keys that each unit of queries averages over, at least 1. [B, 1, units, 1, 1] acc.
Tensor key_total(const PooledInputs& pooled, const Options& o) {
  const int64_t nk = pooled.key_count.size(1), per_unit = o.causal ? unit_rows(o, 0) / o.block_k : nk;
  const Tensor n = to_units(pooled.key_count.to(pooled.key.scalar_type()).unsqueeze(1), per_unit)
                       .sum(-1)
                       .unsqueeze(-1)
                       .unsqueeze(-1);
  return (o.causal ? sum_before(n) : n).clamp_min(1);
}

struct Moments {
  Tensor cross, key;  // C and S, [B, Hk, units, D, D] acc
};

Moments average(const Tensor& cross, const Tensor& key, const PooledInputs& pooled,
                const Options& o) {
  const Tensor n = key_total(pooled, o);
  return {(o.causal ? sum_before(cross) : cross) / n, (o.causal ? sum_before(key) : key) / n};
}

// sum (k - k~)^T (v - v~) over a block is sum k^T v - c k~^T v~. The right side needs no centred
// copies, but cancels: it is used for half types, whose products are exact in float32.
Moments moments(const Inputs& in, const PooledInputs& pooled, const Options& o) {
  if (work_dtype(in.key) == acc_dtype(in.key)) {
    const Tensor k = centred(in.key, pooled.key, in.key_mask, o);
    const Tensor v = centred(in.value, pooled.value, in.key_mask, o);
    return average(gram(k, v), gram(k, k), pooled, o);
  }
  const int64_t M = in.key.size(2), unit = unit_rows(o, M);
  const int64_t blocks = o.causal ? unit / o.block_k : pooled.key.size(2);
  const Tensor k = to_units(zero_masked(in.key, in.key_mask), unit);
  const Tensor v = to_units(zero_masked(in.value, in.key_mask), unit);
  const Tensor count = pooled.key_count.unsqueeze(1).unsqueeze(-1);
  const Tensor k_sum = to_units(pooled.key * count, blocks);
  return average(gram(k, v) - gram(k_sum, to_units(pooled.value, blocks)),
                 gram(k, k) - gram(k_sum, to_units(pooled.key, blocks)), pooled, o);
}

// What forward and backward both need of the queries. [B, H, units, unit, ...]
struct Rows {
  Tensor query;         // [.., D] work
  Tensor share;         // [..] acc: P
  Scaled cross, key;    // C and S for each query head, [B, H, units, D, D] work
  Tensor query_key;     // [.., D] work: q S over the scale of S
  Tensor damping;       // [..] acc: gamma
};

Rows rows_of(const Inputs& in, const Tensor& share, const Moments& m, const Options& o) {
  const int64_t N = in.query.size(2), H = in.query.size(1), unit = unit_rows(o, N);
  const auto work = work_dtype(in.query);
  Rows r;
  r.query = to_units(in.query.to(work), unit);
  r.share = to_units(share, unit);
  r.cross = to_work(to_query_heads(m.cross, H), work);
  r.key = to_work(to_query_heads(m.key, H), work);
  r.query_key = at::matmul(r.query, r.key.value);
  const Tensor t = r.key.times((r.query_key * r.query).sum(-1, false, share.scalar_type()));
  r.damping = (t * (o.scale * o.scale / 4) + 1).reciprocal();
  return r;
}

}  // namespace

void order1_apply(FineResult& result, const Inputs& in, const PooledInputs& pooled,
                  const Options& o) {
  const Rows r = rows_of(in, result.share, moments(in, pooled, o), o);
  const Tensor factor = r.cross.times(r.share * r.damping * o.scale).unsqueeze(-1);
  const int64_t N = in.query.size(2);
  result.out.addcmul_(from_units(at::matmul(r.query, r.cross.value), N), from_units(factor, N));
}

Order1Grads order1_backward(const Tensor& grad_out, const Tensor& share, const Inputs& in,
                            const PooledInputs& pooled, const Options& o) {
  const int64_t N = in.query.size(2), M = in.key.size(2), Hk = in.key.size(1);
  const auto T = in.query.scalar_type(), work = work_dtype(in.query), acc = share.scalar_type();
  const double s = o.scale;
  const Tensor k = centred(in.key, pooled.key, in.key_mask, o);
  const Tensor v = centred(in.value, pooled.value, in.key_mask, o);
  const Moments m = average(gram(k, v), gram(k, k), pooled, o);
  const Rows r = rows_of(in, share, m, o);
  const Tensor dO = to_units(grad_out.to(work), unit_rows(o, N));

  // Per row: u . dO, and the gradients of gamma's argument t and of u.
  const Tensor dO_cross = at::matmul(dO, r.cross.value.mT());  // dO C^T over the scale of C
  const Tensor u_dO = r.cross.times((r.query * dO_cross).sum(-1, false, acc)) * s;
  const Tensor g = r.damping * u_dO;
  const Tensor a = r.share * r.damping * s;                        // dO_i times this is dL/d(q_i C)
  const Tensor b = g * r.damping * r.share * (-s * s / 4);         // s^2 dt_i

  Order1Grads grads;
  grads.row = from_units(g, N);
  dO_cross.mul_(r.cross.times(a).unsqueeze(-1));
  dO_cross.addcmul_(r.query_key, r.key.times(b).unsqueeze(-1), 2);
  grads.query = from_units(dO_cross.to(T), N);

  // To the moments, [B, Hk, units, D, D] acc.
  const auto to_moment = [&](const Tensor& left, const Tensor& weight, const Tensor& right) {
    const Scaled w = to_work(weight.unsqueeze(-1), work);
    Tensor sum = gram(left * w.value, right);
    if (w.scale.defined()) sum = sum * w.scale.unsqueeze(-1);
    sum = sum_query_heads(sum, Hk) / key_total(pooled, o);
    return o.causal ? sum_behind(sum) : sum;
  };
  const Tensor d_cross = to_moment(r.query, a, dO);
  const Tensor d_key = to_moment(r.query, b, r.query) * 2;  // S is symmetric in k

  // To the keys and values of each block; the rows are centred, so the block means need nothing.
  const Scaled dC = to_work(d_cross, work), dS = to_work(d_key, work);
  const auto rows = [&](const Tensor& x, const Tensor& matrix, const Scaled& from) {
    const Tensor y = at::matmul(x, matrix);
    return from.scale.defined() ? y * from.scale.unsqueeze(-1) : y;
  };
  grads.value = from_units(rows(k, dC.value, dC).to(T), M);
  grads.key = from_units(rows(v, dC.value.mT(), dC).add_(rows(k, dS.value, dS)).to(T), M);
  return grads;
}

}  // namespace mra
