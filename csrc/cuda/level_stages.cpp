#include "level_stages.h"

#include <limits>

#include "../common/levels.h"
#include "problem.h"

namespace mra::cuda {

BlockList transpose(const BlockList& rows, int64_t nk);

Levels levels_of(const BlockList& rows, const Tensor& key_count, const Options& o) {
  Levels l{};
  const auto& all = o.resolutions;
  TORCH_CHECK_NOT_IMPLEMENTED(all.size() <= kMaxResolutions, "levels: got ", o.levels.size(),
                              " on a GPU, expected at most ", kMaxResolutions - 1, " there");
  TORCH_CHECK_NOT_IMPLEMENTED(all_query_blocks(all) <= std::numeric_limits<int>::max() / 2 &&
                                  all_key_blocks(all) <= std::numeric_limits<int>::max() / 2,
                              "mra_attention on CUDA takes at most 2^30 blocks of a head, got ",
                              all_query_blocks(all), " and ", all_key_blocks(all));
  l.count = static_cast<int>(all.size());
  l.query_blocks = static_cast<int>(all_query_blocks(all));
  l.key_blocks = static_cast<int>(all_key_blocks(all));
  l.causal = o.causal;
  for (int r = 0; r < l.count; ++r) {
    l.at[r] = {log2_of(all[r].block_q),          log2_of(all[r].block_k),
               static_cast<int>(all[r].nq),      static_cast<int>(all[r].nk),
               static_cast<int>(all[r].first_q), static_cast<int>(all[r].first_k)};
  }
  l.rows = lists_of(rows);
  l.key_count = key_count.const_data_ptr<int>();
  return l;
}

BlockList rows_of(const BlockList& rows, const Resolution& r) {
  return {rows.start.narrow(2, r.first_q, r.nq).contiguous(),
          rows.count.narrow(2, r.first_q, r.nq).contiguous(), rows.index, rows.queues};
}

BlockList columns_of(const BlockList& rows, const Resolution& r) {
  return transpose(rows_of(rows, r), r.nk);
}

Pooled pool_levels(const Pooled& finest, const Tensor& count, const Options& o, bool queries) {
  const Launch launch(finest.mean);
  const int64_t B = finest.mean.size(0), heads = finest.mean.size(1), D = finest.mean.size(3);
  const auto& all = o.resolutions;
  const int64_t blocks = queries ? all_query_blocks(all) : all_key_blocks(all);
  TORCH_CHECK_NOT_IMPLEMENTED(B * heads * blocks <= std::numeric_limits<int>::max(),
                              "mra_attention on CUDA takes at most 2^31 - 1 blocks in all, got ",
                              B * heads * blocks);
  const bool counts = !count.defined();
  Pooled result{allocate({B, heads, blocks, D}, finest.mean.options()),
                counts ? allocate({B, blocks}, finest.mean.options().dtype(at::kInt)) : count};
  float* means = result.mean.mutable_data_ptr<float>();
  int* sums = result.count.mutable_data_ptr<int>();
  PoolLevel p{};
  p.B = static_cast<int>(B);
  p.heads = static_cast<int>(heads);
  p.D = static_cast<int>(D);
  p.to_stride = blocks;
  for (size_t r = 0; r < all.size(); ++r) {
    const auto n = [&](size_t i) { return queries ? all[i].nq : all[i].nk; };
    const auto first = [&](size_t i) { return queries ? all[i].first_q : all[i].first_k; };
    const auto block = [&](size_t i) { return queries ? all[i].block_q : all[i].block_k; };
    const size_t below = r == 0 ? 0 : r - 1;
    p.n = static_cast<int>(n(r));
    p.n_from = static_cast<int>(n(below));
    p.children = static_cast<int>(block(r) / block(below));
    p.from = r == 0 ? finest.mean.const_data_ptr<float>() : means + first(below) * D;
    p.from_stride = r == 0 ? n(0) : blocks;
    // The counts of block_k that come with values are those of keys.
    const bool own = r == 0 && counts;
    p.from_count = own ? finest.count.const_data_ptr<int>() : sums + first(below);
    p.from_count_stride = own ? n(0) : blocks;
    p.to = means + first(r) * D;
    p.to_count = counts ? sums + first(r) : nullptr;
    launch.check(pool_level(p, launch.stream));
  }
  return result;
}

BlockRows merge_block_rows(const BlockRows& rows, int64_t children) {
  const Launch launch(rows.lse);
  const int64_t B = rows.lse.size(0), H = rows.lse.size(1), D = rows.grad.size(3);
  const int64_t n = ceil_div(rows.lse.size(2), children);
  const auto options = rows.lse.options();
  BlockRows result{allocate({B, H, n}, options), allocate({B, H, n, D}, options),
                   allocate({B, H, n}, options)};
  MergeBlockRows p{};
  p.from_lse = rows.lse.const_data_ptr<float>();
  p.from_grad = rows.grad.const_data_ptr<float>();
  p.from_delta = rows.delta.const_data_ptr<float>();
  p.lse = result.lse.mutable_data_ptr<float>();
  p.grad = result.grad.mutable_data_ptr<float>();
  p.delta = result.delta.mutable_data_ptr<float>();
  p.heads = B * H;
  p.n_from = static_cast<int>(rows.lse.size(2));
  p.n = static_cast<int>(n);
  p.children = static_cast<int>(children);
  p.D = static_cast<int>(D);
  launch.check(merge_block_rows(p, launch.stream));
  return result;
}

Planned plan_levels(const Pooled& query, const Pooled& key, int64_t N, const Options& o) {
  const Launch launch(query.mean);
  const int64_t B = query.mean.size(0), H = query.mean.size(1), D = query.mean.size(3);
  const auto& all = o.resolutions;
  const auto rooms = list_capacities(o, all);
  const int64_t blocks = all_query_blocks(all), capacity = plan_capacity(o, all);
  const auto ints = query.mean.options().dtype(at::kInt);
  Planned planned;
  BlockList& rows = planned.rows = {allocate({B, H, blocks}, ints), allocate({B, H, blocks}, ints),
                                    allocate({B, H, capacity}, ints), allocate({2}, ints)};
  PlanLevel p{};
  p.levels = levels_of(rows, key.count, o);
  p.first = forced_first(o);
  p.capacity = p.offset = capacity;
  for (size_t r = all.size(); r-- > 0;) {
    Options own = o;
    own.block_q = all[r].block_q;
    own.block_k = all[r].block_k;
    p.plan = plan_params(B, H, key.mean.size(1), all[r].nq, all[r].nk, D, N, own);
    if (r > 0) {
      p.plan.blocks_per_row = o.levels[all.size() - 1 - r].cells;
      p.plan.density = 0;
    }
    p.plan.diagonal_reach = o.diagonal_blocks > 0 ? forced_reach(o) : -1;
    p.plan.row_capacity = static_cast<int>(rooms[r]);
    p.plan.q_mean = query.mean.const_data_ptr<float>();
    p.plan.k_mean = key.mean.const_data_ptr<float>();
    p.plan.q_count = query.count.const_data_ptr<int32_t>();
    p.plan.k_count = key.count.const_data_ptr<int32_t>();
    p.plan.start = rows.start.mutable_data_ptr<int32_t>();
    p.plan.count = rows.count.mutable_data_ptr<int32_t>();
    p.plan.index = rows.index.mutable_data_ptr<int32_t>();
    p.plan.queues = rows.queues.mutable_data_ptr<int32_t>();
    p.r = static_cast<int>(r);
    p.offset -= all[r].nq * rooms[r];
    p.parent_capacity = static_cast<int>(r + 1 < all.size() ? rooms[r + 1] : 0);
    const int64_t bytes = plan_level_workspace(p, launch.device);
    const Tensor workspace = allocate({bytes}, ints.dtype(at::kByte));
    launch.check(plan_level(p, workspace.mutable_data_ptr(), launch.device, launch.stream));
  }
  return planned;
}

namespace {

void fill(CoarseLevels& p, const PooledInputs& in, const BlockList& rows, const Options& o) {
  p.levels = levels_of(rows, in.key_count, o);
  p.B = static_cast<int>(in.query.size(0));
  p.H = static_cast<int>(in.query.size(1));
  p.Hk = static_cast<int>(in.key.size(1));
  p.D = static_cast<int>(in.query.size(3));
  p.scale = static_cast<float>(o.scale);
  p.q_mean = in.query.const_data_ptr<float>();
  p.k_mean = in.key.const_data_ptr<float>();
  p.v_mean = in.value.const_data_ptr<float>();
}

// Of gradients of the means of all resolutions, what each block of block_q or block_k gets.
Tensor spread(const Tensor& grad, const Options& o, bool queries, const Launch& launch) {
  const auto& all = o.resolutions;
  const int64_t n = queries ? all[0].nq : all[0].nk;
  const Tensor result = allocate({grad.size(0), grad.size(1), n, grad.size(3)}, grad.options());
  SpreadLevels p{};
  p.count = static_cast<int>(all.size());
  for (int r = 0; r < p.count; ++r) {
    const auto& at = all[r];
    p.part[r] = grad.const_data_ptr<float>() + (queries ? at.first_q : at.first_k) * grad.size(3);
    p.stride[r] = grad.size(2);
    p.shift[r] = log2_of(queries ? at.block_q / o.block_q : at.block_k / o.block_k);
  }
  p.to = result.mutable_data_ptr<float>();
  p.heads = grad.size(0) * grad.size(1);
  p.n = static_cast<int>(n);
  p.D = static_cast<int>(grad.size(3));
  launch.check(spread_levels(p, launch.stream));
  return result;
}

}  // namespace

CoarseState coarse_levels(const PooledInputs& in, const BlockList& rows, const Options& o) {
  const Launch launch(in.query);
  const int64_t B = in.query.size(0), H = in.query.size(1), D = in.query.size(3);
  const int64_t nq = o.resolutions[0].nq, count = static_cast<int64_t>(o.resolutions.size());
  const auto options = in.query.options();
  CoarseState state{allocate({B, H, nq, D}, options), allocate({B, H, nq}, options),
                    allocate({B, H, nq, count}, options)};
  const Tensor row_mean = allocate_like(in.query);
  const Tensor row_lse = allocate({B, H, in.query.size(2)}, options);
  CoarseLevelsForward p{};
  fill(p, in, rows, o);
  p.row_mean = row_mean.mutable_data_ptr<float>();
  p.row_lse = row_lse.mutable_data_ptr<float>();
  p.mean = state.mean.mutable_data_ptr<float>();
  p.lse = state.lse.mutable_data_ptr<float>();
  p.parts = state.parts.mutable_data_ptr<float>();
  launch.check(coarse_levels(p, launch.stream));
  return state;
}

Grads coarse_levels_backward(const PooledInputs& in, const BlockList& rows,
                             const BlockList& columns, const BlockRows& back, const Options& o) {
  const Launch launch(in.query);
  const Grads grads{allocate_like(in.query), allocate_like(in.key), allocate_like(in.value)};
  CoarseLevelsBackward p{};
  fill(p, in, rows, o);
  std::vector<BlockList> lists{columns};
  for (size_t r = 1; r < o.resolutions.size(); ++r) {
    lists.push_back(columns_of(rows, o.resolutions[r]));
  }
  for (size_t r = 0; r < lists.size(); ++r) p.columns[r] = lists_of(lists[r]);
  p.lse = back.lse.const_data_ptr<float>();
  p.grad_out = back.grad.const_data_ptr<float>();
  p.delta = back.delta.const_data_ptr<float>();
  p.q_count = in.query_count.const_data_ptr<int>();
  p.grad_q = grads.query.mutable_data_ptr<float>();
  p.grad_k = grads.key.mutable_data_ptr<float>();
  p.grad_v = grads.value.mutable_data_ptr<float>();
  launch.check(coarse_levels_backward(p, launch.stream));
  return {spread(grads.query, o, true, launch), spread(grads.key, o, false, launch),
          spread(grads.value, o, false, launch)};
}

Tensor split_shares(const Tensor& share, const Tensor& parts, int64_t block_q) {
  const Launch launch(share);
  const int64_t B = share.size(0), H = share.size(1), N = share.size(2);
  const Tensor shares = allocate({B, H, parts.size(3), N}, share.options());
  SplitShares p{};
  p.share = share.const_data_ptr<float>();
  p.parts = parts.const_data_ptr<float>();
  p.shares = shares.mutable_data_ptr<float>();
  p.heads = B * H;
  p.N = N;
  p.nq = static_cast<int>(parts.size(2));
  p.block_q = static_cast<int>(block_q);
  p.count = static_cast<int>(parts.size(3));
  launch.check(split_shares(p, launch.stream));
  return shares;
}

}  // namespace mra::cuda
