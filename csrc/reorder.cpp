// The operator reorder, whole: checks, CPU, CUDA, Meta and gradient.
#include <ATen/ATen.h>
#include <ATen/DeviceGuard.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

namespace mra {

using at::Tensor;
using at::TensorList;
using Tensors = std::vector<Tensor>;

namespace cuda {
Tensors reorder(TensorList inputs, const Tensor& index, int64_t L);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr size_t kMost = 4;  // cuda/reorder.h

// True unless the comparison is known to fail.
bool equal(const c10::SymInt& a, const c10::SymInt& b) {
  return a.sym_eq(b).guard_or_true(__FILE__, __LINE__);
}

void check_index(const char* name, const Tensor& x, const Tensor& like) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kInt, name, ": got dtype ", x.scalar_type(),
                   ", expected int32");
  TORCH_CHECK_VALUE(x.dim() == 1, name, ": got shape ", x.sym_sizes(), ", expected 1 dimension");
  TORCH_CHECK_VALUE(x.device() == like.device(), name, ": got device ", x.device(),
                    ", expected that of inputs, ", like.device());
}

void check(TensorList inputs, const Tensor& index, const Tensor& inverse) {
  TORCH_CHECK_VALUE(inputs.size() > 0 && inputs.size() <= kMost, "inputs: got ", inputs.size(),
                    " tensors, expected 1 to ", kMost);
  for (const Tensor& x : inputs) {
    TORCH_CHECK_TYPE(x.layout() == c10::kStrided, "inputs: got layout ", x.layout(),
                     ", expected dense (strided) tensors");
    TORCH_CHECK_VALUE(x.dim() == 4, "inputs: got shape ", x.sym_sizes(),
                      ", expected 4 dimensions (batch, heads, length, head_dim)");
    TORCH_CHECK_TYPE(x.scalar_type() == inputs[0].scalar_type(), "inputs: got dtypes ",
                     inputs[0].scalar_type(), " and ", x.scalar_type(), ", expected one");
    TORCH_CHECK_VALUE(x.device() == inputs[0].device(), "inputs: got devices ", inputs[0].device(),
                      " and ", x.device(), ", expected one");
  }
  check_index("index", index, inputs[0]);
  check_index("inverse", inverse, inputs[0]);
  for (const Tensor& x : inputs) {
    TORCH_CHECK_VALUE(equal(x.sym_size(2), inverse.sym_size(0)), "inputs: got length ",
                      x.sym_size(2), ", expected that of inverse, ", inverse.sym_size(0));
  }
}

// Results lie as (B, L, H, D), but those of contiguous tensors are contiguous, as then a gradient
// lies as its input does: `run` gets each head of these as an entry of its own.
template <class Run>
Tensors in_kept_order(TensorList inputs, const Tensor& index, const Tensor& inverse,
                      const Run& run) {
  check(inputs, index, inverse);
  Tensors entries;
  for (const Tensor& x : inputs) {
    const c10::SymInt sizes[] = {x.sym_size(0) * x.sym_size(1), 1, x.sym_size(2), x.sym_size(3)};
    entries.push_back(x.is_contiguous() ? x.view_symint(sizes) : x);
  }
  Tensors results = run(entries);
  for (size_t i = 0; i < results.size(); ++i) {
    const Tensor& x = inputs[i];
    const c10::SymInt sizes[] = {x.sym_size(0), x.sym_size(1), index.sym_size(0), x.sym_size(3)};
    if (x.is_contiguous()) results[i] = results[i].view_symint(sizes);
  }
  return results;
}

Tensors meta(TensorList inputs, const Tensor& index, const Tensor& inverse) {
  return in_kept_order(inputs, index, inverse, [&](TensorList entries) {
    Tensors results;
    for (const Tensor& x : entries) {
      const c10::SymInt sizes[] = {x.sym_size(0), index.sym_size(0), x.sym_size(1), x.sym_size(3)};
      results.push_back(at::empty_symint(sizes, x.options()).transpose(1, 2));
    }
    return results;
  });
}

// The rows of x at one place, side by side: `to` has room for all heads.
void copy_rows(char* to, const char* from, const Tensor& x) {
  const int64_t H = x.size(1), D = x.size(3), size = x.element_size();
  const int64_t head = x.stride(1) * size, step = x.stride(3) * size;
  if ((D == 1 || step == size) && (H == 1 || head == D * size)) {
    std::memcpy(to, from, H * D * size);
    return;
  }
  for (int64_t h = 0; h < H; ++h, from += head, to += D * size) {
    if (D == 1 || step == size) {
      std::memcpy(to, from, D * size);
    } else {
      for (int64_t d = 0; d < D; ++d) std::memcpy(to + d * size, from + d * step, size);
    }
  }
}

Tensors copied(TensorList inputs, const Tensor& index_in, int64_t L) {
  const Tensor index = index_in.contiguous();
  const int32_t* rows = index.const_data_ptr<int32_t>();
  const int64_t P = index.size(0);
  Tensors results;
  for (const Tensor& x : inputs) {
    const Tensor result = at::empty({x.size(0), P, x.size(1), x.size(3)}, x.options());
    results.push_back(result.transpose(1, 2));
    if (result.numel() == 0) continue;
    const int64_t size = x.element_size(), row = x.size(1) * x.size(3) * size;
    const char* from = static_cast<const char*>(x.const_data_ptr());
    char* to = static_cast<char*>(result.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, 65536 / row);
    at::parallel_for(0, x.size(0) * P, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / P, l = rows[i % P];
        if (l < 0 || l >= L) {
          std::memset(to + i * row, 0, row);
        } else {
          copy_rows(to + i * row, from + (b * x.stride(0) + l * x.stride(2)) * size, x);
        }
      }
    });
  }
  return results;
}

Tensors cpu(TensorList inputs, const Tensor& index, const Tensor& inverse) {
  return in_kept_order(inputs, index, inverse,
                       [&](TensorList entries) { return copied(entries, index, inverse.size(0)); });
}

#ifdef MRA_WITH_CUDA
Tensors gpu(TensorList inputs, const Tensor& index, const Tensor& inverse) {
  return in_kept_order(inputs, index, inverse, [&](TensorList entries) {
    const at::DeviceGuard guard(index.device());
    return cuda::reorder(entries, index, inverse.size(0));
  });
}
#endif

Tensors call(TensorList inputs, const Tensor& index, const Tensor& inverse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mra_attention::reorder", "")
                             .typed<Tensors(TensorList, const Tensor&, const Tensor&)>();
  return op.call(inputs, index, inverse);
}

// The gradient of a reordering is the reordering back, which has one in turn.
class Reorder : public torch::autograd::Function<Reorder> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, TensorList inputs, const Tensor& index,
                               const Tensor& inverse) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({index, inverse});
    ctx->set_materialize_grads(false);
    return call(inputs, index, inverse);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list result(grads.size() + 2), there;
    std::vector<size_t> which;
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined() || !ctx->needs_input_grad(i)) continue;
      which.push_back(i);
      there.push_back(grads[i]);
    }
    if (there.empty()) return result;
    const Tensors back = call(there, saved[1], saved[0]);
    for (size_t i = 0; i < which.size(); ++i) result[which[i]] = back[i];
    return result;
  }
};

Tensors autograd(TensorList inputs, const Tensor& index, const Tensor& inverse) {
  for (const Tensor& x : inputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(!x._fw_grad(/*level=*/0).defined(),
                                "mra_attention::reorder: forward-mode differentiation (jvp, dual "
                                "tensors) is not supported; use reverse mode (backward)");
  }
  const bool needed =
      at::GradMode::is_enabled() &&
      std::any_of(inputs.begin(), inputs.end(), [](const Tensor& x) { return x.requires_grad(); });
  if (needed) return Reorder::apply(inputs, index, inverse);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call(inputs, index, inverse);
}

}  // namespace

TORCH_LIBRARY_IMPL(mra_attention, CPU, m) { m.impl("reorder", cpu); }
TORCH_LIBRARY_IMPL(mra_attention, Meta, m) { m.impl("reorder", meta); }
TORCH_LIBRARY_IMPL(mra_attention, Autograd, m) { m.impl("reorder", autograd); }
#ifdef MRA_WITH_CUDA
TORCH_LIBRARY_IMPL(mra_attention, CUDA, m) { m.impl("reorder", gpu); }
#endif

}  // namespace mra
