// Under torch.autocast, query, key and value are cast to the autocast dtype, as for
// scaled_dot_product_attention. float64 is left alone, as torch does.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <tuple>

#include "common/stages.h"

namespace mra {
namespace {

using c10::SymInt;

template <c10::DeviceType device>
Tensor cast(const Tensor& x) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device);
}

c10::DispatchKeySet autocast_keys(c10::DeviceType device) {
  return c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device));
}

template <c10::DeviceType device>
std::tuple<Tensor, Tensor, Tensor> plan(
    const Tensor& query, const Tensor& key, const OptTensor& key_mask, const OptTensor& query_mask,
    std::optional<SymInt> blocks_per_row, OptDensity density, int64_t block_q, int64_t block_k,
    std::string_view selection, int64_t diagonal_blocks, int64_t first_blocks, bool is_causal,
    std::optional<double> scale, at::OptionalIntArrayRef levels, std::string_view pool) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(autocast_keys(device));
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mra_attention::plan", "")
                             .typed<decltype(plan<device>)>();
  return op.call(cast<device>(query), cast<device>(key), key_mask, query_mask, blocks_per_row,
                 density, block_q, block_k, selection, diagonal_blocks, first_blocks, is_causal,
                 scale, levels, pool);
}

template <c10::DeviceType device>
ForwardResult forward(const Tensor& query, const Tensor& key, const Tensor& value,
                      const OptTensor& key_mask, const OptTensor& query_mask,
                      const OptTensor& row_start, const OptTensor& row_count,
                      const OptTensor& row_index, std::optional<SymInt> blocks_per_row,
                      OptDensity density, int64_t block_q, int64_t block_k, std::string_view coarse,
                      int64_t order, std::string_view selection, int64_t diagonal_blocks,
                      int64_t first_blocks, bool is_causal, std::optional<double> scale,
                      at::OptionalIntArrayRef levels, std::string_view pool, bool keep) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(autocast_keys(device));
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mra_attention::forward", "")
                             .typed<decltype(forward<device>)>();
  return op.call(cast<device>(query), cast<device>(key), cast<device>(value), key_mask, query_mask,
                 row_start, row_count, row_index, blocks_per_row, density, block_q, block_k, coarse,
                 order, selection, diagonal_blocks, first_blocks, is_causal, scale, levels, pool,
                 keep);
}

}  // namespace

TORCH_LIBRARY_IMPL(mra_attention, AutocastCPU, m) {
  m.impl("plan", plan<at::kCPU>);
  m.impl("forward", forward<at::kCPU>);
}

TORCH_LIBRARY_IMPL(mra_attention, AutocastCUDA, m) {
  m.impl("plan", plan<at::kCUDA>);
  m.impl("forward", forward<at::kCUDA>);
}

}  // namespace mra
