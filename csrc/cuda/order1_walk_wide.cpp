// The order-1 term of head dims beyond 128 by Hopper's kernels: see WalkWide in sm90/order1_walk.h.
#include <ATen/ATen.h>

#include <limits>

#include "order1_walk.h"
#include "sm90/moments.h"

namespace mra::cuda {

#ifdef MRA_SM90A

namespace {

constexpr int kHalf = 128;  // of a matrix

bool serves(const Term& term) {
  const Options& o = term.o;
  const bool units = !o.causal || term.unit_causal >= 64;
  const int64_t heads = int64_t{8} * term.B * term.Hk;
  return term.launch.device.major == 9 && term.dtype != Dtype::f32 && term.D > 128 &&
         o.block_k <= 64 && units && !term.pooled.weights.defined() &&
         heads <= std::numeric_limits<int>::max();
}

}  // namespace

bool order1_walk_wide(FineResult& result, const Term& term, Tensor& moments) {
  if (!serves(term)) return false;
  const bool causal = term.o.causal;
  sm90::WalkWide p{walk_params(term)};
  p.M = term.M;
  p.unit_tiles = causal ? term.unit_causal / 64 : 1;
  p.share = result.share.const_data_ptr<float>();
  p.out = result.out.mutable_data_ptr();
  p.out_strides = strides_of(result.out);
  const Tensor variance = allocate({2, p.B, p.H, p.N}, term.acc());
  p.variance = variance.mutable_data_ptr<float>();
  const auto launch = [&](sm90::WideStep step, int chunks) {
    p.step = step;
    p.chunks = chunks;
    const auto& l = term.launch;
    const cudaError_t error =
        term.dtype == Dtype::f16
            ? sm90::launch_order1_walk_wide<__half>(p, l.device, l.stream)
            : sm90::launch_order1_walk_wide<__nv_bfloat16>(p, l.device, l.stream);
    if (error == cudaErrorNotSupported) return false;
    l.check(error);
    return true;
  };

  // One block of threads fills a multiprocessor: two for the rows of a head, four for its keys.
  const auto chunks_of = [&](int rows, int blocks) {
    return sm90::unit_chunks(blocks * p.B * p.Hk, rows, p.unit_tiles, 1, term.launch.device);
  };
  const int chunks = chunks_of(p.N, 2), key_chunks = causal ? chunks : chunks_of(p.M, 4);
  Tensor sums;
  p.slots = causal ? chunks : key_chunks + 1;
  if (p.slots > 1) {
    sums = allocate({2, 2, p.B, p.Hk, p.slots, 2, kHalf, kHalf}, term.acc());
    p.sums = sums.mutable_data_ptr<float>();
    if (!launch(sm90::WideStep::sums, key_chunks)) return false;
    term.launch.check(order1_sum_others(p.sums, int64_t{4} * p.B * p.Hk, p.slots, kHalf, false,
                                        term.launch.stream));
  }
  if (!launch(sm90::WideStep::variance, chunks)) return false;
  if (!launch(sm90::WideStep::term, chunks)) return false;
  if (keeps_moments(term.o)) {
    const Tensor n = term.pooled.key_count.sum({1}).clamp_min(1).view({-1, 1, 1, 1, 1});
    moments = sums.select(4, key_chunks)
                  .permute({2, 3, 0, 4, 5, 1, 6})
                  .reshape({p.B, p.Hk, 2, 2 * kHalf, 2 * kHalf})
                  .div(n)
                  .to(moments_type(term.in.query.scalar_type()));
  }
  return true;
}

#else

bool order1_walk_wide(FineResult&, const Term&, Tensor&) { return false; }

#endif

}  // namespace mra::cuda
