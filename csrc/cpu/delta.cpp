// Row sums that the backward pass starts from.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <utility>

#include "../common/budget.h"
#include "stages_cpu.h"
#include "tiles.h"

namespace mra::cpu {

// dO_i . o_i - dlse_i
Tensor delta(const Tensor& grad_out, const Tensor& out, const Tensor& grad_lse) {
  const int64_t B = out.size(0), H = out.size(1), N = out.size(2), D = out.size(3);
  Tensor result = at::empty({B, H, N}, out.options().dtype(acc_type(out.scalar_type())));
  const Tensor lse_grad = grad_lse.defined() ? grad_lse.contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, out.scalar_type(), "mra_delta", [&] {
    using A = acc_t<scalar_t>;
    const Heads<scalar_t> g(grad_out), o(out);
    const A* dlse = lse_grad.defined() ? lse_grad.const_data_ptr<A>() : nullptr;
    A* sums = result.mutable_data_ptr<A>();
    at::parallel_for(0, B * H * N, grain(D), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t b = at / N / H, h = at / N % H, i = at % N;
        sums[at] = dot_row(g.head(b, h).row(i), o.head(b, h).row(i), D) - (dlse ? dlse[at] : A(0));
      }
    });
  });
  return result;
}

BlockRows block_rows(const Tensor& grad_out, const Tensor& lse, const Tensor& delta,
                     int64_t block_q) {
  const int64_t B = grad_out.size(0), H = grad_out.size(1), N = grad_out.size(2);
  const int64_t D = grad_out.size(3), nq = ceil_div(N, block_q);
  const Tensor row_lse = lse.contiguous(), row_delta = delta.contiguous();
  BlockRows result{at::empty({B, H, nq}, lse.options()), at::empty({B, H, nq, D}, lse.options()),
                   at::empty({B, H, nq}, lse.options())};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, grad_out.scalar_type(), "mra_block_rows", [&] {
        using A = acc_t<scalar_t>;
        const Heads<scalar_t> heads(grad_out);
        A* block_lse = result.lse.mutable_data_ptr<A>();
        A* block_grad = result.grad.mutable_data_ptr<A>();
        A* block_delta = result.delta.mutable_data_ptr<A>();
        at::parallel_for(0, B * H * nq, grain(block_q * D), [&](int64_t begin, int64_t end) {
          std::vector<A> row(D);
          for (int64_t item = begin; item < end; ++item) {
            const int64_t head = item / nq, first = item % nq * block_q;
            const int64_t last = std::min(N, first + block_q);
            const A* l = row_lse.const_data_ptr<A>() + head * N;
            A least = kInf<A>;
            for (int64_t i = first; i < last; ++i) {
              if (l[i] != -kInf<A>) least = std::min(least, l[i]);
            }
            A* g = block_grad + item * D;
            A e = 0;
            std::fill_n(g, D, A(0));
            for (int64_t i = first; i < last; ++i) {
              if (l[i] == -kInf<A>) continue;
              const A f = exp_one(least - l[i]);
              load_row(heads.head(head / H, head % H).row(i), D, row.data());
              add_scaled(g, row.data(), f, D);
              e += f * row_delta.const_data_ptr<A>()[head * N + i];
            }
            block_lse[item] = least;
            block_delta[item] = e;
          }
        });
      });
  return result;
}

std::pair<Tensor, BlockRows> delta_and_block_rows(const Tensor& grad_out, const Tensor& out,
                                                  const Tensor& grad_lse, const Tensor& lse,
                                                  int64_t block_q) {
  const Tensor sums = delta(grad_out, out, grad_lse);
  return {sums, block_rows(grad_out, lse, sums, block_q)};
}

}  // namespace mra::cpu
