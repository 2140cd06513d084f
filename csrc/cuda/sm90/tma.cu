#include "tma.cuh"

namespace mra::cuda::sm90 {
namespace {

// The driver's function, found at run time: nothing to link.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    const bool ok = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(ok ? function : nullptr);
  }();
  return found;
}

}  // namespace

bool tensor_map(CUtensorMap* map, Dtype dtype, const void* data, const Strides& strides, int B,
                int H, int L, int D, int rows, int columns) {
  if (encoder() == nullptr || dtype == Dtype::f32) return false;
  const auto type =
      dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(D), static_cast<cuuint64_t>(L),
                              static_cast<cuuint64_t>(H), static_cast<cuuint64_t>(B)};
  // Strides of dimensions of one element may be anything: the row's stands for them.
  auto bytes = [&](int64_t stride, int size) {
    return static_cast<cuuint64_t>(2 * (size == 1 ? (D + 7) / 8 * 8 : stride));
  };
  const cuuint64_t steps[] = {bytes(strides.l, L), bytes(strides.h, H), bytes(strides.b, B)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t every[] = {1, 1, 1, 1};
  const auto swizzle = columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encoder()(map, type, 4, const_cast<void*>(data), sizes, steps, box, every,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace mra::cuda::sm90
