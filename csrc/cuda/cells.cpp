// coarse = row with levels: launches the kernels of sm80/cells_*.cuh.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../common/budget.h"
#include "coarse_shares.h"
#include "level_stages.h"
#include "problem.h"

namespace mra::cuda {
namespace {

void set_means(Problem& p, const Tensor& key, const Tensor& value) {
  p.pooled_k = key.const_data_ptr();
  p.pooled_v = value.const_data_ptr();
}

void set_delta(CellsBackward& p, const Tensor& coarse_delta) {
  p.pooled_delta = coarse_delta.const_data_ptr<float>();
  p.delta_stride = coarse_delta.dim() == 4 ? coarse_delta.stride(0) : 0;
}

}  // namespace

void cells_forward(const ForwardParams& exact, const Tensor& key, const Tensor& value,
                   const Tensor& shares, const Levels& levels, Dtype dtype, const Launch& launch) {
  CellsForward p{exact};
  p.levels = levels;
  set_means(p, key, value);
  p.share = nullptr;
  p.shares = data_of<float>(shares);
  launch.check(cells_forward(p, dtype, launch.device, launch.stream));
}

void cells_rows(const BackwardParams& exact, const Tensor& key, const Tensor& value,
                const Tensor& coarse_delta, const Levels& levels, Dtype dtype,
                const Launch& launch) {
  CellsBackward p{exact};
  p.levels = levels;
  set_means(p, key, value);
  set_delta(p, coarse_delta);
  launch.check(cells_rows(p, dtype, launch.device, launch.stream));
}

Tensor cells_columns(const BackwardParams& exact, const Tensor& key, const Tensor& value,
                     const Tensor& key_count, const Tensor& coarse_delta, const BlockList& rows,
                     const BlockList& columns, const Options& o, Dtype dtype,
                     const Launch& launch) {
  CellsBackward p{exact};
  p.levels = levels_of(rows, key_count, o);
  set_means(p, key, value);
  set_delta(p, coarse_delta);
  const auto& all = o.resolutions;
  const auto acc = key.options().dtype(at::kFloat);
  SpreadLevels spread{};
  spread.count = p.levels.count;
  std::vector<Tensor> shares;
  BlockList chosen = columns, parents;
  for (int r = 0; r < p.levels.count; ++r) {
    const bool coarsest = r + 1 == p.levels.count;
    if (!coarsest) parents = columns_of(rows, all[r + 1]);
    const int64_t nk = all[r].nk;
    p.r = r;
    p.chosen = lists_of(chosen);
    p.parents = coarsest ? Lists{} : lists_of(parents);
    // Some waves of blocks of threads, as a key block that many rows have chosen takes long.
    const int64_t children = coarsest ? 64 : all[r + 1].block_k / all[r].block_k;
    const int64_t items = ceil_div(nk, std::min<int64_t>(64, children)) * p.B * p.Hk;
    p.splits = static_cast<int>(
        std::clamp<int64_t>(16 * launch.device.sms / items, 1, ceil_div(p.rows, 64)));
    const Tensor sums = at::empty({2, p.splits, p.B, p.Hk, nk, p.D}, acc);
    shares.push_back(at::empty({2, p.B, p.Hk, nk, p.D}, acc));
    p.pooled_grad_k = sums.mutable_data_ptr<float>();
    p.pooled_grad_v = p.pooled_grad_k + sums.numel() / 2;
    launch.check(cells_columns(p, dtype, launch.device, launch.stream));
    const Tensor count = key_count.narrow(1, all[r].first_k, nk).contiguous();
    launch.check(share_sums(
        {sums.const_data_ptr<float>(), count.const_data_ptr<int>(),
         shares[r].mutable_data_ptr<float>(), p.splits, p.B, p.Hk, static_cast<int>(nk), p.D},
        launch.stream));
    spread.part[r] = shares[r].const_data_ptr<float>();
    spread.stride[r] = nk;
    spread.shift[r] = log2_of(all[r].block_k / o.block_k);
    chosen = parents;
  }
  const Tensor result = at::empty({2, p.B, p.Hk, all[0].nk, p.D}, acc);
  spread.to = result.mutable_data_ptr<float>();
  spread.heads = int64_t{2} * p.B * p.Hk;
  spread.n = static_cast<int>(all[0].nk);
  spread.D = p.D;
  launch.check(spread_levels(spread, launch.stream));
  return result;
}

}  // namespace mra::cuda
