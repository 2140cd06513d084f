// The order-1 term of head dims beyond 128 by Hopper's kernels: see WalkWide in sm90/order1_walk.h.
#include <ATen/ATen.h>

#include <algorithm>

#include "order1_walk.h"
#include "sm90/moments.h"
#include "sm90/order1_walk.h"

namespace mra::cuda {

#ifdef MRA_SM90A

namespace {

constexpr int64_t kHalf = 128;  // of a matrix

// Chunks of `rows` rows for `blocks` blocks of threads a head, one of which fills a multiprocessor.
int chunks_of(const Term& term, int rows, int unit_tiles, int blocks) {
  const int most = sm90::tile_chunks(blocks * term.B * term.Hk, rows, 1, term.launch.device);
  const int64_t each = sm90::chunk_tiles(rows, most, unit_tiles);
  return static_cast<int>(ceil_div(ceil_div(rows, 64), each));
}

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
  const Inputs& in = term.in;
  const bool causal = term.o.causal;
  sm90::WalkWide p{};
  p.dtype = term.dtype;
  p.causal = causal;
  p.B = term.B;
  p.H = term.H;
  p.Hk = term.Hk;
  p.N = term.N;
  p.M = term.M;
  p.D = term.D;
  p.nk = term.nk;
  p.log2_block_k = term.block_shift;
  p.unit_tiles = causal ? term.unit_causal / 64 : 1;
  p.k = in.key.const_data_ptr();
  p.v = in.value.const_data_ptr();
  p.k_strides = strides_of(in.key);
  p.v_strides = strides_of(in.value);
  p.mask = mask_of(in.key_mask);
  p.q = in.query.const_data_ptr();
  p.q_strides = strides_of(in.query);
  p.key_count = term.pooled.key_count.const_data_ptr<int>();
  p.share = result.share.const_data_ptr<float>();
  p.scale = static_cast<float>(term.o.scale);
  p.out = result.out.mutable_data_ptr();
  p.out_strides = strides_of(result.out);
  const Tensor variance = at::empty({2, p.B, p.H, p.N}, term.acc());
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

  const int chunks = chunks_of(term, term.N, p.unit_tiles, 2);
  const int key_chunks = causal ? chunks : chunks_of(term, term.M, 1, 4);
  Tensor sums;
  p.slots = causal ? chunks : key_chunks + 1;
  if (p.slots > 1) {
    sums = at::empty({2, 2, p.B, p.Hk, p.slots, 2, kHalf, kHalf}, term.acc());
    p.sums = sums.mutable_data_ptr<float>();
    if (!launch(sm90::WideStep::sums, key_chunks)) return false;
    Order1Sum s{};
    s.exclusive = true;
    s.B = 4 * p.B;
    s.heads = p.Hk;
    s.chunks = p.slots;
    s.dim = kHalf;
    s.sums = p.sums;
    term.launch.check(order1_sum(s, term.launch.stream));
  }
  if (!launch(sm90::WideStep::variance, chunks)) return false;
  if (!launch(sm90::WideStep::term, chunks)) return false;
  if (keeps_moments(term.o)) {
    const Tensor n = term.pooled.key_count.sum({1}).clamp_min(1).view({-1, 1, 1, 1, 1});
    moments = sums.select(4, key_chunks)
                  .permute({2, 3, 0, 4, 5, 1, 6})
                  .reshape({p.B, p.Hk, 2, 2 * kHalf, 2 * kHalf})
                  .div(n)
                  .to(moments_type(in.query.scalar_type()));
  }
  return true;
}

#else

bool order1_walk_wide(FineResult&, const Term&, Tensor&) { return false; }

#endif

}  // namespace mra::cuda
