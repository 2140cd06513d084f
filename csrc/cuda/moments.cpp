#include "moments.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "../common/budget.h"
#include "order1.h"
#include "problem.h"
#include "sm90/moments.h"

namespace mra::cuda {

bool order1_on_hopper(const Tensor& key, const Options& o, const Launch& launch) {
#ifdef MRA_SM90A
  const int64_t D = key.size(3);
  return launch.device.major == 9 && key.scalar_type() == at::kBFloat16 && !o.causal && D > 32 &&
         D <= 128;
#else
  return false;
#endif
}

#ifdef MRA_SM90A

Tensor pool_moments(const Inputs& in, const Options& o, PooledInputs* pooled,
                    const Tensor& key_count, const std::function<void()>& launch_beside) {
  const int64_t B = in.key.size(0), Hk = in.key.size(1), M = in.key.size(2), D = in.key.size(3);
  const int64_t nk = ceil_div(M, o.block_k);
  const Launch launch(in.key);
  if (!order1_on_hopper(in.key, o, launch) || o.block_k > 64 ||
      M > std::numeric_limits<int>::max() / 2) {
    return {};
  }
  const int dim = static_cast<int>(moments_dim(D));
  const auto acc = in.key.options().dtype(at::kFloat);
  sm90::Moments p{};
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
  Tensor count = key_count;
  if (pooled != nullptr) {
    pooled->key = at::empty({B, Hk, nk, D}, acc);
    pooled->value = at::empty({B, Hk, nk, D}, acc);
    p.k_mean = pooled->key.mutable_data_ptr<float>();
    p.v_mean = pooled->value.mutable_data_ptr<float>();
    if (pooled->weights.defined()) {
      count = pooled->key_count;
      p.weights = pooled->weights.const_data_ptr<float>();
    } else {
      count = pooled->key_count = at::empty({B, nk}, acc.dtype(at::kInt));
      p.key_count = count.mutable_data_ptr<int>();
    }
    if (rounds_pooled(in.key, o) && o.levels.empty()) {
      pooled->key_rounded = at::empty({B, Hk, nk, D}, in.key.options());
      pooled->value_rounded = at::empty({B, Hk, nk, D}, in.key.options());
      p.k_rounded = pooled->key_rounded.mutable_data_ptr();
      p.v_rounded = pooled->value_rounded.mutable_data_ptr();
    }
  }
  p.chunks = sm90::tile_chunks(p.B * p.Hk, p.M, dim, launch.device);
  p.unit_tiles = 1;
  const Tensor matrices = at::empty({B, Hk, 2, dim, dim}, in.key.options());
  p.matrices = matrices.mutable_data_ptr();
  Tensor sums;
  if (p.chunks > 1) {
    sums = at::empty({B, Hk, p.chunks, 2, dim, dim}, acc);
    p.sums = sums.mutable_data_ptr<float>();
  }
  const cudaError_t error = dim == 64 ? sm90::launch_moments<64>(p, launch.device, launch.stream)
                                      : sm90::launch_moments<128>(p, launch.device, launch.stream);
  if (error == cudaErrorNotSupported) return {};
  launch.check(error);
  launch_beside();
  if (!sums.defined()) return matrices;
  Order1Sum s{};
  s.dtype = Dtype::bf16;
  s.B = p.B;
  s.heads = p.Hk;
  s.units = 1;
  s.chunks = p.chunks;
  s.dim = dim;
  s.key_count = count.const_data_ptr<int>();
  s.nk = p.nk;
  s.sums = p.sums;
  s.matrices = p.matrices;
  s.factor = 1.f;
  launch.check(order1_sum(s, launch.stream));
  if (pooled != nullptr) {
    pooled->beside = true;
    pooled->held = sums;
  }
  return matrices;
}

#else

Tensor pool_moments(const Inputs&, const Options&, PooledInputs*, const Tensor&,
                    const std::function<void()>&) {
  return {};
}

#endif

}  // namespace mra::cuda
