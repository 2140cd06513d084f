#include "checks.h"

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <vector>

namespace mra {
namespace {

using c10::SymInt;

// True unless the comparison is known to fail; a size that is unknown while tracing is checked
// when the real kernel runs.
bool holds(const c10::SymBool& condition) { return condition.guard_or_true(__FILE__, __LINE__); }
bool equal(const SymInt& a, const SymInt& b) { return holds(a.sym_eq(b)); }

int64_t heads_of(const Tensor& x) { return x.sym_size(1).guard_int(__FILE__, __LINE__); }

void check_same_device(const char* name, const Tensor& x, const char* like_name,
                       const Tensor& like) {
  TORCH_CHECK_VALUE(x.device() == like.device(), name, ": got device ", x.device(),
                    ", expected that of ", like_name, ", ", like.device());
}

void check_same_dtype(const char* name, const Tensor& x, const char* like_name,
                      const Tensor& like) {
  TORCH_CHECK_TYPE(x.scalar_type() == like.scalar_type(), name, ": got dtype ", x.scalar_type(),
                   ", expected that of ", like_name, ", ", like.scalar_type());
}

// (B, H, L, D), floating, D a multiple of 8 in 8..256. Returns D.
int64_t check_rows(const char* name, const Tensor& x) {
  TORCH_CHECK_TYPE(x.layout() == c10::kStrided, name, ": got layout ", x.layout(),
                   ", expected a dense (strided) tensor");
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      name, ": got dtype ", dtype, ", expected float64, float32, bfloat16 or float16");
  TORCH_CHECK_VALUE(x.dim() == 4, name, ": got shape ", x.sym_sizes(),
                    ", expected 4 dimensions (batch, heads, length, head_dim)");
  TORCH_CHECK_VALUE(holds(x.sym_size(1).sym_gt(0)), name, ": got shape ", x.sym_sizes(),
                    ", expected at least one head");
  const int64_t D = x.sym_size(3).guard_int(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(D >= 8 && D <= 256 && D % 8 == 0, name, ": got head_dim ", D, " (shape ",
                    x.sym_sizes(), "), expected a multiple of 8 from 8 to 256");
  return D;
}

// bool (B, L) beside x (B, H, L, D), on its device.
void check_mask(const char* name, const OptTensor& mask, const char* of, const Tensor& x) {
  if (!mask) return;
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, name, ": got dtype ", mask->scalar_type(),
                   ", expected bool (True = takes part)");
  TORCH_CHECK_VALUE(mask->dim() == 2 && equal(mask->sym_size(0), x.sym_size(0)) &&
                        equal(mask->sym_size(1), x.sym_size(2)),
                    name, ": got shape ", mask->sym_sizes(), ", expected [", x.sym_size(0), ", ",
                    x.sym_size(2), "] (batch and length of ", of, ")");
  check_same_device(name, *mask, of, x);
}

// Same dtype, device, B and D; H % Hk == 0; M > 0; N == M when causal. Returns D.
int64_t check_query_key(const Tensor& query, const Tensor& key, const OptTensor& key_mask,
                        const OptTensor& query_mask, bool is_causal) {
  const int64_t D = check_rows("query", query);
  const int64_t key_dim = check_rows("key", key);
  check_same_dtype("key", key, "query", query);
  check_same_device("key", key, "query", query);
  TORCH_CHECK_VALUE(key_dim == D, "key: got head_dim ", key_dim, ", expected that of query, ", D);
  TORCH_CHECK_VALUE(equal(key.sym_size(0), query.sym_size(0)), "key: got batch size ",
                    key.sym_size(0), ", expected that of query, ", query.sym_size(0));
  const int64_t H = heads_of(query), Hk = heads_of(key);
  TORCH_CHECK_VALUE(Hk > 0 && H % Hk == 0, "key: got ", Hk,
                    " heads, expected a number that divides the ", H, " heads of query");
  TORCH_CHECK_VALUE(holds(key.sym_size(2).sym_gt(0)), "key: got shape ", key.sym_sizes(),
                    ", expected at least one key");
  TORCH_CHECK_VALUE(!is_causal || equal(query.sym_size(2), key.sym_size(2)),
                    "is_causal: got True with ", query.sym_size(2), " queries and ",
                    key.sym_size(2), " keys, expected as many keys as queries");
  check_mask("key_mask", key_mask, "key", key);
  check_mask("query_mask", query_mask, "query", query);
  return D;
}

// `x` has the shape, dtype and device of `like`.
void check_like(const char* name, const Tensor& x, const char* like_name, const Tensor& like) {
  check_same_dtype(name, x, like_name, like);
  check_same_device(name, x, like_name, like);
  bool same = x.dim() == like.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = equal(x.sym_size(d), like.sym_size(d));
  TORCH_CHECK_VALUE(same, name, ": got shape ", x.sym_sizes(), ", expected that of ", like_name,
                    ", ", like.sym_sizes());
}

// `x` has this shape and dtype, on the device of `like`.
void check_shape(const char* name, const Tensor& x, c10::SymIntArrayRef shape,
                 c10::ScalarType dtype, const Tensor& like) {
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, name, ": got dtype ", x.scalar_type(), ", expected ",
                   dtype);
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (int64_t d = 0; same && d < x.dim(); ++d) same = equal(x.sym_size(d), shape[d]);
  TORCH_CHECK_VALUE(same, name, ": got shape ", x.sym_sizes(), ", expected ", shape);
  check_same_device(name, x, "query", like);
}

// Blocks of length `length` of all resolutions: of `block` rows, then of those of the levels.
SymInt all_blocks(const SymInt& length, int64_t block, const Options& o) {
  SymInt n = (length + (block - 1)) / block;
  for (const Level& level : o.levels) n = n + (length + (level.block - 1)) / level.block;
  return n;
}

// int32: row_start and row_count (B, H, nq), row_index (B, H, any), on query's device.
void check_lists(const PlanTensors& plan, const Tensor& query, const Options& o) {
  TORCH_CHECK_VALUE(plan.row_start.has_value() == plan.row_count.has_value() &&
                        plan.row_start.has_value() == plan.row_index.has_value(),
                    "plan: got only some of row_start, row_count and row_index, expected all of "
                    "them or none");
  if (!plan.given()) return;
  const SymInt nq = all_blocks(query.sym_size(2), o.block_q, o);
  const std::vector<SymInt> rows{query.sym_size(0), query.sym_size(1), nq};
  check_shape("row_start", *plan.row_start, rows, at::kInt, query);
  check_shape("row_count", *plan.row_count, rows, at::kInt, query);
  TORCH_CHECK_VALUE(plan.row_index->dim() == 3, "row_index: got shape ",
                    plan.row_index->sym_sizes(),
                    ", expected 3 dimensions (batch, heads, capacity)");
  const std::vector<SymInt> entries{query.sym_size(0), query.sym_size(1),
                                    plan.row_index->sym_size(2)};
  check_shape("row_index", *plan.row_index, entries, at::kInt, query);
}

void check_means(const MeanTensors& means, const Inputs& in, const Options& o,
                 c10::ScalarType acc) {
  const bool queries = means.query || means.query_count;
  const bool keys = means.key || means.value || means.key_count;
  const bool weights = means.centre || means.weights || means.mass;
  if (!queries && !keys && !weights && !means.moments) return;
  TORCH_CHECK_VALUE(keeps_weights(o) || !weights,
                    "query_centre, key_weights, block_mass: got some, expected none: forward keeps "
                    "them for pool 'centred' and 'sampled' alone");
  TORCH_CHECK_VALUE(
      means.key && means.value && means.key_count &&
          (o.coarse != Coarse::block || (means.query && means.query_count)) &&
          (!keeps_weights(o) || (means.query_count && means.centre && means.weights && means.mass)),
      "query_mean, key_mean, value_mean, query_count, key_count, query_centre, key_weights, "
      "block_mass: got only some of them, expected all that forward gave or none");
  const SymInt B = in.query.sym_size(0), D = in.query.sym_size(3);
  const auto check = [&](const char* name, const OptTensor& mean, const char* count_name,
                         const OptTensor& count, const Tensor& x, int64_t block) {
    const SymInt n = all_blocks(x.sym_size(2), block, o);
    if (mean) check_shape(name, *mean, std::vector<SymInt>{B, x.sym_size(1), n, D}, acc, in.query);
    if (count) check_shape(count_name, *count, std::vector<SymInt>{B, n}, at::kInt, in.query);
  };
  check("query_mean", means.query, "query_count", means.query_count, in.query, o.block_q);
  check("key_mean", means.key, "key_count", means.key_count, in.key, o.block_k);
  check("value_mean", means.value, "key_count", std::nullopt, in.value, o.block_k);
  if (weights) {
    const SymInt nk = all_blocks(in.key.sym_size(2), o.block_k, o);
    const auto check_floats = [&](const char* name, const OptTensor& x, const SymInt& n) {
      check_shape(name, *x, std::vector<SymInt>{B, in.key.sym_size(1), n}, acc, in.query);
    };
    if (o.causal) {
      const SymInt n = all_blocks(in.query.sym_size(2), o.block_q, o) + 1;
      check_shape("query_centre", *means.centre, std::vector<SymInt>{B, in.key.sym_size(1), n, D},
                  acc, in.query);
    } else {
      check_floats("query_centre", means.centre, D);
    }
    check_floats("key_weights", means.weights, nk * o.block_k);
    check_floats("block_mass", means.mass, nk);
  }
  if (!means.moments) return;
  TORCH_CHECK_VALUE(
      keeps_moments(o),
      "moments: got some, expected none: forward keeps them for order 1 with a coarse "
      "part and without causal");
  const SymInt P = moments_dim(in.query.sym_size(3).guard_int(__FILE__, __LINE__));
  check_shape("moments", *means.moments, std::vector<SymInt>{B, in.key.sym_size(1), 2, P, P},
              moments_type(in.query.scalar_type()), in.query);
}

// What this device has no kernel for.
void check_device(const char* name, const Tensor& x, int64_t block_q) {
  if (!x.is_cuda()) return;
  TORCH_CHECK_NOT_IMPLEMENTED(x.scalar_type() != at::kDouble, name,
                              ": got float64 on a GPU, expected float32, bfloat16 or float16 "
                              "there (float64 runs on the CPU)");
  TORCH_CHECK_NOT_IMPLEMENTED(block_q >= 32, "block_q: got ", block_q,
                              ", the CUDA kernels take 32, 64 or 128");
}

}  // namespace

void check_pool(const Tensor& input, const OptTensor& mask, int64_t block) {
  check_rows("input", input);
  check_mask("mask", mask, "input", input);
  check_block_size("block", block);
  check_device("input", input, /*block_q=*/128);
}

Options check_plan(const Tensor& query, const Tensor& key, const OptTensor& key_mask,
                   const OptTensor& query_mask, const CallOptions& call) {
  const int64_t D = check_query_key(query, key, key_mask, query_mask, call.is_causal);
  const Options o = check_options(call, Budget::required, heads_of(query), D);
  check_device("query", query, o.block_q);
  return o;
}

Options check_forward(const Inputs& in, const PlanTensors& plan, const CallOptions& call) {
  const int64_t D = check_query_key(in.query, in.key, in.key_mask, in.query_mask, call.is_causal);
  check_like("value", in.value, "key", in.key);
  const Options o = check_options(call, plan.given() ? Budget::optional : Budget::required,
                                  heads_of(in.query), D);
  check_lists(plan, in.query, o);
  check_device("query", in.query, o.block_q);
  return o;
}

Options check_backward(const Tensor& grad_out, const OptTensor& grad_lse, const Inputs& in,
                       const Tensor& out, const Tensor& lse, const Tensor& coarse_share,
                       const PlanTensors& plan, const MeanTensors& means, const CallOptions& call) {
  const Options o = check_forward(in, plan, call);
  const std::vector<SymInt> rows{in.query.sym_size(0), in.query.sym_size(1), in.query.sym_size(2)};
  const auto acc = in.query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  check_like("grad_out", grad_out, "query", in.query);
  check_like("out", out, "query", in.query);
  check_shape("lse", lse, rows, acc, in.query);
  if (grad_lse) check_shape("grad_lse", *grad_lse, rows, acc, in.query);
  if (o.order == 1 && o.coarse != Coarse::none) {
    std::vector<SymInt> shares = rows;
    if (!o.levels.empty()) shares.insert(shares.begin() + 2, SymInt(o.levels.size() + 1));
    check_shape("coarse_share", coarse_share, shares, acc, in.query);
  }
  check_means(means, in, o, acc);
  return o;
}

}  // namespace mra
