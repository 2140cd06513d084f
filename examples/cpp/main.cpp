// MRA attention from C++: forward and backward through autograd, against exact attention, and
// optionally a package that AOTInductor made.
//
//   cmake -S examples/cpp -B build/cpp -DTORCH_ROOT=<torch's folder> -DPython3_EXECUTABLE=<python>
//   cmake --build build/cpp
//   build/cpp/attention mra_attention/_C.*.so [attention.pt2]
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

using at::Tensor;

// Loading the library registers the operators with torch's dispatcher.
void load_operators(const char* path) {
  if (!dlopen(path, RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
}

// Attention with row selection, pooled keys and the first-order term: the defaults of Python's
// mra_attention(). query [B, H, N, D]; key, value [B, Hk, M, D]. Returns [B, H, N, D].
Tensor mra_attention(const Tensor& query, const Tensor& key, const Tensor& value, double density) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mra_attention::forward", "");
  const c10::IValue none;
  const std::vector<double> densities{density};  // one for all heads, or one for each
  const bool keep = true;                        // what backward reads
  torch::jit::Stack stack{query, key,       value, none, none,      none, none,  none,
                          none,  densities, 32,    32,   "row",     1,    "row", 0,
                          0,     false,     none,  none, "centred", keep};
  op.callBoxed(stack);
  return stack[0].toTensor();
}

Tensor exact_attention(const Tensor& query, const Tensor& key, const Tensor& value) {
  return at::scaled_dot_product_attention(query, key, value);
}

// The output and the gradients of query, key and value for one gradient of the output.
template <class Attention>
std::vector<Tensor> run(const std::vector<Tensor>& inputs, const Tensor& grad,
                        const Attention& attention) {
  std::vector<Tensor> leaves;
  for (const Tensor& x : inputs) leaves.push_back(x.clone().requires_grad_());
  const Tensor out = attention(leaves[0], leaves[1], leaves[2]);
  std::vector<Tensor> results = torch::autograd::grad({out}, leaves, {grad});
  results.insert(results.begin(), out.detach());
  return results;
}

void print_errors(const char* name, const std::vector<Tensor>& got,
                  const std::vector<Tensor>& exact) {
  std::printf("%s", name);
  const char* names[] = {"out", "dq", "dk", "dv"};
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = ((got[i] - exact[i]).norm() / exact[i].norm()).item<double>();
    std::printf(" %s %.3g", names[i], error);
  }
  std::printf("\n");
}

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s path/to/mra_attention/_C.*.so [attention.pt2]\n", argv[0]);
    return 2;
  }
  load_operators(argv[1]);
  at::manual_seed(0);
  // Queries and keys that drift along the sequence, so that near blocks matter more than far ones.
  const Tensor key = at::randn({2, 2, 300, 64}, at::kDouble).cumsum(2) / 8;
  const Tensor query = key.repeat_interleave(2, 1) + at::randn({2, 4, 300, 64}, at::kDouble) / 2;
  const Tensor value = at::randn({2, 2, 300, 64}, at::kDouble);
  const Tensor grad = at::randn({2, 4, 300, 64}, at::kDouble);
  const std::vector<Tensor> inputs{query, key, value};

  const auto exact = run(inputs, grad, [](const Tensor& q, const Tensor& k, const Tensor& v) {
    return exact_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1));
  });
  for (const double density : {1.0, 0.25}) {
    const auto ours = run(inputs, grad, [&](const Tensor& q, const Tensor& k, const Tensor& v) {
      return mra_attention(q, k, v, density);
    });
    print_errors(density == 1 ? "density 1:" : "density 1/4:", ours, exact);
  }

  if (argc > 2) {  // q, k, v -> mra_attention(2 q, k, v, density=0.3) + q
    torch::inductor::AOTIModelPackageLoader package(argv[2]);
    std::vector<Tensor> x;
    for (int i = 0; i < 3; ++i) x.push_back(at::randn({3, 2, 150, 16}));
    const Tensor got = package.run(x)[0];
    const Tensor expected = mra_attention(2 * x[0], x[1], x[2], 0.3) + x[0];
    print_errors("package:", {got}, {expected});
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
