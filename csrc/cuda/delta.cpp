// Stages delta and block_rows on CUDA: allocate and launch delta_bwd.cu.
#include "delta.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "../common/budget.h"
#include "launch.h"

namespace mra::cuda {

// grad_out, out [B, H, N, D] of one dtype, grad_lse [B, H, N] float32 or undefined
// -> rowsum(grad_out * out) - grad_lse, [B, H, N] float32.
Tensor delta(const Tensor& grad_out, const Tensor& out, const Tensor& grad_lse) {
  const Launch launch(out);
  const Tensor dout = with_aligned_rows(grad_out);
  const Tensor o = with_aligned_rows(out);
  const int64_t B = o.size(0), H = o.size(1), N = o.size(2);
  TORCH_CHECK_NOT_IMPLEMENTED(B * H * ceil_div(N, 32) <= std::numeric_limits<int>::max(),
                              "mra_attention on CUDA takes at most 2^36 rows in all");
  Tensor result = at::empty({B, H, N}, o.options().dtype(at::kFloat));
  if (result.numel() == 0) return result;

  DeltaParams p;
  p.grad_out = dout.const_data_ptr();
  p.out = o.const_data_ptr();
  p.grad_stride = strides_of(dout);
  p.out_stride = strides_of(o);
  p.grad_lse = grad_lse.defined() ? grad_lse.const_data_ptr<float>() : nullptr;
  p.lse_stride = grad_lse.defined() ? strides_of(grad_lse) : Strides{0, 0, 0};
  p.delta = result.mutable_data_ptr<float>();
  p.B = static_cast<int>(B);
  p.H = static_cast<int>(H);
  p.N = N;
  p.D = static_cast<int>(o.size(3));
  p.dtype = dtype_of(o);
  launch.check(delta_backward(p, launch.stream));
  return result;
}

// grad_out [B, H, N, D], lse and delta [B, H, N] float32 -> the sums of each query block.
BlockRows block_rows(const Tensor& grad_out, const Tensor& lse_in, const Tensor& delta_in,
                     int64_t block_q) {
  const Launch launch(grad_out);
  const Tensor dout = with_aligned_rows(grad_out);
  const Tensor lse = lse_in.contiguous(), delta = delta_in.contiguous();
  const int64_t B = dout.size(0), H = dout.size(1), N = dout.size(2), D = dout.size(3);
  const int64_t nq = ceil_div(N, block_q);
  TORCH_CHECK_NOT_IMPLEMENTED(B * H * nq <= std::numeric_limits<int>::max(),
                              "mra_attention on CUDA takes at most 2^31 - 1 blocks in all, got ",
                              B * H * nq);
  const auto options = dout.options().dtype(at::kFloat);
  BlockRows out{at::empty({B, H, nq}, options), at::empty({B, H, nq, D}, options),
                at::empty({B, H, nq}, options)};
  if (out.lse.numel() == 0) return out;

  BlockRowsParams p;
  p.grad_out = dout.const_data_ptr();
  p.grad_stride = strides_of(dout);
  p.lse = lse.const_data_ptr<float>();
  p.delta = delta.const_data_ptr<float>();
  p.block_lse = out.lse.mutable_data_ptr<float>();
  p.block_grad = out.grad.mutable_data_ptr<float>();
  p.block_delta = out.delta.mutable_data_ptr<float>();
  p.B = static_cast<int>(B);
  p.H = static_cast<int>(H);
  p.nq = static_cast<int>(nq);
  p.N = N;
  p.D = static_cast<int>(D);
  p.block = static_cast<int>(block_q);
  p.dtype = dtype_of(dout);
  launch.check(block_rows_backward(p, launch.stream));
  return out;
}

}  // namespace mra::cuda
