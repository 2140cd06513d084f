// Plain types that .cu and .cpp files share. No torch header here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mra::cuda {

enum class Dtype { f32, f16, bf16 };

// Strides in elements of a [B, H, L, D] tensor whose last stride is 1.
struct Strides {
  int64_t b, h, l;
};

// Of heads with a density each: they, and the order they make, are arguments of kernels.
constexpr int kMostDensities = 128;

// What a launcher needs to know of the device.
struct Device {
  int sms;       // multiprocessors
  int max_smem;  // bytes of shared memory that one block may ask for
  int major;     // compute capability
};

}  // namespace mra::cuda
