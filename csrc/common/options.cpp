#include "options.h"

#include <c10/util/Exception.h>

#include <cmath>

namespace mra {
namespace {

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

void check_budget(const CallOptions& call, Budget budget) {
  TORCH_CHECK_VALUE(!(call.density && call.blocks_per_row),
                    "density and blocks_per_row: got both (density=", *call.density,
                    "), expected exactly one");
  TORCH_CHECK_VALUE(call.density || call.blocks_per_row || budget == Budget::optional,
                    "density and blocks_per_row: got neither, expected exactly one");
  if (call.density) {
    // Written so that NaN fails too.
    TORCH_CHECK_VALUE(*call.density > 0 && *call.density <= 1, "density: got ", *call.density,
                      ", expected a number in (0, 1]");
  }
  if (call.blocks_per_row) {
    TORCH_CHECK_VALUE(call.blocks_per_row->sym_ge(1).guard_or_true(__FILE__, __LINE__),
                      "blocks_per_row: got ", *call.blocks_per_row,
                      ", expected an integer of at least 1");
  }
}

void check_at_least_0(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value >= 0, name, ": got ", value, ", expected an integer of at least 0");
}

}  // namespace

void check_block_size(const char* name, int64_t block) {
  TORCH_CHECK_VALUE(block == 16 || block == 32 || block == 64 || block == 128, name, ": got ",
                    block, ", expected one of 16, 32, 64, 128");
}

Options check_options(const CallOptions& call, Budget budget, int64_t head_dim) {
  check_budget(call, budget);
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
  o.density = call.density;
  o.coarse = parse_coarse(call.coarse);
  o.order = call.order;
  o.selection = parse_selection(call.selection);
  o.diagonal_blocks = call.diagonal_blocks;
  o.first_blocks = call.first_blocks;
  o.causal = call.is_causal;
  o.scale = scale;
  return o;
}

}  // namespace mra
