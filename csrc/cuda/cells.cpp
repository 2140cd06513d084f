// coarse = row with levels: launches the kernels of sm80/cells_*.cuh.
#include <ATen/ATen.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../common/budget.h"
#include "coarse_shares.h"
#include "level_stages.h"
#include "problem.h"

namespace mra::cuda {

BlockList transpose(const BlockList& rows, int64_t nk);

namespace {

void set_means(Problem& p, const Tensor& key, const Tensor& value) {
  p.pooled_k = key.const_data_ptr();
  p.pooled_v = value.const_data_ptr();
}

void set_delta(CellsBackward& p, const Tensor& coarse_delta) {
  p.pooled_delta = coarse_delta.const_data_ptr<float>();
  p.delta_stride = coarse_delta.dim() == 4 ? coarse_delta.stride(0) : 0;
}

// Of the row lists of a resolution the first `most` entries of each, and the rest.
std::pair<BlockList, BlockList> cut(const BlockList& rows, int64_t most) {
  return {{rows.start, rows.count.clamp_max(most), rows.index},
          {rows.start.add(most), rows.count.sub(most).clamp_min(0), rows.index}};
}

// Cells of a row of resolution r + 1 whose children have places for their parts: as many as its
// level may split. None where these take more memory than some two tensors of queries.
int64_t cells_with_places(const Options& o, size_t r) {
  const auto& all = o.resolutions;
  if (r + 1 == all.size()) return 0;
  const Resolution& up = all[r + 1];
  const int64_t cells = std::min(o.levels[all.size() - 2 - r].cells, up.nk);
  return cells * (up.block_k / all[r].block_k) <= up.block_q ? cells : 0;
}

// Adds to `shares` what the rows of each query block give to the children of the first `cells` in
// its list, which are `rows`.
void add_candidates(CellsBackward p, const Tensor& shares, const BlockList& rows, int64_t cells,
                    const Options& o, Dtype dtype, const Launch& launch) {
  const Resolution &own = o.resolutions[p.r], &up = o.resolutions[p.r + 1];
  const int64_t places = cells * (up.block_k / own.block_k);
  const int64_t blocks = int64_t{p.B} * p.H * up.nq * ceil_div(places, 64);
  const int64_t wanted = ceil_div(int64_t{6} * launch.device.sms, blocks);
  p.places = static_cast<int>(places);
  p.splits = static_cast<int>(
      std::clamp<int64_t>(wanted, 1, std::min(up.block_q / 64, up.block_q / places)));
  const Tensor sums = allocate({2, p.B, p.H, up.nq, p.splits, places, p.D}, shares.options());
  p.pooled_grad_k = sums.mutable_data_ptr<float>();
  p.pooled_grad_v = p.pooled_grad_k + sums.numel() / 2;
  launch.check(cells_candidates(p, dtype, launch.device, launch.stream));
  const BlockList parents = transpose(rows, up.nk);
  CellsSum s{};
  s.levels = p.levels;
  s.parents = lists_of(parents);
  s.sums = sums.const_data_ptr<float>();
  s.shares = shares.mutable_data_ptr<float>();
  s.r = p.r;
  s.B = p.B;
  s.H = p.H;
  s.Hk = p.Hk;
  s.D = p.D;
  s.splits = p.splits;
  s.places = p.places;
  launch.check(cells_sum(s, launch.stream));
}

// Fills `shares` by the owners of the children of what the query blocks of `rows` have chosen.
void share_columns(CellsBackward p, const Tensor& shares, const BlockList& rows,
                   const BlockList& chosen, const Tensor& count, const Options& o, Dtype dtype,
                   const Launch& launch) {
  const Resolution &own = o.resolutions[p.r], &up = o.resolutions[p.r + 1];
  const BlockList parents = transpose(rows, up.nk);
  p.chosen = lists_of(chosen);
  p.parents = lists_of(parents);
  // Some waves of blocks of threads, as a key block that many rows have chosen takes long.
  const int64_t children = std::min<int64_t>(64, up.block_k / own.block_k);
  const int64_t items = ceil_div(own.nk, children) * p.B * p.Hk;
  p.splits = static_cast<int>(
      std::clamp<int64_t>(16 * launch.device.sms / items, 1, ceil_div(p.rows, 64)));
  const Tensor sums = allocate({2, p.splits, p.B, p.Hk, own.nk, p.D}, shares.options());
  p.pooled_grad_k = sums.mutable_data_ptr<float>();
  p.pooled_grad_v = p.pooled_grad_k + sums.numel() / 2;
  launch.check(cells_columns(p, dtype, launch.device, launch.stream));
  launch.check(share_sums(
      {sums.const_data_ptr<float>(), count.const_data_ptr<int>(), shares.mutable_data_ptr<float>(),
       p.splits, p.B, p.Hk, static_cast<int>(own.nk), p.D},
      launch.stream));
}

// Of the coarsest resolution: as without levels, by all rows but for what they have chosen.
Tensor coarsest_shares(BackwardParams p, const Tensor& key, const Tensor& value,
                       const Tensor& count, const BlockList& rows, const Options& o, Dtype dtype,
                       const Launch& launch) {
  const Resolution& own = o.resolutions.back();
  const Tensor k = key.narrow(2, own.first_k, own.nk).contiguous();
  const Tensor v = value.narrow(2, own.first_k, own.nk).contiguous();
  const BlockList lists = rows_of(rows, own), columns = transpose(lists, own.nk);
  p.pooled_k = k.const_data_ptr();
  p.pooled_v = v.const_data_ptr();
  p.key_count = count.const_data_ptr<int>();
  p.nk = static_cast<int>(own.nk);
  p.block_q = p.list_rows = static_cast<int>(own.block_q);
  p.block_k = static_cast<int>(own.block_k);
  p.log2_block_k = log2_of(own.block_k);
  p.row_lists = lists_of(lists);
  p.column_lists = lists_of(columns);
  return pooled_shares(p, dtype, launch, key);
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
  for (int r = 0; r < p.levels.count; ++r) {
    const bool coarsest = r + 1 == p.levels.count;
    const int64_t nk = all[r].nk, cells = cells_with_places(o, r);
    const Tensor count = key_count.narrow(1, all[r].first_k, nk).contiguous();
    p.r = r;
    if (coarsest) {
      shares.push_back(coarsest_shares(exact, key, value, count, rows, o, dtype, launch));
    } else {
      const auto [placed, others] = cut(rows_of(rows, all[r + 1]), cells);
      shares.push_back(allocate({2, p.B, p.Hk, nk, p.D}, acc));
      if (cells == all[r + 1].nk) {
        shares[r].zero_();
      } else {
        const BlockList chosen = r == 0 ? columns : columns_of(rows, all[r]);
        share_columns(p, shares[r], others, chosen, count, o, dtype, launch);
      }
      if (cells > 0) add_candidates(p, shares[r], placed, cells, o, dtype, launch);
    }
    spread.part[r] = shares[r].const_data_ptr<float>();
    spread.stride[r] = nk;
    spread.shift[r] = log2_of(all[r].block_k / o.block_k);
  }
  const Tensor result = allocate({2, p.B, p.Hk, all[0].nk, p.D}, acc);
  spread.to = result.mutable_data_ptr<float>();
  spread.heads = int64_t{2} * p.B * p.Hk;
  spread.n = static_cast<int>(all[0].nk);
  spread.D = p.D;
  launch.check(spread_levels(spread, launch.stream));
  return result;
}

}  // namespace mra::cuda
