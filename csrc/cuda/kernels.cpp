#include "kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "sm90/backward.h"
#include "sm90/coarse.h"
#include "sm90/forward.h"

namespace mra::cuda {
namespace {

// Calls f(T{}, integral_constant<int, padded head_dim>).
template <class F>
cudaError_t dispatch(Dtype dtype, int head_dim, F f) {
  auto by_dim = [&](auto t) {
    if (head_dim <= 32) return f(t, std::integral_constant<int, 32>{});
    if (head_dim <= 64) return f(t, std::integral_constant<int, 64>{});
    if (head_dim <= 128) return f(t, std::integral_constant<int, 128>{});
    if (head_dim <= 256) return f(t, std::integral_constant<int, 256>{});
    return cudaErrorInvalidValue;
  };
  switch (dtype) {
    case Dtype::f32:
      return by_dim(float{});
    case Dtype::f16:
      return by_dim(__half{});
    case Dtype::bf16:
      return by_dim(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

#ifdef MRA_SM90A
// f as dispatch calls it, for what sm90/ has; cudaErrorNotSupported for the rest.
template <class F>
cudaError_t on_hopper(Dtype dtype, int head_dim, const Device& device, F f) {
  if (device.major != 9 || dtype == Dtype::f32) return cudaErrorNotSupported;
  const auto by_dim = [&](auto t) {
    if (head_dim <= 64) return f(t, std::integral_constant<int, 64>{});
    if (head_dim <= 128) return f(t, std::integral_constant<int, 128>{});
    if (head_dim <= 192) return f(t, std::integral_constant<int, 192>{});
    return f(t, std::integral_constant<int, 256>{});
  };
  return dtype == Dtype::f16 ? by_dim(__half{}) : by_dim(__nv_bfloat16{});
}
#endif

}  // namespace

cudaError_t forward(ForwardParams& p, Dtype dtype, const Device& device, cudaStream_t stream) {
#ifdef MRA_SM90A
  const cudaError_t error = on_hopper(dtype, p.D, device, [&](auto t, auto d) {
    using T = decltype(t);
    if (d() > 128) p.moments = p.term = nullptr;
    const cudaError_t error = sm90::launch_forward<T, d()>(p, device, stream);
    if constexpr (d() <= 128) {
      if (error == cudaErrorNotSupported) {
        return sm90::launch_forward_short<T, d()>(p, device, stream);
      }
    }
    return error;
  });
  if (error != cudaErrorNotSupported) return error;
#endif
  if (p.centre != nullptr) return cudaErrorNotSupported;
  p.moments = p.term = nullptr;
  return dispatch(dtype, p.D, [&](auto t, auto d) {
    return launch_forward<decltype(t), d()>(p, device, stream);
  });
}

cudaError_t backward_rows(const BackwardParams& p, Dtype dtype, const Device& device,
                          cudaStream_t stream) {
#ifdef MRA_SM90A
  const cudaError_t error = on_hopper(dtype, p.D, device, [&](auto t, auto d) {
    using T = decltype(t);
    if constexpr (d() > 128) {
      return sm90::launch_backward_rows_wide<T, d()>(p, device, stream);
    } else {
      const cudaError_t error = sm90::launch_backward_rows<T, d()>(p, device, stream);
      if (error != cudaErrorNotSupported) return error;
      return sm90::launch_backward_rows_short<T, d()>(p, device, stream);
    }
  });
  if (error != cudaErrorNotSupported) return error;
#endif
  return dispatch(dtype, p.D, [&](auto t, auto d) {
    return launch_backward_rows<decltype(t), d()>(p, device, stream);
  });
}

cudaError_t backward_columns(const BackwardParams& p, Dtype dtype, const Device& device,
                             cudaStream_t stream) {
#ifdef MRA_SM90A
  const cudaError_t error = on_hopper(dtype, p.D, device, [&](auto t, auto d) {
    using T = decltype(t);
    if constexpr (d() > 128) {
      return sm90::launch_backward_columns_wide<T, d()>(p, device, stream);
    } else {
      const cudaError_t error = sm90::launch_backward_columns<T, d()>(p, device, stream);
      if (error != cudaErrorNotSupported) return error;
      return sm90::launch_backward_columns_short<T, d()>(p, device, stream);
    }
  });
  if (error != cudaErrorNotSupported) return error;
#endif
  return dispatch(dtype, p.D, [&](auto t, auto d) {
    return launch_backward_columns<decltype(t), d()>(p, device, stream);
  });
}

cudaError_t backward_columns_order1(const sm90::ColumnsOrder1& p, const Device& device,
                                    cudaStream_t stream) {
#ifdef MRA_SM90A
  return sm90::launch_backward_columns_order1<64>(p, device, stream);
#else
  return cudaErrorNotSupported;
#endif
}

cudaError_t backward_pooled(const BackwardParams& p, Dtype dtype, const Device& device,
                            cudaStream_t stream) {
#ifdef MRA_SM90A
  const cudaError_t error = on_hopper(dtype, p.D, device, [&](auto t, auto d) {
    return sm90::launch_backward_pooled<decltype(t), d()>(p, device, stream);
  });
  if (error != cudaErrorNotSupported) return error;
#endif
  if (p.coarse_sum != nullptr) return cudaErrorNotSupported;
  return dispatch(dtype, p.D, [&](auto t, auto d) {
    return launch_backward_pooled<decltype(t), d()>(p, device, stream);
  });
}

cudaError_t coarse_forward(const CoarseForwardParams& p, const Device& device,
                           cudaStream_t stream) {
#ifdef MRA_SM90A
  // Fewer blocks fill too little of a tile of 64.
  if (device.major == 9 && p.D <= 128 && (p.nq > 32 || p.nk > 32)) {
    return p.D <= 64 ? sm90::launch_coarse_forward<64>(p, device, stream)
                     : sm90::launch_coarse_forward<128>(p, device, stream);
  }
#endif
  return cudaErrorNotSupported;
}

cudaError_t cells_forward(const CellsForward& p, Dtype dtype, const Device& device,
                          cudaStream_t stream) {
  return dispatch(dtype, p.D, [&](auto t, auto d) {
    return launch_cells_forward<decltype(t), d()>(p, device, stream);
  });
}
cudaError_t cells_rows(const CellsBackward& p, Dtype dtype, const Device& device,
                       cudaStream_t stream) {
  return dispatch(dtype, p.D, [&](auto t, auto d) {
    return launch_cells_rows<decltype(t), d()>(p, device, stream);
  });
}
cudaError_t cells_candidates(const CellsBackward& p, Dtype dtype, const Device& device,
                             cudaStream_t stream) {
  return dispatch(dtype, p.D, [&](auto t, auto d) {
    return launch_cells_candidates<decltype(t), d()>(p, device, stream);
  });
}
cudaError_t cells_columns(const CellsBackward& p, Dtype dtype, const Device& device,
                          cudaStream_t stream) {
  return dispatch(dtype, p.D, [&](auto t, auto d) {
    return launch_cells_columns<decltype(t), d()>(p, device, stream);
  });
}

std::vector<KernelInfo> kernel_table() {
  constexpr const char* all = "float32, float16, bfloat16";
  constexpr const char* dims = "8..256 (32, 64, 128, 256)";
  return {
      {"pool", "pool_forward", "csrc/cuda/pool_fwd.cu", "sm_80+", all, "8..256"},
#ifdef MRA_SM90A
      {"pool", "moments", "csrc/cuda/sm90/moments.cuh", "sm_90a", "float16, bfloat16",
       "8..128 (64, 128)"},
#endif
      {"pool", "sample", "csrc/cuda/centred_sample.cu", "sm_80+", all, "8..256"},
      {"pool", "key_weights", "csrc/cuda/centred_weights.cu", "sm_80+", all, dims},
      {"pool", "causal_centres", "csrc/cuda/centred_queries.cu", "sm_80+", "float32 means",
       "8..256"},
      {"pool", "causal_weights", "csrc/cuda/centred_weights.cu", "sm_80+", all, "8..256"},
      {"plan", "plan_row", "csrc/cuda/plan_row.cu", "sm_80+", "float32 means", "8..256"},
      {"plan", "plan_stream", "csrc/cuda/plan_stream.cu", "sm_80+", "float32 means", "8..256"},
      {"plan", "plan_map", "csrc/cuda/plan_map.cu", "sm_80+", "float32 means", "8..256"},
      {"plan", "plan_global", "csrc/cuda/plan_global.cu", "sm_80+", "float32 means", "8..256"},
      {"plan", "plan_level", "csrc/cuda/plan_levels.cu", "sm_80+", "float32 means", "8..256"},
      {"plan", "transpose", "csrc/cuda/plan_transpose.cu", "sm_80+", "-", "-"},
      {"coarse", "forward", "csrc/cuda/sm80/forward.cuh", "sm_80+", "float32 means", dims},
      {"coarse", "backward_rows", "csrc/cuda/sm80/backward_rows.cuh", "sm_80+", "float32 means",
       dims},
      {"coarse", "coarse_backward", "csrc/cuda/coarse_bwd.cu", "sm_80+", "float16, bfloat16",
       "8..128 (64, 128)"},
      {"coarse", "backward_pooled", "csrc/cuda/sm80/backward_columns.cuh", "sm_80+", all, dims},
      {"coarse", "coarse_levels", "csrc/cuda/coarse_levels.cu", "sm_80+", "float32 means",
       "8..256"},
      {"coarse", "cells_forward", "csrc/cuda/sm80/cells_forward.cuh", "sm_80+", all, dims},
      {"coarse", "cells_rows", "csrc/cuda/sm80/cells_rows.cuh", "sm_80+", all, dims},
      {"coarse", "cells_candidates", "csrc/cuda/sm80/cells_candidates.cuh", "sm_80+", all, dims},
      {"coarse", "cells_columns", "csrc/cuda/sm80/cells_columns.cuh", "sm_80+", all, dims},
#ifdef MRA_SM90A
      {"coarse", "coarse_forward", "csrc/cuda/sm90/coarse_forward.cuh", "sm_90a",
       "float16, bfloat16", "8..128 (64, 128)"},
      {"coarse", "coarse_backward", "csrc/cuda/sm90/coarse_backward.cuh", "sm_90a",
       "float16, bfloat16", "8..128 (64, 128)"},
      {"coarse", "backward_pooled", "csrc/cuda/sm90/backward_pooled.cuh", "sm_90a",
       "float16, bfloat16", "8..256 (64, 128, 192, 256)"},
#endif
      {"fine", "forward", "csrc/cuda/sm80/forward.cuh", "sm_80+", all, dims},
      {"fine", "backward_rows", "csrc/cuda/sm80/backward_rows.cuh", "sm_80+", all, dims},
#ifdef MRA_SM90A
      {"fine", "forward", "csrc/cuda/sm90/forward.cuh", "sm_90a", "float16, bfloat16",
       "8..256 (64, 128, 192, 256)"},
      {"fine", "backward_rows", "csrc/cuda/sm90/backward_rows.cuh", "sm_90a", "float16, bfloat16",
       "8..128 (64, 128)"},
      {"fine", "backward_rows_wide", "csrc/cuda/sm90/backward_rows_wide.cuh", "sm_90a",
       "float16, bfloat16", "136..256 (192, 256)"},
      {"fine", "backward_columns", "csrc/cuda/sm90/backward_columns.cuh", "sm_90a",
       "float16, bfloat16", "8..128 (64, 128)"},
      {"fine", "backward_columns_wide", "csrc/cuda/sm90/backward_columns_wide.cuh", "sm_90a",
       "float16, bfloat16", "136..256 (192, 256)"},
      {"fine", "forward_short", "csrc/cuda/sm90/forward_short.cuh", "sm_90a", "float16, bfloat16",
       "8..128 (64, 128)"},
      {"all", "forward_head", "csrc/cuda/sm90/forward_head.cuh", "sm_90a", "float16, bfloat16",
       "8..64 (32, 64)"},
      {"fine", "backward_rows_short", "csrc/cuda/sm90/backward_rows_short.cuh", "sm_90a",
       "float16, bfloat16", "8..128 (64, 128)"},
      {"fine", "backward_columns_short", "csrc/cuda/sm90/backward_columns_short.cuh", "sm_90a",
       "float16, bfloat16", "8..128 (64, 128)"},
#endif
#ifdef MRA_SM90A
      {"order1", "delta", "csrc/cuda/sm90/order1_delta.cuh", "sm_90a", "bfloat16",
       "8..128 (64, 128)"},
      {"order1", "rows", "csrc/cuda/sm90/order1_rows.cuh", "sm_90a", "bfloat16",
       "8..128 (64, 128)"},
      {"order1", "keys", "csrc/cuda/sm90/order1_keys.cuh", "sm_90a", "bfloat16",
       "8..128 (64, 128)"},
      {"fine, order1", "backward_columns_order1", "csrc/cuda/sm90/backward_columns_order1.cuh",
       "sm_90a", "bfloat16", "8..64 (64)"},
      {"fine, order1", "backward_pooled_order1", "csrc/cuda/sm90/backward_pooled_order1.cuh",
       "sm_90a", "bfloat16", "8..64 (64)"},
      {"order1", "walk_rows", "csrc/cuda/sm90/order1_walk_rows.cuh", "sm_90a",
       "float16 (forward), bfloat16", "8..128 (64, 128)"},
      {"order1", "walk_wide", "csrc/cuda/sm90/order1_walk_wide.cuh", "sm_90a", "float16, bfloat16",
       "136..256 (256)"},
      {"order1", "walk_keys", "csrc/cuda/sm90/order1_walk_keys.cuh", "sm_90a", "bfloat16",
       "8..128 (64, 128)"},
#endif
      {"order1", "gram", "csrc/cuda/order1_gram.cu", "sm_80+", all, dims},
      {"order1", "sum", "csrc/cuda/order1_sum.cu", "sm_80+", "float32 sums", dims},
      {"order1", "rows", "csrc/cuda/order1_rows.cu", "sm_80+", all, dims},
      {"order1", "keys", "csrc/cuda/order1_keys.cu", "sm_80+", all, dims},
      {"order1", "row_weights", "csrc/cuda/centred_sums.cu", "sm_80+", all, "8..256"},
      {"pool", "key_weights_backward", "csrc/cuda/centred_bwd.cu", "sm_80+", all, "8..256"},
      {"fine", "backward_columns", "csrc/cuda/sm80/backward_columns.cuh", "sm_80+", all, dims},
  };
}

}  // namespace mra::cuda
