// Persistent blocks of threads of several teams: warpgroups that attend tiles of their own, and for
// each, in one more warpgroup behind them all, the warp that fetches. Nothing but registers is
// theirs together, so that three teams run where two blocks of threads of twice 128 would: what
// these leave to warps that don't fetch goes to the third.
#pragma once

#include <algorithm>

#include "../sm80/tile.cuh"
#include "tma.cuh"

namespace mra::cuda::sm90 {

template <int kTeams>
struct Team {
  const int fetcher;  // which of the warps that fetch; below zero: one of those that attend
  const int index;

  __device__ __forceinline__ Team()
      : fetcher(warp_index() - 4 * kTeams),
        index(kTeams == 1    ? 0
              : fetcher >= 0 ? fetcher % kTeams
                             : warp_index() / 4) {}

  __device__ __forceinline__ bool attends() const { return fetcher < 0; }
  __device__ __forceinline__ bool fetches() const { return fetcher >= 0 && fetcher < kTeams; }
  // Those of this team that attend meet. Its number is found again: no register keeps it.
  static __device__ __forceinline__ void sync() {
    group_sync(kTeams == 1 ? 0 : static_cast<int>(threadIdx.x) / 128);
  }
  // Of those that attend, which of its team: read again each time, for who has no register for it.
  static __device__ __forceinline__ int thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread % 128;
  }
  // Of those that attend.
  __device__ __forceinline__ bool first_thread() const {
    return attends() && threadIdx.x % 128 == 0;
  }
};

// From one team's Shared, with `more` bytes behind it, to the next one's.
template <class Shared>
__host__ __device__ constexpr int team_pitch(int more = 0) {
  return (static_cast<int>(sizeof(Shared)) + more + 1023) / 1024 * 1024;
}

// Launches persistent blocks of threads, of kTeams each, over the items of `p`. `more`: bytes
// behind the Shared of each team.
template <class Shared, class Traits, int kTeams = 1, class Maps>
cudaError_t launch_teams(void (*kernel)(Maps), const Maps& p, const Device& device,
                         cudaStream_t stream, Together together = {}, int more = 0) {
  // Panels start on multiples of 1024 bytes.
  const size_t bytes = 1024 + (kTeams - 1) * team_pitch<Shared>(more) + sizeof(Shared) + more;
  if (bytes > static_cast<size_t>(device.max_smem)) return cudaErrorNotSupported;
  const int blocks = std::min(p.items, Traits::kBlocks * device.sms);
  return launch_grid(kernel, blocks, Traits::kThreads, bytes, stream, together, p);
}

}  // namespace mra::cuda::sm90
