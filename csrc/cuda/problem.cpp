#include "problem.h"

#include <ATen/Context.h>

#include <algorithm>
#include <numeric>

#include "../common/budget.h"
#include "coarse_shares.h"

namespace mra::cuda {
namespace {

void fill_common(Problem& p, const Tensor& q, int64_t key_heads, const BlockList& rows,
                 const Options& o) {
  check_supported(o);
  p.B = q.size(0);
  p.H = q.size(1);
  p.Hk = key_heads;
  p.rows = q.size(2);
  p.D = q.size(3);
  p.block_q = o.block_q;
  p.block_k = o.block_k;
  p.log2_block_k = log2_of(o.block_k);
  p.scale = o.scale;
  p.causal = o.causal;
  p.q = q.const_data_ptr();
  p.q_strides = strides_of(q);
  p.row_lists = lists_of(rows);
  p.by_head = !o.head_density.empty() && p.H <= kMostDensities;
  if (p.by_head) {
    std::iota(p.head_order, p.head_order + p.H, 0);
    std::stable_sort(p.head_order, p.head_order + p.H,
                     [&](int a, int b) { return o.head_density[a] > o.head_density[b]; });
  }
}

}  // namespace

void check_supported(const Options& o) {
  TORCH_CHECK_NOT_IMPLEMENTED(o.block_q >= 32, "block_size: the query block is ", o.block_q,
                              "; on CUDA it is 32, 64 or 128 (16 is available for keys)");
}

void fill(Problem& p, const Inputs& in, const BlockList& rows, const Tensor& pooled_key,
          const Tensor& pooled_value, const Tensor& key_count, const Options& o) {
  fill_common(p, in.query, in.key.size(1), rows, o);
  p.M = in.key.size(2);
  p.nk = ceil_div(p.M, o.block_k);
  p.list_rows = o.block_q;
  p.exact = true;
  p.tf32_scores = p.tf32 = at::globalContext().allowTF32CuBLAS();
  p.k = in.key.const_data_ptr();
  p.v = in.value.const_data_ptr();
  p.k_strides = strides_of(in.key);
  p.v_strides = strides_of(in.value);
  p.key_mask = mask_of(in.key_mask);
  p.row_mask = mask_of(in.query_mask);
  p.pooled_k = const_bytes_of(pooled_key);
  p.pooled_v = const_bytes_of(pooled_value);
  p.key_count = data_of<int>(key_count);
}

void fill(Problem& p, const PooledInputs& in, const BlockList& rows, const Options& o) {
  fill_common(p, in.query, in.key.size(1), rows, o);
  p.nk = in.key.size(2);
  p.list_rows = 1;
  p.pooled_k = in.key.const_data_ptr();
  p.pooled_v = in.value.const_data_ptr();
  p.key_count = in.key_count.const_data_ptr<int>();
  // What comes of half inputs is rounded as coarsely as TF32; but the error of a score, which grows
  // with the score, ends up in an exponent.
  p.tf32 = at::isReducedFloatingType(in.type);
}

PlanParams plan_params(int64_t B, int64_t H, int64_t Hk, int64_t nq, int64_t nk, int64_t D,
                       int64_t N, const Options& o) {
  PlanParams p{};
  p.B = static_cast<int>(B);
  p.H = static_cast<int>(H);
  p.Hk = static_cast<int>(Hk);
  p.nq = static_cast<int>(nq);
  p.nk = static_cast<int>(nk);
  p.D = static_cast<int>(D);
  p.N = N;
  p.block_q = static_cast<int>(o.block_q);
  p.block_k = static_cast<int>(o.block_k);
  p.scale = static_cast<float>(o.scale);
  p.causal = o.causal;
  p.blocks_per_row = o.blocks_per_row.value_or(0);
  p.density = o.density.value_or(0);
  p.by_head = !o.head_density.empty();
  TORCH_CHECK_NOT_IMPLEMENTED(H <= kMostDensities || !p.by_head, "density: got one for each of ", H,
                              " heads, on CUDA expected at most ", kMostDensities,
                              " heads, or one for all");
  std::copy(o.head_density.begin(), o.head_density.end(), p.head_density);
  // Beyond the whole map nothing changes; clamped before the product can overflow.
  const int64_t side = std::min<int64_t>(o.diagonal_blocks / 2, (nq + nk) * 128);
  p.diagonal_reach = o.diagonal_blocks > 0 ? side * std::max(o.block_q, o.block_k) : -1;
  p.first_blocks = static_cast<int>(std::min(o.first_blocks, std::max(nq, nk)));
  p.row_capacity = static_cast<int>(row_capacity(o, nk));
  return p;
}

BlockList empty_rows(PlanParams& p, const at::TensorOptions& ints) {
  const int64_t B = p.B, H = p.H, nq = p.nq;
  BlockList rows{allocate({B, H, nq}, ints), allocate({B, H, nq}, ints),
                 allocate({B, H, nq * p.row_capacity}, ints), allocate({2}, ints)};
  p.start = rows.start.mutable_data_ptr<int32_t>();
  p.count = rows.count.mutable_data_ptr<int32_t>();
  p.index = rows.index.mutable_data_ptr<int32_t>();
  p.queues = rows.queues.mutable_data_ptr<int32_t>();
  return rows;
}

PoolTensor pool_tensor(const Tensor& x, const OptTensor& mask, int64_t block, const Tensor& mean) {
  PoolTensor t{};
  t.x = x.const_data_ptr();
  t.stride = strides_of(x);
  t.mask = mask ? mask->const_data_ptr<bool>() : nullptr;
  t.mean = mean.mutable_data_ptr<float>();
  t.H = static_cast<int>(x.size(1));
  t.n = static_cast<int>(mean.size(2));
  t.L = x.size(2);
  t.log2_block = log2_of(block);
  return t;
}

Tensor pooled_shares(BackwardParams& p, Dtype dtype, const Launch& launch, const Tensor& like,
                     Tensor* mass_grad) {
  const int64_t tiles = ceil_div(p.nk, 64) * p.B * p.Hk;
  // One wave of what the kernel's registers allow a multiprocessor.
  const bool hopper = launch.device.major == 9, half = dtype != Dtype::f32;
  const int blocks = hopper && half && p.D > 128 ? 1 : hopper || !half || p.D > 64 ? 2 : 3;
  const int64_t slots = int64_t{blocks} * launch.device.sms;
  p.splits = static_cast<int>(
      std::clamp<int64_t>(slots / std::max<int64_t>(1, tiles), 1, ceil_div(p.rows, 64)));
  const auto acc = like.options().dtype(at::kFloat);
  const Tensor sums = allocate({2, p.splits, p.B, p.Hk, p.nk, p.D}, acc);
  const Tensor shares = allocate({2, p.B, p.Hk, p.nk, p.D}, acc);
  p.pooled_grad_k = sums.mutable_data_ptr<float>();
  p.pooled_grad_v = p.pooled_grad_k + sums.numel() / 2;
  Tensor mass_parts;
  if (mass_grad != nullptr) {
    mass_parts = allocate({p.splits, p.B, p.Hk, p.nk}, acc);
    *mass_grad = allocate({p.B, p.Hk, p.nk}, acc);
    p.pooled_mass_grads = mass_parts.mutable_data_ptr<float>();
  }
  cudaError_t error = backward_pooled(p, dtype, launch.device, launch.stream);
  if (error == cudaErrorNotSupported && p.coarse_sum != nullptr) {
    p.coarse_sum = nullptr;
    error = backward_pooled(p, dtype, launch.device, launch.stream);
  }
  launch.check(error);
  launch.check(share_sums(
      {sums.const_data_ptr<float>(), p.pooled_mass ? nullptr : p.key_count,
       shares.mutable_data_ptr<float>(), p.splits, p.B, p.Hk, p.nk, p.D, data_of<float>(mass_parts),
       mass_grad != nullptr ? mass_grad->mutable_data_ptr<float>() : nullptr},
      launch.stream));
  return shares;
}

}  // namespace mra::cuda
