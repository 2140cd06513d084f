// Stage pool on CUDA: allocates and launches pool_fwd.cu.
#include "pool.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "../common/budget.h"
#include "launch.h"
#include "moments.h"

namespace mra::cuda {

// x [B, H, L, D] -> mean [B, H, n, D] float32 and count [B, n] int32, n = ceil(L / block).
Pooled pool(const Tensor& x_in, const OptTensor& mask, int64_t block) {
  const Launch launch(x_in);
  const Tensor x = with_aligned_rows(x_in);
  const int64_t B = x.size(0), H = x.size(1), L = x.size(2), D = x.size(3);
  const int64_t n = ceil_div(L, block);
  TORCH_CHECK_NOT_IMPLEMENTED(B * H * n <= std::numeric_limits<int>::max(),
                              "mra_attention on CUDA takes at most 2^31 - 1 blocks in all, got ",
                              B * H * n);
  Pooled out{at::empty({B, H, n, D}, x.options().dtype(at::kFloat)),
             at::empty({B, n}, x.options().dtype(at::kInt))};
  if (out.mean.numel() == 0) {
    out.count.zero_();
    return out;
  }

  PoolParams p;
  p.x = x.const_data_ptr();
  p.stride = strides_of(x);
  p.mask = mask ? mask->const_data_ptr<bool>() : nullptr;
  p.mean = out.mean.mutable_data_ptr<float>();
  p.count = out.count.mutable_data_ptr<int32_t>();
  p.B = static_cast<int>(B);
  p.H = static_cast<int>(H);
  p.n = static_cast<int>(n);
  p.L = L;
  p.D = static_cast<int>(D);
  p.block = static_cast<int>(block);
  p.dtype = dtype_of(x);
  launch.check(pool_forward(p, launch.stream));
  return out;
}

PooledInputs pool_keys(const Inputs& in, const Options& o) {
  PooledInputs pooled;
  if (has_order1(o)) pooled.moments = pool_moments(in, o, &pooled, {});
  if (pooled.moments.defined()) return pooled;
  const Pooled key = pool(in.key, in.key_mask, o.block_k);
  pooled.key = key.mean;
  pooled.key_count = key.count;
  pooled.value = pool(in.value, in.key_mask, o.block_k).mean;
  return pooled;
}

}  // namespace mra::cuda
