#include "moments.h"

#include <limits>

#include "../common/budget.h"
#include "order1.h"
#include "problem.h"
#include "sm90/moments.h"

namespace mra::cuda {

#ifdef MRA_SM90A
namespace {

constexpr int64_t kMostKeys = std::numeric_limits<int>::max() / 2;

bool hopper_takes(const Tensor& key, const Launch& launch) {
  return launch.device.major == 9 && at::isReducedFloatingType(key.scalar_type()) &&
         key.size(3) <= 128;
}

bool takes_keys(const Inputs& in, const Options& o, const Launch& launch) {
  return hopper_takes(in.key, launch) && o.block_k <= 64 && in.key.size(2) <= kMostKeys;
}

}  // namespace
#endif

bool order1_on_hopper(const Tensor& key, const Options& o, const Launch& launch) {
#ifdef MRA_SM90A
  return !o.causal && key.scalar_type() == at::kBFloat16 && hopper_takes(key, launch);
#else
  return false;
#endif
}

bool order1_in_columns(const Tensor& key, const Options& o, const Launch& launch) {
  return order1_on_hopper(key, o, launch) && o.levels.empty() && o.block_k == 64 &&
         o.block_q >= 32 && key.size(3) <= 64;
}

bool order1_in_fine(const Tensor& key, const Options& o, const Launch& launch) {
#ifdef MRA_SM90A
  return !o.causal && o.levels.empty() && hopper_takes(key, launch);
#else
  return false;
#endif
}

FineMoments fine_moments(const Tensor& moments, const Tensor& key, const Launch& launch) {
  if (moments.scalar_type() == key.scalar_type()) return {moments, {}};
  const FineMoments r{allocate(moments.sizes(), key.options()),
                      allocate(moments.sizes().slice(0, 3), moments.options())};
  launch.check(order1_round(moments.const_data_ptr<float>(), r.matrices.mutable_data_ptr(),
                            r.scales.mutable_data_ptr<float>(), r.scales.numel(),
                            static_cast<int>(moments.size(3)), launch.stream));
  return r;
}

std::optional<WalkCut> walk_cut(const Inputs& in, const Options& o, const Launch& launch) {
#ifdef MRA_SM90A
  const int64_t D = in.key.size(3), M = in.key.size(2), heads = in.key.size(0) * in.key.size(1);
  const int64_t unit = std::max(o.block_q, o.block_k);
  if (!o.causal || !o.levels.empty() || !hopper_takes(in.key, launch) || o.block_k > 64 ||
      unit < 64 || M > kMostKeys || heads > kMostKeys) {
    return std::nullopt;
  }
  const int unit_tiles = static_cast<int>(unit / 64),
            resident = D <= 64 ? 2 : 1;  // of the kernels that walk
  return WalkCut{static_cast<int>(moments_dim(D)), unit_tiles,
                 sm90::unit_chunks(static_cast<int>(heads), static_cast<int>(M), unit_tiles,
                                   resident, launch.device)};
#else
  return std::nullopt;
#endif
}

#ifdef MRA_SM90A

namespace {

// What the kernel reads; means go to the key part of `pooled` unless it is null.
sm90::Moments moments_of(const Inputs& in, const Options& o, PooledInputs* pooled) {
  const int64_t B = in.key.size(0), Hk = in.key.size(1), M = in.key.size(2), D = in.key.size(3);
  const int64_t nk = ceil_div(M, o.block_k);
  sm90::Moments p{};
  p.dtype = dtype_of(in.key);
  p.k = in.key.const_data_ptr();
  p.v = in.value.const_data_ptr();
  p.k_strides = strides_of(in.key);
  p.v_strides = strides_of(in.value);
  p.mask = mask_of(in.key_mask);
  p.B = static_cast<int>(B);
  p.Hk = static_cast<int>(Hk);
  p.M = static_cast<int>(M);
  p.D = static_cast<int>(D);
  p.nk = static_cast<int>(nk);
  p.log2_block_k = log2_of(o.block_k);
  p.unit_tiles = 1;
  if (pooled == nullptr) return p;
  const auto acc = in.key.options().dtype(at::kFloat);
  pooled->key = allocate({B, Hk, nk, D}, acc);
  pooled->value = allocate({B, Hk, nk, D}, acc);
  p.k_mean = pooled->key.mutable_data_ptr<float>();
  p.v_mean = pooled->value.mutable_data_ptr<float>();
  if (o.pool != Pool::even) {
    p.weights = data_of<float>(pooled->weights);
  } else {
    pooled->key_count = allocate({B, nk}, acc.dtype(at::kInt));
    p.key_count = pooled->key_count.mutable_data_ptr<int>();
  }
  if (rounds_pooled(in.key, o) && o.levels.empty()) {
    pooled->key_rounded = allocate({B, Hk, nk, D}, in.key.options());
    pooled->value_rounded = allocate({B, Hk, nk, D}, in.key.options());
    p.k_rounded = pooled->key_rounded.mutable_data_ptr();
    p.v_rounded = pooled->value_rounded.mutable_data_ptr();
  }
  return p;
}

Tensor empty_sums(const sm90::Moments& p, int dim, const Tensor& like) {
  return allocate({p.B, p.Hk, p.chunks, 2, dim, dim}, like.options().dtype(at::kFloat));
}

// False where the kernel doesn't do it.
bool launch_moments(const sm90::Moments& p, int dim, const Launch& launch) {
  return launch_by_dim(launch, dim, [&](auto padded) {
    return sm90::launch_moments<padded()>(p, launch.device, launch.stream);
  });
}

// Of the kernel launched last, which sums up the chunks: a plan may run beside it.
void let_plan_start(PooledInputs* pooled, const Tensor& sums) {
  if (pooled == nullptr) return;
  pooled->beside = true;
  pooled->held = sums;
}

// Sums over chunks, to p.matrices.
void sum_chunks(const sm90::Moments& p, int dim, const Tensor& key_count, const Launch& launch) {
  Order1Sum s{};
  s.dtype = p.dtype == Dtype::bf16 ? Dtype::bf16 : Dtype::f32;  // of the matrices
  s.B = p.B;
  s.heads = p.Hk;
  s.units = 1;
  s.chunks = p.chunks;
  s.dim = dim;
  s.key_count = key_count.const_data_ptr<int>();
  s.nk = p.nk;
  s.sums = p.sums;
  s.matrices = p.matrices;
  s.factor = 1.f;
  launch.check(order1_sum(s, launch.stream));
}

// C and Sigma by the kernel, or undefined where it doesn't do it.
Tensor run_moments(sm90::Moments p, const Inputs& in, const Options& o, PooledInputs* pooled,
                   const Tensor& key_count, const Launch& launch,
                   const std::function<void()>& launch_beside) {
  const bool half = in.key.scalar_type() == at::kHalf;
  const int dim = static_cast<int>(moments_dim(p.D));
  p.chunks = sm90::tile_chunks(p.B * p.Hk, p.M, sm90::moments_resident(dim, o.pool == Pool::even),
                               launch.device);
  const auto type = in.key.options().dtype(moments_type(in.key.scalar_type()));
  const Tensor matrices = allocate({p.B, p.Hk, 2, dim, dim}, type);
  p.matrices = matrices.mutable_data_ptr();
  const Tensor sums = p.chunks > 1 || half ? empty_sums(p, dim, in.key) : Tensor();
  p.sums = data_of<float>(sums);
  if (!launch_moments(p, dim, launch)) return {};
  launch_beside();
  if (sums.defined()) {
    sum_chunks(p, dim, key_count, launch);
    let_plan_start(pooled, sums);
  }
  return matrices;
}

}  // namespace

Tensor pool_moments(const Inputs& in, const Options& o, PooledInputs* pooled,
                    const Tensor& key_count, const std::function<void()>& launch_beside) {
  const Launch launch(in.key);
  if (o.causal || !takes_keys(in, o, launch)) return {};
  const sm90::Moments p = moments_of(in, o, pooled);
  const Tensor& count = pooled != nullptr ? pooled->key_count : key_count;
  return run_moments(p, in, o, pooled, count, launch, launch_beside);
}

bool weighs_with_moments(const Inputs& in, const Options& o, const Launch& launch) {
  return o.pool != Pool::even && has_order1(o) && !o.causal && takes_keys(in, o, launch);
}

Tensor weigh_with_moments(const Inputs& in, const Options& o, const WeightsParams& weights,
                          PooledInputs& pooled, PooledInputs& plain) {
  const Launch launch(in.key);
  sm90::Moments p = moments_of(in, o, &pooled);
  p.key_count = weights.count;
  p.made.sample = weights.rows;
  p.made.parts = weights.parts;
  p.made.offsets = weights.offsets;
  p.made.parts_chunks = weights.chunks;
  p.made.scale = weights.scale;
  p.made.weights = weights.weights;
  p.made.mass = weights.mass;
  p.made.key_bias = weights.key_bias;
  if (weights.key_bias != nullptr) {
    plain.key = allocate_like(pooled.key);
    p.made.k_plain = plain.key.mutable_data_ptr<float>();
  }
  const Tensor moments = run_moments(p, in, o, &plain, plain.key_count, launch, [] {});
  TORCH_INTERNAL_ASSERT(moments.defined(), "a kernel that serves order 1 refused to weigh keys");
  return moments;
}

namespace {

// Whether a block of threads may have all keys of a head, and all that is made before fine: where
// launches take longer than the device, which is with no more heads than run at once. Long heads
// leave it idle where they are few.
bool takes_whole_heads(const Inputs& in, const Options& o, const Launch& launch) {
  const int64_t D = in.key.size(3), M = in.key.size(2), heads = in.key.size(0) * in.key.size(1);
  const int resident =
      sm90::moments_resident(static_cast<int>(moments_dim(D)), o.pool == Pool::even);
  return has_order1(o) && o.coarse == Coarse::row && o.pool != Pool::sampled && o.levels.empty() &&
         o.selection == Selection::row && order1_on_hopper(in.key, o, launch) &&
         takes_keys(in, o, launch) && o.block_q >= 32 && o.block_k >= 32 &&
         ceil_div(in.query.size(2), o.block_q) <= sm90::kWholeQueryBlocks &&
         ceil_div(M, o.block_k) <= sm90::kWholeKeyBlocks && D > 16 &&
         (D <= 64 || o.pool == Pool::even) && in.query.size(1) == in.key.size(1) &&
         heads <= int64_t{resident} * launch.device.sms &&
         (M <= 1024 || heads >= launch.device.sms);
}

}  // namespace

std::optional<Prepared> prepare(const Inputs& in, bool plan, const Options& o) {
  const Launch launch(in.key);
  if (!takes_whole_heads(in, o, launch)) return std::nullopt;
  const int64_t B = in.key.size(0), H = in.key.size(1), D = in.key.size(3), dim = moments_dim(D);
  const int64_t nq = ceil_div(in.query.size(2), o.block_q);
  const int64_t nk = ceil_div(in.key.size(2), o.block_k);
  const auto acc = in.key.options().dtype(at::kFloat), ints = acc.dtype(at::kInt);
  Prepared r;
  if (o.pool != Pool::even) {
    PooledInputs& pooled = r.centred.emplace().pooled;
    pooled.weights = allocate({B, H, nk * o.block_k}, acc);
    pooled.mass = allocate({B, H, nk}, acc);
    pooled.key_count = allocate({B, nk}, ints);
  }
  PooledInputs& pooled = r.centred ? r.centred->pooled : r.pooled;
  r.pooled.type = pooled.type = in.key.scalar_type();
  sm90::Moments p = moments_of(in, o, &pooled);
  p.chunks = 1;
  pooled.moments = allocate({B, H, 2, dim, dim}, in.key.options());
  p.matrices = pooled.moments.mutable_data_ptr();

  // pool: queries
  const Tensor query_mean = allocate({B, H, nq, D}, acc);
  pooled.query_count = allocate({B, nq}, ints);
  p.whole.query = pool_tensor(in.query, in.query_mask, o.block_q, query_mean);
  p.whole.query.count = pooled.query_count.mutable_data_ptr<int32_t>();

  // weigh keys
  Tensor plain, bias;  // of keys, for a plan
  if (r.centred) {
    r.centred->centre = pooled.centre = allocate({B, H, D}, acc);
    r.centred->moments = pooled.fine_moments = pooled.moments;
    pooled.centre_term = allocate({B, H, 2, dim}, acc);
    if (plan) {
      plain = allocate_like(pooled.key);
      bias = allocate({B, H, nk}, acc);
    }
    p.key_count = pooled.key_count.mutable_data_ptr<int>();
    p.made.scale = static_cast<float>(o.scale);
    p.made.weights = pooled.weights.mutable_data_ptr<float>();
    p.made.mass = pooled.mass.mutable_data_ptr<float>();
    p.made.key_bias = data_of<float>(bias);
    p.made.k_plain = data_of<float>(plain);
    p.whole.centre = pooled.centre.mutable_data_ptr<float>();
    p.whole.centre_term = pooled.centre_term.mutable_data_ptr<float>();
  } else {
    pooled.query = query_mean;
  }

  if (plan) {
    PlanParams& to = p.whole.plan = plan_params(B, H, H, nq, nk, D, in.query.size(2), o);
    r.planned.rows = empty_rows(to, ints);
    to.q_mean = p.whole.query.mean;
    to.k_mean = r.centred ? p.made.k_plain : p.k_mean;
    to.key_bias = p.made.key_bias;
  }
  if (!launch_moments(p, static_cast<int>(dim), launch)) return std::nullopt;
  return r;
}

Tensor moments_before(const Inputs& in, const Options& o, const WalkCut& cut, PooledInputs* pooled,
                      const std::function<void()>& launch_beside) {
  const Launch launch(in.key);
  sm90::Moments p = moments_of(in, o, pooled);
  p.chunks = cut.chunks;
  p.unit_tiles = cut.unit_tiles;
  const Tensor sums = empty_sums(p, cut.dim, in.key);
  p.sums = sums.mutable_data_ptr<float>();
  if (!launch_moments(p, cut.dim, launch)) return {};
  launch_beside();
  launch.check(
      order1_sum_others(p.sums, int64_t{p.B} * p.Hk, p.chunks, cut.dim, false, launch.stream));
  let_plan_start(pooled, sums);
  return sums;
}

#else

Tensor pool_moments(const Inputs&, const Options&, PooledInputs*, const Tensor&,
                    const std::function<void()>&) {
  return {};
}

std::optional<Prepared> prepare(const Inputs&, bool, const Options&) { return std::nullopt; }

bool weighs_with_moments(const Inputs&, const Options&, const Launch&) { return false; }

Tensor weigh_with_moments(const Inputs&, const Options&, const WeightsParams&, PooledInputs&,
                          PooledInputs&) {
  return {};
}

Tensor moments_before(const Inputs&, const Options&, const WalkCut&, PooledInputs*,
                      const std::function<void()>&) {
  return {};
}

#endif

}  // namespace mra::cuda
