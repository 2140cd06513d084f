#include "options.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace mra {
namespace {

constexpr int64_t kMaxLevelBlock = int64_t{1} << 30;

Coarse parse_coarse(std::string_view name) {
  if (name == "none") return Coarse::none;
  if (name == "block") return Coarse::block;
  TORCH_CHECK_VALUE(name == "row", "coarse: got '", name,
                    "', expected one of 'none', 'block', 'row'");
  return Coarse::row;
}

Selection parse_selection(std::string_view name) {
  if (name == "global") return Selection::global;
  TORCH_CHECK_VALUE(name == "row", "selection: got '", name, "', expected 'row' or 'global'");
  return Selection::row;
}

Pool parse_pool(std::string_view name) {
  if (name == "even") return Pool::even;
  if (name == "centred") return Pool::centred;
  TORCH_CHECK_VALUE(name == "sampled", "pool: got '", name,
                    "', expected one of 'even', 'centred', 'sampled'");
  return Pool::sampled;
}

void check_pool_beside(const CallOptions& call) {
  if (call.pool == "even") return;
  TORCH_CHECK_VALUE(call.coarse == "row", "pool: got '", call.pool, "' with coarse '", call.coarse,
                    "', expected coarse 'row' beside it");
  TORCH_CHECK_NOT_IMPLEMENTED(call.levels.value_or(at::IntArrayRef()).empty(), "pool: got '",
                              call.pool, "' with levels, expected 'even' beside levels");
  TORCH_CHECK_NOT_IMPLEMENTED(!call.is_causal || call.pool == "centred", "pool: got '", call.pool,
                              "' with is_causal, expected 'even' or 'centred'");
}

void check_budget(const CallOptions& call, Budget budget, int64_t heads) {
  TORCH_CHECK_VALUE(!(call.density && call.blocks_per_row),
                    "density and blocks_per_row: got both (density=", *call.density,
                    "), expected exactly one");
  TORCH_CHECK_VALUE(call.density || call.blocks_per_row || budget == Budget::optional,
                    "density and blocks_per_row: got neither, expected exactly one");
  if (call.density) {
    const int64_t n = call.density->size();
    TORCH_CHECK_VALUE(n == 1 || n == heads, "density: got ", n,
                      " numbers, expected one, or one for each of the ", heads, " heads of query");
    for (const double density : *call.density) {
      // Written so that NaN fails too.
      TORCH_CHECK_VALUE(density > 0 && density <= 1, "density: got ", density,
                        ", expected a number in (0, 1]");
    }
    const bool by_row = call.selection == "row" && call.levels.value_or(at::IntArrayRef()).empty();
    TORCH_CHECK_NOT_IMPLEMENTED(n == 1 || by_row, "density: got one for each head with ",
                                call.selection == "row" ? "levels" : "selection 'global'",
                                ", expected one for all heads, or selection 'row' without levels");
  }
  if (call.blocks_per_row) {
    TORCH_CHECK_VALUE(call.blocks_per_row->sym_ge(1).guard_or_true(__FILE__, __LINE__),
                      "blocks_per_row: got ", *call.blocks_per_row,
                      ", expected an integer of at least 1");
  }
}

// Each block a power of two and at least twice the next one, the last at least twice block_q and
// block_k, which are powers of two.
std::vector<Level> parse_levels(const CallOptions& call) {
  const at::IntArrayRef given = call.levels.value_or(at::IntArrayRef());
  TORCH_CHECK_VALUE(given.size() % 2 == 0, "levels: got ", given.size(),
                    " numbers, expected pairs (block, cells per row)");
  std::vector<Level> levels;
  for (size_t i = 0; i < given.size(); i += 2) levels.push_back({given[i], given[i + 1]});
  for (size_t i = 0; i < levels.size(); ++i) {
    const bool last = i + 1 == levels.size();
    const int64_t next = last ? std::max(call.block_q, call.block_k) : levels[i + 1].block;
    const int64_t block = levels[i].block;
    TORCH_CHECK_VALUE(block >= 2 * next && block <= kMaxLevelBlock && (block & (block - 1)) == 0,
                      "levels: got block ", block, " above ", last ? "block_size " : "", next,
                      ", expected a power of two, at least twice what follows and at most ",
                      kMaxLevelBlock);
    TORCH_CHECK_VALUE(levels[i].cells >= 1, "levels: got ", levels[i].cells,
                      " cells per row for block ", block, ", expected at least 1");
  }
  TORCH_CHECK_VALUE(levels.empty() || call.selection == "row", "levels: got selection '",
                    call.selection, "', expected 'row' beside levels");
  return levels;
}

void check_at_least_0(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value >= 0, name, ": got ", value, ", expected an integer of at least 0");
}

}  // namespace

void check_block_size(const char* name, int64_t block) {
  TORCH_CHECK_VALUE(block == 16 || block == 32 || block == 64 || block == 128, name, ": got ",
                    block, ", expected one of 16, 32, 64, 128");
}

Options check_options(const CallOptions& call, Budget budget, int64_t heads, int64_t head_dim) {
  check_budget(call, budget, heads);
  check_block_size("block_q", call.block_q);
  check_block_size("block_k", call.block_k);
  TORCH_CHECK_VALUE(call.order == 0 || call.order == 1, "order: got ", call.order,
                    ", expected 0 or 1");
  check_at_least_0("diagonal_blocks", call.diagonal_blocks);
  check_at_least_0("first_blocks", call.first_blocks);
  const double scale = call.scale.value_or(1 / std::sqrt(static_cast<double>(head_dim)));
  TORCH_CHECK_VALUE(std::isfinite(scale), "scale: got ", scale, ", expected a finite number");

  Options o;
  o.block_q = call.block_q;
  o.block_k = call.block_k;
  if (call.blocks_per_row) o.blocks_per_row = call.blocks_per_row->maybe_as_int();
  if (call.density) {
    o.density = *std::max_element(call.density->begin(), call.density->end());
    if (call.density->size() > 1) o.head_density = call.density->vec();
  }
  o.coarse = parse_coarse(call.coarse);
  o.order = call.order;
  o.selection = parse_selection(call.selection);
  o.diagonal_blocks = call.diagonal_blocks;
  o.first_blocks = call.first_blocks;
  o.causal = call.is_causal;
  o.scale = scale;
  o.levels = parse_levels(call);
  o.pool = parse_pool(call.pool);
  o.keep = call.keep;
  check_pool_beside(call);
  return o;
}

}  // namespace mra
