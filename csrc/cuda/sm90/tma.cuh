// Hopper's bulk tensor copies and the barriers that they complete on.
#pragma once

#include <cuda.h>

#include "../sm80/mma.cuh"
#include "../types.h"

namespace mra::cuda::sm90 {

template <typename T>
inline constexpr Dtype kDtype = std::is_same_v<T, __half> ? Dtype::f16 : Dtype::bf16;

// What starts at the next multiple of 1024 bytes, as panels must, of dynamic shared memory. Rounded
// by an offset: behind a pointer made from an integer the compiler would not know shared memory.
template <class Shared>
__device__ __forceinline__ Shared& aligned(char* raw) {
  return *reinterpret_cast<Shared*>(raw + (-smem_address(raw) & 1023));
}

// A barrier is passed by warps: one lane arrives behind a __syncwarp. compute-sanitizer's racecheck
// doesn't follow that (docs/kernels.md); for it, every lane arrives.
#ifdef MRA_EVERY_LANE_ARRIVES
inline constexpr bool kRacecheck = true;
#else
inline constexpr bool kRacecheck = false;
#endif
inline constexpr int kWarpArrivals = kRacecheck ? 32 : 1;

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int warps) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)),
               "r"(warps * kWarpArrivals));
}
// Those of the places of a ring: one producer fills a place, `warps` consumers empty it.
template <int kPlaces>
__device__ __forceinline__ void barrier_init_ring(uint64_t (&full)[kPlaces],
                                                  uint64_t (&empty)[kPlaces], int warps) {
  for (int i = 0; i < kPlaces; ++i) {
    barrier_init(&full[i], 1);
    barrier_init(&empty[i], warps);
  }
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// By a whole warp.
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  __syncwarp();
  if (!kRacecheck && threadIdx.x % 32 != 0) return;
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}
// By a whole warp, whose first lane announces `bytes` of copies besides.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)),
        "r"(bytes)
        : "memory");
  } else if (kRacecheck) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier))
                 : "memory");
  }
  __syncwarp();
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nwait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\nbra wait;\ndone:\n}" ::"r"(smem_address(barrier)),
      "r"(parity)
      : "memory");
}

// Whether a wait for `parity` would be over. Asked early, so that barrier_wait need not ask again.
__device__ __forceinline__ bool barrier_passed(uint64_t* barrier, int parity) {
  uint32_t passed;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed)
      : "r"(smem_address(barrier)), "r"(parity)
      : "memory");
  return passed;
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity, bool passed) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p bra done;\nwait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\nbra wait;\ndone:\n}" ::"r"(smem_address(barrier)),
      "r"(parity), "r"(static_cast<int>(passed))
      : "memory");
}

// One of a ring's kStages places, and how often the ring has gone round, as a parity: that of the
// `count`th tile in it.
template <int kStages>
struct RingPlace {
  int stage, phase;

  RingPlace() = default;
  __device__ __forceinline__ explicit RingPlace(int count)
      : stage(count % kStages), phase(count / kStages & 1) {}
  // Keeps the compiler from finding it later on, from the count.
  __device__ __forceinline__ void settle() { asm volatile("" : "+r"(stage), "+r"(phase)); }
};

// What a map's copies take, from column d and row l on of head h of batch b; zeros outside of the
// tensor.
__device__ __forceinline__ void copy_panel(void* to, const CUtensorMap& map, uint64_t* barrier,
                                           int d, int l, int h, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem_address(to)),
      "l"(&map), "r"(smem_address(barrier)), "r"(d), "r"(l), "r"(h), "r"(b)
      : "memory");
}

// The same way back; only what lies inside of the tensor is written.
__device__ __forceinline__ void store_panel(const CUtensorMap& map, const void* from, int d, int l,
                                            int h, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
          "l"(&map),
      "r"(smem_address(from)), "r"(d), "r"(l), "r"(h), "r"(b)
      : "memory");
}
// Adds to what is there instead, rounding to the tensor's type.
__device__ __forceinline__ void add_panel(const CUtensorMap& map, const void* from, int d, int l,
                                          int h, int b) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group "
      "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(smem_address(from)), "r"(d), "r"(l), "r"(h), "r"(b)
      : "memory");
}
__device__ __forceinline__ void give_panel(bool add, const CUtensorMap& map, const void* from,
                                           int d, int l, int h, int b) {
  if (add) {
    add_panel(map, from, d, l, h, b);
  } else {
    store_panel(map, from, d, l, h, b);
  }
}
__device__ __forceinline__ void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until this thread's stores have read what they store.
__device__ __forceinline__ void store_wait() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// By a whole warp, once the stores of the first thread of its warpgroup have read what they store.
__device__ __forceinline__ void arrive_behind_stores(uint64_t* barrier) {
  if (threadIdx.x % 128 == 0) store_wait();
  barrier_arrive(barrier);
}
// One of a block's barriers, from 1 on: kThreads threads meet, and each sees what the others wrote
// before.
template <int kThreads>
__device__ __forceinline__ void meet(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
// Part of that which does not wait: by whole warps. racecheck does not follow it.
template <int kThreads>
__device__ __forceinline__ void arrive(int barrier) {
  __syncwarp();
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
// The 128 threads that attend, where one warpgroup does, or those of one of several.
__device__ __forceinline__ void group_sync(int group = 0) { meet<128>(1 + group); }
// The warps that don't fetch, where a warpgroup has 64 columns each.
template <int DP>
__device__ __forceinline__ void consumer_sync() {
  meet<2 * DP>(1);
}
// Two warpgroups at once.
__device__ __forceinline__ void groups_sync() { meet<256>(3); }
// What this thread wrote to shared memory is seen by copies that follow.
__device__ __forceinline__ void fence_for_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// `bytes` (a multiple of 16) as they lie.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes,
                                           uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem_address(to)),
      "l"(from), "r"(bytes), "r"(smem_address(barrier))
      : "memory");
}

// Map of a [B, H, L, D] tensor of a half type for copies of `rows` rows x `columns`, 64 or 32, each
// with the swizzle of its width; false where the tensor has no map.
bool tensor_map(CUtensorMap* map, Dtype dtype, const void* data, const Strides& strides, int B,
                int H, int L, int D, int rows, int columns = 64);
// Side of the matrices that heads of D columns have (moments_dim of common/stages.h).
template <int DP>
constexpr int matrix_dim(int D) {
  return DP == 64 && D <= 32 ? 32 : DP;
}
// Of pairs of matrices [B, H, 2, dim, dim] bfloat16, contiguous: matrix i of head h is at 2 h + i.
inline bool matrices_map(CUtensorMap* map, const void* data, int B, int H, int dim) {
  const int64_t matrix = int64_t{dim} * dim;
  return tensor_map(map, Dtype::bf16, data, {2 * H * matrix, matrix, dim}, B, 2 * H, dim, dim, 64);
}
// Of means of blocks [B, H, n, D], contiguous, for copies of `rows`.
inline bool means_map(CUtensorMap* map, Dtype dtype, const void* data, int B, int H, int n, int D,
                      int rows = 64) {
  const int64_t head = int64_t{n} * D;
  return tensor_map(map, dtype, data, {H * head, head, D}, B, H, n, D, rows);
}

// A pair of matrices of head h of batch b, whole, by one thread that has announced its bytes.
template <int DP>
__device__ __forceinline__ void copy_matrices(uint16_t (&to)[2][DP / 64][DP][64],
                                              const CUtensorMap& map, uint64_t* barrier, int h,
                                              int b) {
  constexpr int kPanels = DP / 64;
  for (int i = 0; i < 2 * kPanels; ++i) {
    for (int r = 0; r < DP; r += 64) {
      copy_panel(to[i / kPanels][i % kPanels][r], map, barrier, i % kPanels * 64, r,
                 2 * h + i / kPanels, b);
    }
  }
}

}  // namespace mra::cuda::sm90
