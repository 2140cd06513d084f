// Weights of pool = sampled, O(15 M D), in torch's own operators.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <cmath>
#include <limits>

#include "centred.h"

namespace mra::cpu {
namespace {

constexpr int64_t kSampledQueries = 14;
constexpr double kMinusInf = -std::numeric_limits<double>::infinity();

// Of `length` rows the numbers of the valid ones.
std::vector<int64_t> valid_rows(const Mask& mask, int64_t b, int64_t length) {
  std::vector<int64_t> found;
  for (int64_t i = 0; i < length; ++i) {
    if (mask(b, i)) found.push_back(i);
  }
  return found;
}

// Rows of r queries, evenly spread among the valid ones of a group [G, N, D], one head after
// another.
Tensor sample(const Tensor& group, const std::vector<int64_t>& valid, at::ScalarType acc) {
  const int64_t n = valid.size(), all = group.size(0) * n, r = std::min(all, kSampledQueries);
  const Tensor picked = at::empty({r, group.size(2)}, group.options().dtype(acc));
  for (int64_t t = 0; t < r; ++t) {
    const int64_t rank = all > r ? (2 * t + 1) * all / (2 * r) : t;
    picked.select(0, t).copy_(group.select(0, rank / n).select(0, valid[rank % n]));
  }
  return picked;
}

}  // namespace

// log of sum_i p_ij + r / 4 p_mean,j: p of r queries and of the mean query, the centre.
Tensor sampled_log_weights(const Inputs& in, const Tensor& centre, const Options& o) {
  const int64_t B = in.query.size(0), Hk = in.key.size(1), G = in.query.size(1) / Hk;
  const int64_t N = in.query.size(2), M = in.key.size(2), nk = ceil_div(M, o.block_k);
  const Tensor result = at::full({B, Hk, nk * o.block_k}, kMinusInf, centre.options());
  const Mask query_mask(in.query_mask);
  // Products stay on one thread, so that bits don't depend on how many there are.
  at::parallel_for(0, B * Hk, 1, [&](int64_t begin, int64_t end) {
    const SerialBlas serial;
    const at::AutoDispatchBelowADInplaceOrView below;  // of this thread
    // Under autocast products are of acc all the same.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / Hk, hk = item % Hk;
      const Tensor group = in.query.select(0, b).narrow(0, hk * G, G);
      const Tensor rows =
          at::cat({sample(group, valid_rows(query_mask, b, N), centre.scalar_type()),
                   centre.select(0, b).narrow(0, hk, 1)});
      Tensor keys = in.key.select(0, b).select(0, hk).to(centre.scalar_type());
      Tensor no_key;
      if (in.key_mask) {
        no_key = in.key_mask->select(0, b).logical_not();
        keys = keys.masked_fill(no_key.unsqueeze(1), 0);
      }
      Tensor logits = at::mm(rows, keys.contiguous().t()).mul_(o.scale);
      if (no_key.defined()) logits.masked_fill_(no_key, kMinusInf);
      logits = at::log_softmax(logits, 1);
      const int64_t r = rows.size(0) - 1;
      logits[r].add_(std::log(std::max<double>(1, r) / 4));
      result.select(0, b).select(0, hk).narrow(0, 0, M).copy_(at::logsumexp(logits, 0));
    }
  });
  return result;
}

}  // namespace mra::cpu
