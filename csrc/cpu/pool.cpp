// Stage pool: means over the valid rows of each block.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <numeric>

#include "../common/budget.h"
#include "stages_cpu.h"
#include "views.h"

namespace mra::cpu {
namespace {

// Blocks of queries, or of keys, of one resolution.
struct Blocks {
  Blocks(const Resolution& r, bool queries)
      : block(queries ? r.block_q : r.block_k),
        n(queries ? r.nq : r.nk),
        first(queries ? r.first_q : r.first_k) {}
  int64_t block, n, first;
};

}  // namespace

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

Pooled pool_levels(const Pooled& finest, const Options& o, bool queries) {
  const int64_t B = finest.mean.size(0), heads = finest.mean.size(1), D = finest.mean.size(3);
  const Resolution& last = o.resolutions.back();
  const int64_t all = queries ? last.first_q + last.nq : last.first_k + last.nk;
  Pooled result{at::empty({B, heads, all, D}, finest.mean.options()),
                at::empty({B, all}, finest.count.options())};
  result.mean.narrow(2, 0, finest.mean.size(2)).copy_(finest.mean);
  result.count.narrow(1, 0, finest.count.size(1)).copy_(finest.count);
  int32_t* counts = result.count.mutable_data_ptr<int32_t>();
  AT_DISPATCH_FLOATING_TYPES(finest.mean.scalar_type(), "mra_pool_levels", [&] {
    scalar_t* means = result.mean.mutable_data_ptr<scalar_t>();
    for (size_t r = 1; r < o.resolutions.size(); ++r) {
      const Blocks at(o.resolutions[r], queries), below(o.resolutions[r - 1], queries);
      const int64_t children = at.block / below.block;
      const auto first = [&](int64_t y) { return std::min(y * children, below.n); };
      for (int64_t b = 0; b < B; ++b) {
        int32_t* count = counts + b * all;
        for (int64_t y = 0; y < at.n; ++y) {
          count[at.first + y] = std::accumulate(count + below.first + first(y),
                                                count + below.first + first(y + 1), 0);
        }
      }
      at::parallel_for(0, B * heads * at.n, grain(children * D), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t head = item / at.n, y = item % at.n;
          const int32_t* count = counts + head / heads * all;
          scalar_t* mean = means + (head * all + at.first + y) * D;
          std::fill_n(mean, D, scalar_t(0));
          const scalar_t c = static_cast<scalar_t>(std::max<int32_t>(1, count[at.first + y]));
          for (int64_t child = first(y); child < first(y + 1); ++child) {
            const scalar_t part = static_cast<scalar_t>(count[below.first + child]) / c;
            add_scaled(mean, means + (head * all + below.first + child) * D, part, D);
          }
        }
      });
    }
  });
  return result;
}

Tensor pool_levels_backward(const Tensor& grad, const Tensor& count, const Options& o,
                            bool queries) {
  const int64_t B = grad.size(0), heads = grad.size(1), all = grad.size(2), D = grad.size(3);
  const Blocks finest(o.resolutions[0], queries);
  const Tensor result = at::zeros({B, heads, finest.n, D}, grad.options());
  const Tensor from = grad.contiguous(), counts = count.contiguous();
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "mra_pool_levels_backward", [&] {
    const int64_t work = static_cast<int64_t>(o.resolutions.size()) * D;
    at::parallel_for(0, B * heads * finest.n, grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / finest.n, y = item % finest.n;
        scalar_t* sum = result.mutable_data_ptr<scalar_t>() + item * D;
        for (const Resolution& r : o.resolutions) {
          const Blocks at(r, queries);
          const int64_t block = at.first + y / (at.block / finest.block);
          const int32_t c = counts.const_data_ptr<int32_t>()[head / heads * all + block];
          add_scaled(sum, from.const_data_ptr<scalar_t>() + (head * all + block) * D,
                     scalar_t(1) / static_cast<scalar_t>(std::max<int32_t>(1, c)), D);
        }
      }
    });
  });
  return result;
}

PooledInputs pool_inputs(const Inputs& in, const Options& o, bool query, bool key) {
  PooledInputs pooled;
  const auto means = [&](const Tensor& x, const OptTensor& mask, bool queries) {
    const Pooled finest = pool(x, mask, queries ? o.block_q : o.block_k);
    return o.levels.empty() ? finest : pool_levels(finest, o, queries);
  };
  if (query) {
    const Pooled q = means(in.query, in.query_mask, true);
    pooled.query = q.mean;
    pooled.query_count = q.count;
  }
  if (key || o.coarse != Coarse::none) {
    const Pooled k = means(in.key, in.key_mask, false);
    pooled.key = k.mean;
    pooled.key_count = k.count;
  }
  if (keeps_means(o)) pooled.value = means(in.value, in.key_mask, false).mean;
  return pooled;
}

}  // namespace mra::cpu
