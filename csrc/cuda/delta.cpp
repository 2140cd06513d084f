// Stages delta and block_rows on CUDA: allocate and launch delta_bwd.cu.
#include "delta.h"

#include <limits>
#include <utility>

#include "../common/budget.h"
#include "launch.h"
#include "level_stages.h"
#include "row_dots.h"

namespace mra::cuda {
namespace {

// [B, H, N, D] operands whose rows can be read 16 bytes at a time, and the kernel's view of them.
struct Delta {
  Tensor grad_out, out, result;
  DeltaParams p;

  Delta(const Tensor& grad_out_in, const Tensor& out_in, const Tensor& grad_lse,
        const Device& device)
      : grad_out(with_aligned_rows(grad_out_in)), out(with_aligned_rows(out_in)) {
    const int64_t B = out.size(0), H = out.size(1), N = out.size(2);
    TORCH_CHECK_NOT_IMPLEMENTED(B * H * ceil_div(N, 32) <= std::numeric_limits<int>::max(),
                                "mra_attention on CUDA takes at most 2^36 rows in all");
    result = allocate({B, H, N}, out.options().dtype(at::kFloat));
    p.grad_out = grad_out.const_data_ptr();
    p.out = out.const_data_ptr();
    p.grad_stride = strides_of(grad_out);
    p.out_stride = strides_of(out);
    p.grad_lse = grad_lse.defined() ? grad_lse.const_data_ptr<float>() : nullptr;
    p.lse_stride = grad_lse.defined() ? strides_of(grad_lse) : Strides{0, 0, 0};
    p.delta = result.mutable_data_ptr<float>();
    p.B = static_cast<int>(B);
    p.H = static_cast<int>(H);
    p.N = N;
    p.D = static_cast<int>(out.size(3));
    p.dtype = dtype_of(out);
    // What comes before it is the plan's transpose, unless rows had to be copied.
    p.beside = device.major == 9 && grad_out.is_same(grad_out_in) && out.is_same(out_in);
  }
};

// grad_out as above; lse and delta [B, H, N] float32, contiguous.
struct Blocks {
  BlockRows rows;
  BlockRowsParams p;

  Blocks(const Tensor& grad_out, const Tensor& lse, const Tensor& delta, int64_t block_q) {
    const int64_t B = grad_out.size(0), H = grad_out.size(1), N = grad_out.size(2);
    const int64_t D = grad_out.size(3), nq = ceil_div(N, block_q);
    TORCH_CHECK_NOT_IMPLEMENTED(B * H * nq <= std::numeric_limits<int>::max(),
                                "mra_attention on CUDA takes at most 2^31 - 1 blocks in all, got ",
                                B * H * nq);
    const auto options = grad_out.options().dtype(at::kFloat);
    rows = {allocate({B, H, nq}, options), allocate({B, H, nq, D}, options),
            allocate({B, H, nq}, options)};
    p.grad_out = grad_out.const_data_ptr();
    p.grad_stride = strides_of(grad_out);
    p.lse = lse.const_data_ptr<float>();
    p.delta = delta.const_data_ptr<float>();
    p.block_lse = rows.lse.mutable_data_ptr<float>();
    p.block_grad = rows.grad.mutable_data_ptr<float>();
    p.block_delta = rows.delta.mutable_data_ptr<float>();
    p.B = static_cast<int>(B);
    p.H = static_cast<int>(H);
    p.nq = static_cast<int>(nq);
    p.N = N;
    p.D = static_cast<int>(D);
    p.block = static_cast<int>(block_q);
    p.dtype = dtype_of(grad_out);
  }
};

}  // namespace

// grad_out, out [B, H, N, D] of one dtype, grad_lse [B, H, N] float32 or undefined
// -> rowsum(grad_out * out) - grad_lse, [B, H, N] float32.
Tensor delta(const Tensor& grad_out, const Tensor& out, const Tensor& grad_lse) {
  const Launch launch(out);
  const Delta d(grad_out, out, grad_lse, launch.device);
  if (d.result.numel() > 0) launch.check(delta_backward(d.p, launch.stream));
  return d.result;
}

Tensor row_dots(const Tensor& x, const Tensor& y, const Tensor& grad_lse) {
  const Launch launch(y);
  Delta d(x, y, grad_lse, launch.device);
  d.p.beside = false;
  if (d.result.numel() > 0) launch.check(delta_backward(d.p, launch.stream));
  return d.result;
}

// grad_out [B, H, N, D], lse and delta [B, H, N] float32 -> the sums of each query block.
BlockRows block_rows(const Tensor& grad_out_in, const Tensor& lse_in, const Tensor& delta_in,
                     int64_t block_q) {
  // A warp sums up to 128 rows.
  if (block_q > 128) {
    return merge_block_rows(block_rows(grad_out_in, lse_in, delta_in, 128), block_q / 128);
  }
  const Launch launch(grad_out_in);
  const Tensor grad_out = with_aligned_rows(grad_out_in);
  const Tensor lse = lse_in.contiguous(), delta = delta_in.contiguous();
  const Blocks blocks(grad_out, lse, delta, block_q);
  if (blocks.rows.lse.numel() > 0) launch.check(block_rows_backward(blocks.p, launch.stream));
  return blocks.rows;
}

std::pair<Tensor, BlockRows> delta_and_block_rows(const Tensor& grad_out, const Tensor& out,
                                                  const Tensor& grad_lse, const Tensor& lse_in,
                                                  int64_t block_q) {
  const Launch launch(out);
  const Tensor lse = lse_in.contiguous();
  const Delta d(grad_out, out, grad_lse, launch.device);
  const Blocks blocks(d.grad_out, lse, d.result, block_q);
  if (d.result.numel() > 0) {
    launch.check(delta_and_block_rows_backward(d.p, blocks.p, launch.stream));
  }
  return {d.result, blocks.rows};
}

}  // namespace mra::cuda
