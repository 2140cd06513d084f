// Rows in another order on CUDA: allocate and launch reorder_rows.cu.
#include "reorder.h"

#include <vector>

#include "launch.h"

namespace mra::cuda {
namespace {

// Whether x can be read `width` bytes at a time, from the first element of each row on.
bool fits(const at::Tensor& x, int width) {
  const int64_t size = x.element_size();
  if (width == size) return true;
  bool good = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % width == 0 &&
              x.size(3) * size % width == 0 && (x.size(3) == 1 || x.stride(3) == 1);
  for (int dim = 0; dim < 3; ++dim) {
    good = good && (x.size(dim) <= 1 || x.stride(dim) * size % width == 0);
  }
  return good;
}

}  // namespace

// inputs (B, H, L, D) of one dtype, index int32 (P,) -> (B, H, P, D) each, as (B, P, H, D) memory.
std::vector<at::Tensor> reorder(at::TensorList inputs, const at::Tensor& index_in, int64_t L) {
  const Launch launch(index_in);
  const at::Tensor index = index_in.contiguous();
  const int64_t P = index.size(0), size = inputs[0].element_size();
  ReorderParams p{};
  p.index = index.const_data_ptr<int32_t>();
  p.P = P;
  p.L = L;
  p.width = 16;
  for (const at::Tensor& x : inputs) {
    while (x.numel() > 0 && p.width > size && !fits(x, p.width)) p.width /= 2;
  }
  std::vector<at::Tensor> results;
  int64_t blocks = 0;
  for (const at::Tensor& x : inputs) {
    const int64_t B = x.size(0), H = x.size(1), D = x.size(3), chunks = D * size / p.width;
    const at::Tensor result = allocate({B, P, H, D}, x.options());
    results.push_back(result.transpose(1, 2));
    if (result.numel() == 0) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(H * chunks < (1 << 30),
                                "mra_attention::reorder on CUDA takes rows of less than 2^30 "
                                "vectors over all heads");
    Reordered& t = p.tensors[p.count++];
    t.from = static_cast<const char*>(x.const_data_ptr());
    t.to = static_cast<char*>(result.mutable_data_ptr());
    t.b = x.stride(0) * size;
    t.h = x.stride(1) * size;
    t.l = x.stride(2) * size;
    t.d = p.width > size ? p.width : x.stride(3) * size;
    t.H = static_cast<int>(H);
    t.chunks = static_cast<int>(chunks);
    t.blocks_per_batch = reorder_blocks(P * H * chunks);
    t.end = blocks += B * t.blocks_per_batch;
  }
  if (p.count > 0) launch.check(reorder(p, launch.stream));
  return results;
}

}  // namespace mra::cuda
