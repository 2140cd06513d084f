// The Python module mra_attention._C. Loading it registers the operators; what it carries itself is
// only what isn't a tensor operator: build information and the table of compiled kernels.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#ifdef MRA_WITH_CUDA
#include "cuda/kernels.h"
#endif

// Set by setup.py; empty for a CPU build.
#ifndef MRA_CUDA_VERSION
#define MRA_CUDA_VERSION ""
#endif
#ifndef MRA_CUDA_ARCHS
#define MRA_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch_version"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef MRA_WITH_CUDA
  info["with_cuda"] = true;
#else
  info["with_cuda"] = false;
#endif
  info["cuda_version"] = MRA_CUDA_VERSION;
  info["cuda_archs"] = MRA_CUDA_ARCHS;
  return info;
}

py::dict kernel(const char* device, const char* stage, const char* name, const char* file,
                const char* arch, const char* dtypes, const char* head_dims) {
  py::dict row;
  row["device"] = device;
  row["stage"] = stage;
  row["kernel"] = name;
  row["file"] = file;
  row["arch"] = arch;
  row["dtypes"] = dtypes;
  row["head_dims"] = head_dims;
  return row;
}

py::list kernels() {
  constexpr const char* kDtypes = "float64, float32, bfloat16, float16";
  constexpr const char* kDims = "8..256, multiples of 8";
  py::list table;
  const char* stages[][2] = {{"pool", "csrc/cpu/pool.cpp"},
                             {"plan", "csrc/cpu/plan.cpp"},
                             {"coarse", "csrc/cpu/coarse.cpp"},
                             {"fine", "csrc/cpu/fine.cpp"}};
  for (const auto& [stage, file] : stages) {
    table.append(kernel("cpu", stage, stage, file, "any", kDtypes, kDims));
  }
#ifdef MRA_WITH_CUDA
  for (const mra::cuda::KernelInfo& k : mra::cuda::kernel_table()) {
    table.append(kernel("cuda", k.stage, k.kernel, k.file, k.arch, k.dtypes, k.head_dims));
  }
#endif
  return table;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build information of mra_attention; loading this module registers its operators.";
  m.def("build_info", &build_info,
        "dict: torch_version, compiler, with_cuda, cuda_version, cuda_archs");
  m.def("kernels", &kernels, "list of dicts: device, stage, kernel, file, arch, dtypes, head_dims");
}
