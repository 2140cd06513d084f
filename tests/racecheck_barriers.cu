// What compute-sanitizer's racecheck follows of an mbarrier. One warp hands words to another in
// four ways, each of them correct; 0 and 3 are reported clean, 1 and 2 are not (seen with
// CUDA 13.0):
//
//   nvcc -std=c++17 -arch=sm_90a -o racecheck_barriers tests/racecheck_barriers.cu
//   compute-sanitizer --tool racecheck ./racecheck_barriers 1
//
//   0  every lane arrives
//   1  one lane arrives behind a __syncwarp
//   2  as 1, and it announces the bytes of a bulk copy besides
//   3  every thread arrives at a cuda::barrier
//
// And by numbered barriers: 4 and 6 are reported, 5 is clean.
//
//   4  the warp that hands over arrives by bar.arrive
//   5  it waits there too, by bar.sync
//   6  as 5, from each warpgroup of four to the next one
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda/barrier>

__device__ uint32_t address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ void start(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals));
}
__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}
__device__ void expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ void wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nwait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\nbra wait;\ndone:\n}" ::"r"(address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ void copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(address(to)),
      "l"(from), "r"(bytes), "r"(address(barrier))
      : "memory");
}

template <int kWay>
__global__ void hand_over(const float* in, float* out, int turns) {
  __shared__ alignas(16) float word[2][32], bulk[2][32];
  __shared__ uint64_t full[2], empty[2];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < 2) {
    start(&full[threadIdx.x], kWay == 0 ? 32 : 1);
    start(&empty[threadIdx.x], kWay == 0 ? 32 : 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < turns; ++i) {
    const int s = i % 2;
    if (warp == 0) {
      if (i >= 2) wait(&empty[s], i / 2 - 1 & 1);
      word[s][lane] = in[lane] * i;
      if (kWay == 0) arrive(&full[s]);
      if (kWay > 0) __syncwarp();
      if (kWay == 1 && lane == 0) arrive(&full[s]);
      if (kWay == 2 && lane == 0) {
        expect(&full[s], sizeof(bulk[s]));
        copy(bulk[s], in, sizeof(bulk[s]), &full[s]);
      }
      if (kWay > 0) __syncwarp();
    } else {
      wait(&full[s], i / 2 & 1);
      sum += word[s][31 - lane];
      if (kWay > 0) __syncwarp();
      if (kWay == 0 || lane == 0) arrive(&empty[s]);
    }
  }
  if (warp == 1) out[lane] = sum;
}

__global__ void hand_over_by_cuda_barrier(const float* in, float* out, int turns) {
  using Barrier = cuda::barrier<cuda::thread_scope_block>;
  __shared__ float word[2][32];
  __shared__ Barrier full[2], empty[2];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < 2) {
    init(&full[threadIdx.x], 64);
    init(&empty[threadIdx.x], 64);
  }
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < turns; ++i) {
    const int s = i % 2;
    if (warp == 0) {
      if (i >= 2) empty[s].arrive_and_wait();
      word[s][lane] = in[lane] * i;
      static_cast<void>(full[s].arrive());
    } else {
      full[s].arrive_and_wait();
      sum += word[s][31 - lane];
      if (i + 2 < turns) static_cast<void>(empty[s].arrive());
    }
  }
  if (warp == 1) out[lane] = sum;
}

// By two of a block's numbered barriers, full and empty, of kThreads threads.
template <bool kArrives, int kThreads = 64>
__device__ void tell(int barrier) {
  if (kArrives) {
    __syncwarp();
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
  }
}

template <bool kArrives>
__global__ void hand_over_by_numbered_barrier(const float* in, float* out, int turns) {
  __shared__ float word[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = 0.f;
  for (int i = 0; i < turns; ++i) {
    if (warp == 0) {
      if (i > 0) tell<false>(2);
      word[lane] = in[lane] * i;
      tell<kArrives>(1);
    } else {
      tell<false>(1);
      sum += word[31 - lane];
      if (i + 1 < turns) tell<kArrives>(2);
    }
  }
  if (warp == 1) out[lane] = sum;
}

// Sums that the last warpgroup starts and the first one ends, by a barrier of each two.
__global__ void hand_on(const float* in, float* out, int turns) {
  __shared__ float sums[128];
  const int thread = threadIdx.x % 128, group = threadIdx.x / 128, last = blockDim.x / 128 - 1;
  for (int i = 0; i < turns; ++i) {
    __syncthreads();
    if (group < last) tell<false, 256>(1 + group);
    const float sum = (group < last ? sums[thread] : 0.f) + in[thread % 32] * group;
    if (group > 0) {
      sums[thread] = sum;
      tell<false, 256>(group);
    } else if (thread < 32) {
      out[thread] = sum;
    }
  }
}

int main(int argc, char** argv) {
  const int way = argc > 1 ? std::atoi(argv[1]) : 0, turns = 20;
  float *in, *out;
  cudaMalloc(&in, 128);
  cudaMalloc(&out, 128);
  cudaMemset(in, 0, 128);
  if (way == 0) hand_over<0><<<1, 64>>>(in, out, turns);
  if (way == 1) hand_over<1><<<1, 64>>>(in, out, turns);
  if (way == 2) hand_over<2><<<1, 64>>>(in, out, turns);
  if (way == 3) hand_over_by_cuda_barrier<<<1, 64>>>(in, out, turns);
  if (way == 4) hand_over_by_numbered_barrier<true><<<1, 64>>>(in, out, turns);
  if (way == 5) hand_over_by_numbered_barrier<false><<<1, 64>>>(in, out, turns);
  if (way == 6) hand_on<<<1, 512>>>(in, out, turns);
  std::printf("way %d: %s\n", way, cudaGetErrorString(cudaDeviceSynchronize()));
}
