// Stage pool on CUDA: allocates and launches pool_fwd.cu.
#include "pool.h"

#include <limits>

#include "../common/budget.h"
#include "launch.h"
#include "level_stages.h"
#include "moments.h"
#include "problem.h"

namespace mra::cuda {
namespace {

// Means of up to three tensors, and counts of those that ask for them, in one launch.
class Pools {
 public:
  // `weights`: of all rows of all tensors, or undefined.
  explicit Pools(const Tensor& like, const Tensor& weights = {})
      : launch_(like), weights_(data_of<float>(weights)) {
    p_.weighted = weights.defined();
    p_.B = static_cast<int>(like.size(0));
    p_.D = static_cast<int>(like.size(3));
    p_.dtype = dtype_of(like);
  }

  // x [B, H, L, D] -> mean [B, H, n, D] float32 and, unless null, count [B, n] int32 and rounded
  // [B, H, n, D] T, n = ceil(L / block).
  void add(const Tensor& x, const OptTensor& mask, int64_t block, Tensor& mean, Tensor* count,
           Tensor* rounded) {
    const int64_t B = x.size(0), H = x.size(1), L = x.size(2), D = x.size(3);
    const int64_t n = ceil_div(L, block);
    TORCH_CHECK_NOT_IMPLEMENTED(B * H * n <= std::numeric_limits<int>::max(),
                                "mra_attention on CUDA takes at most 2^31 - 1 blocks in all, got ",
                                B * H * n);
    mean = allocate({B, H, n, D}, x.options().dtype(at::kFloat));
    if (count != nullptr) *count = allocate({B, n}, x.options().dtype(at::kInt));
    if (rounded != nullptr) *rounded = allocate({B, H, n, D}, x.options());

    PoolTensor& t = p_.tensor[p_.tensors++] = pool_tensor(x, mask, block, mean);
    t.rounded = rounded != nullptr ? rounded->mutable_data_ptr() : nullptr;
    t.count = count != nullptr ? count->mutable_data_ptr<int32_t>() : nullptr;
    t.weights = weights_;
  }

  void run(bool beside = false) {
    p_.beside = beside;
    launch_.check(pool_forward(p_, launch_.stream));
  }

 private:
  const Launch launch_;
  const float* weights_;
  PoolParams p_{};
};

}  // namespace

Pooled pool(const Tensor& x, const OptTensor& mask, int64_t block) {
  Pooled out;
  Pools pools(x);
  pools.add(x, mask, block, out.mean, &out.count, nullptr);
  pools.run();
  return out;
}

namespace {

PooledInputs pool_blocks(const Inputs& in, const Options& o, bool query, bool key) {
  PooledInputs pooled;
  Pools pools(in.query);
  const bool coarse = o.coarse != Coarse::none;
  const bool even = o.pool == Pool::even;  // else coarse means, and counts, are made otherwise
  const auto add_queries = [&] {
    if (!query) return;
    pools.add(in.query, in.query_mask, o.block_q, pooled.query, &pooled.query_count, nullptr);
  };
  if (has_order1(o) && even) {
    const auto pool_queries = [&] {
      add_queries();
      pools.run(true);
    };
    pooled.moments = pool_moments(in, o, &pooled, {}, pool_queries);
    const auto cut = walk_cut(in, o, Launch(in.key));
    if (cut && cut->chunks > 1) {
      pooled.moments_before = moments_before(in, o, *cut, &pooled, pool_queries);
    }
  }
  if (!pooled.moments.defined() && !pooled.moments_before.defined()) {
    add_queries();
    const bool rounded = rounds_pooled(in.key, o) && even && o.levels.empty();
    if (even ? key || coarse : key && !weighs_with_moments(in, o, Launch(in.key))) {
      pools.add(in.key, in.key_mask, o.block_k, pooled.key, &pooled.key_count,
                rounded ? &pooled.key_rounded : nullptr);
    }
    if (coarse && even) {
      pools.add(in.value, in.key_mask, o.block_k, pooled.value, nullptr,
                rounded ? &pooled.value_rounded : nullptr);
    }
    pools.run();
  }
  return pooled;
}

}  // namespace

// With levels those of block_q and block_k first, in one launch, and from them the others; moments
// are those of block_k.
PooledInputs pool_inputs(const Inputs& in, const Options& o, bool query, bool key) {
  if (o.levels.empty()) return pool_blocks(in, o, query, key);
  PooledInputs pooled = pool_blocks(in, o, query, key);
  pooled.key_rounded = pooled.value_rounded = Tensor();  // of all resolutions, by what reads them
  pooled.beside = false;
  const auto all = [&](Tensor& mean, Tensor& count, bool queries) {
    const Pooled pools = pool_levels({mean, count}, Tensor(), o, queries);
    mean = pools.mean;
    count = pools.count;
  };
  if (query) all(pooled.query, pooled.query_count, true);
  if (pooled.key.defined()) all(pooled.key, pooled.key_count, false);
  if (pooled.value.defined()) {
    pooled.value = pool_levels({pooled.value, Tensor()}, pooled.key_count, o, false).mean;
  }
  return pooled;
}

void pool_weighted(PooledInputs& pooled, const Inputs& in, const Options& o) {
  Pools pools(in.key, pooled.weights);
  const bool rounded = rounds_pooled(in.key, o);
  pools.add(in.key, in.key_mask, o.block_k, pooled.key, nullptr,
            rounded ? &pooled.key_rounded : nullptr);
  pools.add(in.value, in.key_mask, o.block_k, pooled.value, nullptr,
            rounded ? &pooled.value_rounded : nullptr);
  pools.run();
}

}  // namespace mra::cuda
