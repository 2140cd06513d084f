// Stage plan on CUDA, and the transpose of its lists: allocate and launch plan_row.cu, plan_map.cu,
// plan_global.cu and plan_transpose.cu.
#include "plan.h"

#include <algorithm>
#include <limits>

#include "../common/budget.h"
#include "launch.h"
#include "level_stages.h"
#include "problem.h"

namespace mra::cuda {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();

}  // namespace

// query.mean [B, H, nq, D], key.mean [B, Hk, nk, D] -> row lists, as reference.py::plan selects.
// Scores stay on chip, but for rows that are too long and for global selection from more than
// plan_map holds, which takes a workspace of B * H * nq * nk floats. Where they stay,
// the block-coarse state comes with them.
Planned plan(const Pooled& query, const Pooled& key, const std::optional<PooledInputs>& pooled,
             int64_t N, const Options& options) {
  if (!options.levels.empty()) return plan_levels(query, key, N, options);
  const Launch launch(query.mean);
  const int64_t B = query.mean.size(0), H = query.mean.size(1), nq = query.mean.size(2);
  const int64_t nk = key.mean.size(2);
  const int64_t capacity = nq * row_capacity(options, nk);
  TORCH_CHECK_NOT_IMPLEMENTED(
      capacity <= kMaxInt && B * H * nq <= kMaxInt,
      "mra_attention on CUDA takes plans of at most 2^31 - 1 entries a head, got room for ",
      capacity, "; lower density or blocks_per_row, or use larger blocks");
  const auto ints = query.mean.options().dtype(at::kInt);
  PlanParams p = plan_params(B, H, key.mean.size(1), nq, nk, query.mean.size(3), N, options);
  Planned planned{empty_rows(p, ints), std::nullopt};
  const BlockList& rows = planned.rows;
  if (rows.start.numel() == 0) return planned;

  p.q_mean = query.mean.const_data_ptr<float>();
  p.k_mean = key.mean.const_data_ptr<float>();
  p.key_bias = data_of<float>(key.bias);
  p.q_count = query.count.const_data_ptr<int32_t>();
  p.k_count = key.count.const_data_ptr<int32_t>();
  p.beside = key.beside;
  const auto with_coarse = [&] {
    if (!pooled) return;
    const CoarseState& state = planned.coarse.emplace(
        CoarseState{allocate_like(query.mean), allocate({B, H, nq}, query.mean.options())});
    p.v_mean = pooled->value.const_data_ptr<float>();
    p.mean = state.mean.mutable_data_ptr<float>();
    p.lse = state.lse.mutable_data_ptr<float>();
    p.tf32 = at::isReducedFloatingType(pooled->type);
  };
  if (options.selection == Selection::row) {
    const PlanRowConfig config = plan_row_config(p, launch.device);
    if (config.coarse) with_coarse();
    const Tensor workspace = allocate({config.workspace_bytes()}, ints.dtype(at::kByte));
    launch.check(plan_row(p, config, workspace.mutable_data_ptr(), launch.stream));
    return planned;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(nq * nk <= int64_t{1} << 30,
                              "mra_attention on CUDA: selection=\"global\" takes maps of at most "
                              "2^30 pairs of blocks, got ",
                              nq, " x ", nk, "; use selection=\"row\" or larger blocks");
  const int64_t budget = map_budget(options, N, nk);
  if (plan_map_fits(p, launch.device)) {
    with_coarse();
    launch.check(plan_map(p, launch.device, budget, launch.stream));
    return planned;
  }
  const Tensor map = allocate({B, H, nq, nk}, ints);
  launch.check(plan_global(p, launch.device, budget,
                           reinterpret_cast<uint32_t*>(map.mutable_data_ptr<int32_t>()),
                           launch.stream));
  return planned;
}

// Row lists of nq query blocks -> column lists of nk key blocks, ascending; entries out of range
// are left out. O(entries) memory.
BlockList transpose(const BlockList& rows, int64_t nk) {
  const Launch launch(rows.index);
  const int64_t B = rows.start.size(0), H = rows.start.size(1), nq = rows.start.size(2);
  const int64_t capacity = rows.index.size(2);
  TORCH_CHECK_NOT_IMPLEMENTED(capacity <= kMaxInt && B * H * std::max(nq, nk) <= kMaxInt,
                              "mra_attention on CUDA takes plans of at most 2^31 - 1 entries a "
                              "head, got room for ",
                              capacity);
  const Tensor row_start = rows.start.contiguous(), row_count = rows.count.contiguous(),
               row_index = rows.index.contiguous();
  const auto ints = rows.index.options();
  BlockList columns{allocate({B, H, nk}, ints), allocate({B, H, nk}, ints),
                    allocate({B, H, capacity}, ints), allocate({2}, ints)};
  if (columns.start.numel() == 0) return columns;

  TransposeParams p{};
  p.row_start = row_start.const_data_ptr<int32_t>();
  p.row_count = row_count.const_data_ptr<int32_t>();
  p.row_index = row_index.const_data_ptr<int32_t>();
  p.start = columns.start.mutable_data_ptr<int32_t>();
  p.count = columns.count.mutable_data_ptr<int32_t>();
  p.index = columns.index.mutable_data_ptr<int32_t>();
  p.queues = columns.queues.mutable_data_ptr<int32_t>();
  p.heads = static_cast<int>(B * H);
  p.nq = static_cast<int>(nq);
  p.nk = static_cast<int>(nk);
  p.capacity = capacity;
  launch.check(plan_transpose(p, launch.device, launch.stream));
  columns.held = {row_start, row_count, row_index};
  return columns;
}

}  // namespace mra::cuda
