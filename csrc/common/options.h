// Options of a call: as they come through an operator's schema, checked, and as the stages read
// them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>

#include "stages.h"

namespace mra {

// Options as a call gives them; the names are those of the schemas in registration.cpp. What an
// operator doesn't take keeps its default.
struct CallOptions {
  std::optional<c10::SymInt> blocks_per_row;
  OptDensity density;  // one for all heads, or one for each
  int64_t block_q, block_k;
  std::string_view coarse = "none";
  int64_t order = 0;
  std::string_view selection = "row";
  int64_t diagonal_blocks = 0, first_blocks = 0;
  bool is_causal;
  std::optional<double> scale;
  at::OptionalIntArrayRef levels = std::nullopt;  // block, cells, block, cells, ...: coarsest first
  std::string_view pool = "even";
  bool keep = true;
};

// The `coarse` of a plan, which has none: what a pool other than even needs beside it.
inline std::string_view plan_coarse(std::string_view pool) {
  return pool == "even" ? "none" : "row";
}

// Whether a call must give a budget (density or blocks_per_row).
enum class Budget {
  required,  // exactly one of the two: a plan is made here
  optional,  // at most one: a plan is given, so the budget isn't used
};

// Checks every option; raises ValueError or NotImplementedError that names the bad one.
// A symbolic blocks_per_row (only while tracing) is checked, but left out of the result.
Options check_options(const CallOptions& call, Budget budget, int64_t heads, int64_t head_dim);

// Raises ValueError unless `block` is one of 16, 32, 64, 128.
void check_block_size(const char* name, int64_t block);

}  // namespace mra
