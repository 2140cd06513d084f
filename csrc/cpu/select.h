// Stage plan: how candidates are ranked, whatever they are candidates for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace mra::cpu {

constexpr int32_t kCrossing = 4;  // above every count of met conditions

template <typename A>
struct Candidate {
  A score;
  int32_t tier;
  int32_t index;  // y, or x * nk + y under global
};

template <typename A>
bool goes_before(const Candidate<A>& a, const Candidate<A>& b) {
  if (a.tier != b.tier) return a.tier > b.tier;
  if (a.score != b.score) return a.score > b.score;
  return a.index < b.index;
}

// An order needs numbers: NaN counts as the highest score.
template <typename A>
A ordered(A score) {
  return std::isnan(score) ? std::numeric_limits<A>::infinity() : score;
}

// The first `budget` candidates, by ascending index.
template <typename A>
void keep_best(std::vector<Candidate<A>>& all, int64_t budget) {
  if (budget < static_cast<int64_t>(all.size())) {
    std::nth_element(all.begin(), all.begin() + budget, all.end(), goes_before<A>);
    all.resize(budget);
  }
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.index < b.index; });
}

}  // namespace mra::cpu
