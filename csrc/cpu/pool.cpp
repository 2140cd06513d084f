// Stage pool: means over the valid rows of each block.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <array>

#include "../common/budget.h"
#include "stages_cpu.h"
#include "views.h"

namespace mra::cpu {

Pooled pool(const Tensor& x, const OptTensor& mask, int64_t block) {
  const int64_t B = x.size(0), H = x.size(1), L = x.size(2), D = x.size(3);
  const int64_t n = ceil_div(L, block);
  Tensor mean = at::empty({B, H, n, D}, x.options().dtype(acc_type(x.scalar_type())));
  Tensor count = at::empty({B, n}, x.options().dtype(at::kInt));
  const Mask valid(mask);
  int32_t* counts = count.mutable_data_ptr<int32_t>();
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t y = 0; y < n; ++y) {
      const int64_t end = std::min(L, (y + 1) * block);
      int32_t c = 0;
      for (int64_t i = y * block; i < end; ++i) c += valid(b, i);
      counts[b * n + y] = c;
    }
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "mra_pool", [&] {
    using A = acc_t<scalar_t>;
    const Heads<scalar_t> heads(x);
    A* means = mean.mutable_data_ptr<A>();
    at::parallel_for(0, B * H * n, grain(block * D), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / n / H, h = item / n % H, y = item % n;
        const Rows<scalar_t> rows = heads.head(b, h);
        A* m = means + item * D;
        std::fill_n(m, D, A(0));
        const int64_t last = std::min(L, (y + 1) * block);
        // Sums of sums of 16 rows: rounding grows with 16 + block / 16 instead of block.
        for (int64_t first = y * block; first < last; first += 16) {
          std::array<A, 256> sum{};
          for (int64_t i = first; i < std::min(last, first + 16); ++i) {
            if (valid(b, i)) add_row(rows.row(i), D, sum.data());
          }
          for (int64_t d = 0; d < D; ++d) m[d] += sum[d];
        }
        const A c = static_cast<A>(std::max<int32_t>(1, counts[b * n + y]));
        for (int64_t d = 0; d < D; ++d) m[d] /= c;
      }
    });
  });
  return {mean, count};
}

PooledInputs pool_inputs(const Inputs& in, const Options& o, bool query, bool key) {
  PooledInputs pooled;
  if (query) {
    const Pooled q = pool(in.query, in.query_mask, o.block_q);
    pooled.query = q.mean;
    pooled.query_count = q.count;
  }
  if (key || o.coarse != Coarse::none) {
    const Pooled k = pool(in.key, in.key_mask, o.block_k);
    pooled.key = k.mean;
    pooled.key_count = k.count;
  }
  if (o.coarse != Coarse::none) pooled.value = pool(in.value, in.key_mask, o.block_k).mean;
  return pooled;
}

}  // namespace mra::cpu
