// Gradients of the keys and values on Hopper with those of order 1: what backward_columns.cuh and
// order1_keys.cuh compute, for bfloat16, key blocks of 64 and head dims up to 64, in one pass over
// keys, values and their gradients. dC and dSigma come through the ring as the last tile of rows.
// Then the keys and values, whose scores are done, are centred where they are.
#pragma once

#include "backward_columns.cuh"
#include "key_tiles.cuh"
#include "key_weights.cuh"

namespace mra::cuda::sm90 {

struct ColumnsOrder1Maps : BackwardColumnsMaps {
  Order1Keys of;
  CUtensorMap matrices_map;
};

template <bool kWeighted>
struct ColumnsOrder1Shared : BackwardColumnsShared<64> {
  using T = __nv_bfloat16;
  using Base = BackwardColumnsShared<64>;
  static constexpr int kPlaces = Base::kPlaces, kStages = Base::kStages;
  // Of every other tile of keys: which of them count, the means of keys and values; with weights
  // these, and the centre.
  uint32_t valid[2][2];
  alignas(16) float means[2][2][64];
  alignas(16) float weight[kWeighted ? 2 : 1][64], centre[kWeighted ? 2 : 1][64];
  float totals[4];
  alignas(8) float centre_parts[kWeighted ? 4 : 1][64];  // of the 16 keys of each warp

  __device__ __forceinline__ auto& panel(int place, int which, int i) {
    return which == 0 ? this->k[place][i] : this->v[place][i];
  }
  // dC and dSigma, by the warp that fetches, as the next tile of rows: in the place of queries and
  // in that of dO.
  __device__ void fetch_last(const ColumnsOrder1Maps& p, const KeyTile& at, int& fetched) {
    const int stage = fetched % kStages;
    if (fetched >= kStages) barrier_wait(&this->empty[stage], fetched / kStages - 1 & 1);
    barrier_expect(&this->full[stage], 2 * 64 * 64 * 2);
    if (threadIdx.x % 32 == 0) {
      copy_panel(this->q[stage][0], p.matrices_map, &this->full[stage], 0, 0, 2 * at.hk, at.b);
      copy_panel(this->grad_out[stage][0], p.matrices_map, &this->full[stage], 0, 0, 2 * at.hk + 1,
                 at.b);
    }
    __syncwarp();
    ++fetched;
  }
};

template <bool kWeighted>
__device__ void fetch_tile(const ColumnsOrder1Maps& p, ColumnsOrder1Shared<kWeighted>& s,
                           const KeyTile& at, int turn) {
  const int lane = threadIdx.x % 32, place = turn % 2, bytes = p.D * 4;
  uint32_t bits[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int j = at.first_key + 32 * half + lane;
    const bool there =
        j < p.M && (p.key_mask == nullptr || p.key_mask[static_cast<int64_t>(at.b) * p.M + j] != 0);
    bits[half] = __ballot_sync(kFullWarp, there);
  }
  if (lane == 0) {
    s.tile[place] = at;
    s.valid[place][0] = bits[0];
    s.valid[place][1] = bits[1];
  }
  const int shares = p.k_block == nullptr ? 0 : 2;
  s.fetch_keys(place, p.k_map, p.v_map, at.first_key, at.hk, at.b,
               (shares + 2 + (kWeighted ? 1 : 0)) * bytes + (kWeighted ? 256 : 0));
  if (lane != 0) return;
  const int64_t head = static_cast<int64_t>(at.b) * p.Hk + at.hk, block = head * p.nk + at.list(p);
  uint64_t* const full = &s.keys_full[place];
  if (shares > 0) {
    copy_bytes(s.blocks[place][0], p.k_block + block * p.D, bytes, full);
    copy_bytes(s.blocks[place][1], p.v_block + block * p.D, bytes, full);
  }
  copy_bytes(s.means[place][0], p.of.k_mean + block * p.D, bytes, full);
  copy_bytes(s.means[place][1], p.of.v_mean + block * p.D, bytes, full);
  if constexpr (kWeighted) {
    copy_bytes(s.weight[place], p.of.weights + block * 64, 256, full);
    copy_bytes(s.centre[place], p.of.centre + head * p.D, bytes, full);
  }
}

// The gradients `through` of log weights in those of a thread's keys, and what the centre gets.
__device__ __forceinline__ void add_through(float (&dk)[8][4], const ColumnsOrder1Maps& p,
                                            ColumnsOrder1Shared<true>& s, int place,
                                            const float (&through)[2], const bool (&live)[2]) {
  using T = __nv_bfloat16;
  const int warp = warp_index() % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float of_centre[2][8];  // of the columns 8 n + 2 t and behind
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const bool there = 8 * n + 2 * t < p.D;
    const float2 centre = there ? load_pair(s.centre[place] + 8 * n + 2 * t) : float2{};
    of_centre[0][n] = of_centre[1][n] = 0.f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (live[half]) {
        dk[n][2 * half] = fmaf(through[half], centre.x, dk[n][2 * half]);
        dk[n][2 * half + 1] = fmaf(through[half], centre.y, dk[n][2 * half + 1]);
      }
      const int r = 16 * warp + g + 8 * half, at = (n ^ g) * 8 + 2 * t;
      const float2 kappa = unpack2(*reinterpret_cast<const uint32_t*>(&s.k[place][0][r][at]), T{});
      of_centre[0][n] = fmaf(through[half], kappa.x, of_centre[0][n]);
      of_centre[1][n] = fmaf(through[half], kappa.y, of_centre[1][n]);
    }
  }
  *reinterpret_cast<float2*>(&s.centre_parts[warp][8 * g + 2 * t]) =
      make_float2(reduce_scatter(of_centre[0]), reduce_scatter(of_centre[1]));
}

// To what the keys at `place` have from their rows, dk less the factor p.scale and dv, adds order 1
// and what their block shares. dC and dSigma lie at `stage`. With weights, where shares and
// deviations count by these, also what comes through them; what the centre gets of each warp's keys
// is left in s.centre_parts.
template <bool kWeighted>
__device__ __forceinline__ void add_order1(float (&dk)[8][4], float (&dv)[8][4],
                                           const ColumnsOrder1Maps& p,
                                           ColumnsOrder1Shared<kWeighted>& s, int place, int stage,
                                           float mass_grad) {
  using T = __nv_bfloat16;
  using Team = sm90::Team<BackwardColumnsTraits<64>::kTeams>;
  const int warp = warp_index() % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  Team::sync();  // every warp's scores are done
  take_means<1, false>(s, place, warp, s.means[place], p.D);
  fence_for_copies();  // products read shared memory as copies do
  Team::sync();
  const bool shares = p.k_block != nullptr;
  const float* const share = s.blocks[place][0] + 2 * t;
  const float* const value_share = s.blocks[place][1] + 2 * t;
  const int count = __popc(s.valid[place][0]) + __popc(s.valid[place][1]);
  float weight[2], factor[2];
  bool live[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = 16 * warp + g + 8 * half;
    live[half] = s.valid[place][warp / 2] >> r % 32 & 1;
    weight[half] = kWeighted ? s.weight[place][r] : 1.f;
    factor[half] = kWeighted ? weight[half] * static_cast<float>(count) : 1.f;
  }
  // To columns 8 n + 2 t and behind products with matrices, and shares u.
  const auto add = [&](float(&to)[4], float scale, const float(&products)[4], const float2& u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float share = i % 2 ? u.y : u.x;
      const float more =
          kWeighted ? fmaf(factor[i / 2], products[i], weight[i / 2] * share) : products[i] + share;
      to[i] = live[i / 2] ? fmaf(to[i], scale, more) : 0.f;
    }
  };
  const auto start = [](float(&x)[8][4], const auto& multiply) {
    pin(x);
    wgmma_fence();
    multiply(x);
    wgmma_commit();
  };
  const auto of_keys = [&](float(&x)[8][4]) {
    multiply_matrix<T, false>(x, s.k[place], s.grad_out[stage], 0, false);
    multiply_matrix<T, true>(x, s.v[place], s.q[stage], 0, true);
  };
  const auto of_values = [&](float(&x)[8][4]) {
    multiply_matrix<T, false>(x, s.k[place], s.q[stage], 0, false);
  };
  float x[8][4];
  start(x, of_keys);
  if constexpr (!kWeighted) {
    float y[8][4];
    start(y, of_values);
    wgmma_wait<0>();
    pin(x);
    pin(y);
    barrier_arrive(&s.empty[stage]);
    Team::sync();  // and their products with dC and dSigma
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const bool there = shares && 8 * n + 2 * t < p.D;
      add(dk[n], p.scale, x[n], there ? load_pair(share + 8 * n) : float2{});
      add(dv[n], 1.f, y[n], there ? load_pair(value_share + 8 * n) : float2{});
    }
  } else {
    // One after the other, in the same registers: others don't suffice for what is made of them.
    WeightsBackward<1, 8, 1> weights{s.weight[place], s.totals, count, p.D};
    wgmma_wait<0>();
    pin(x);
    weights.add(s.k[place], x, share,
                [&](int n, const float2& u) { add(dk[n], p.scale, x[n], u); });
    start(x, of_values);
    wgmma_wait<0>();
    pin(x);
    barrier_arrive(&s.empty[stage]);
    weights.add(s.v[place], x, value_share,
                [&](int n, const float2& u) { add(dv[n], 1.f, x[n], u); });
    float through[2];  // gradients of log weights
    weights.finish(through, mass_grad, p.scale, [] { Team::sync(); });
    add_through(dk, p, s, place, through, live);
  }
}

template <bool kWeighted>
__global__ void __launch_bounds__(BackwardColumnsTraits<64>::kThreads,
                                  BackwardColumnsTraits<64>::kBlocks)
    backward_columns_order1_kernel(const __grid_constant__ ColumnsOrder1Maps p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = __nv_bfloat16;
  using Shared = ColumnsOrder1Shared<kWeighted>;
  using Traits = BackwardColumnsTraits<64>;
  constexpr int kPlaces = Shared::kPlaces, kStages = Shared::kStages, kTeams = Traits::kTeams;
  static_assert(kPlaces == 2 && !Shared::kEarly);
  extern __shared__ char raw[];
  using Team = sm90::Team<kTeams>;
  const Team team;
  Shared& s = aligned<Shared>(raw + team.index * team_pitch<Shared>());

  if (team.first_thread()) {
    s.init();
    barrier_init_done();
  }
  __syncthreads();
  if (!team.attends()) {
    give_registers<Traits::kGiven>();
    if (team.fetches()) fetch_ahead<kTeams>(p, s, team.index);
    return;
  }
  take_registers<Traits::kTaken>();

  int before = 0, turn = 0;  // tiles of rows before this tile of keys; tiles of keys
#pragma unroll 1
  for (;; ++turn) {
    const int place = turn % kPlaces;
    float dk[8][4] = {}, dv[8][4] = {};
    barrier_wait(&s.keys_full[place], turn / kPlaces & 1);
    const KeyTile& at = s.tile[place];
    const int tiles = uniform(at.tiles);
    if (tiles < 0) break;
    // Of all heads; found again where it is needed again.
    const auto block = [&] {
      return (static_cast<int64_t>(at.b) * p.Hk + at.hk) * p.nk + at.list(p);
    };
    // Once the gradients of the tile before have left, the place that they took.
    if (turn > 0) arrive_behind_stores(&s.keys_empty[(turn - 1) % kPlaces]);
    const float none[2] = {};
    attend_rows<T, 64, false>(dk, dv, s, place, before, tiles, p.scale, false, at.first_key, none);
    before += tiles;

    const int stage = uniform(before % kStages);
    barrier_wait(&s.full[stage], before / kStages & 1);
    ++before;
    add_order1<kWeighted>(dk, dv, p, s, place, stage, kWeighted ? p.of.mass_grad[block()] : 0.f);
    place_rows_by_pairs<T>(s.k[place], dk);
    place_rows_by_pairs<T>(s.v[place], dv);
    fence_for_copies();
    Team::sync();
    const int thread = Team::thread();
    if (thread == 0) {
      store_panel(p.grad_k_map, s.k[place][0], 0, at.first_key, at.hk, at.b);
      store_panel(p.grad_v_map, s.v[place][0], 0, at.first_key, at.hk, at.b);
      store_commit();
    }
    if (kWeighted && thread < p.D) {
      float sum = 0.f;
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) sum += s.centre_parts[warp][thread];
      p.of.centre_grads[block() * p.D + thread] = sum;
    }
  }
  if (Team::thread() == 0) store_wait();
  if (blockIdx.x == 0) wait_for_previous();
#endif
}

template <int DP>
cudaError_t launch_backward_columns_order1(const ColumnsOrder1& params, const Device& device,
                                           cudaStream_t stream) {
  static_assert(DP == 64);
  ColumnsOrder1Maps p{params};
  p.of = params.order1;
  if (p.block_k != 64 || p.causal || p.D % 8 != 0) return cudaErrorNotSupported;
  const cudaError_t error = p.set(Dtype::bf16);
  if (error != cudaSuccess) return error;
  if (!matrices_map(&p.matrices_map, p.of.moment_grads, p.B, p.Hk, matrix_dim<DP>(p.D))) {
    return cudaErrorNotSupported;
  }
  const auto launch = [&](auto weighted) {
    using Traits = BackwardColumnsTraits<DP>;
    using Shared = ColumnsOrder1Shared<weighted()>;
    static_assert(Traits::kTeams * team_pitch<Shared>() <= 226 * 1024);
    return launch_teams<Shared, Traits, Traits::kTeams>(backward_columns_order1_kernel<weighted()>,
                                                        p, device, stream, Together{p.beside});
  };
  return p.of.weights != nullptr ? launch(std::true_type{}) : launch(std::false_type{});
}

}  // namespace mra::cuda::sm90
