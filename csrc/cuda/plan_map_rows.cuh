// Rows of a map in shared memory as one warp sees them: four neighbouring entries a lane, 128 a
// step. Loops stay loops: a block of threads comes by once, and waits for the code of each turn.
#pragma once

#include <climits>

#include "plan_coarse.cuh"

namespace mra::cuda {

struct Fours {
  uint32_t key[4];

  __device__ __forceinline__ explicit Fours(const uint32_t* from) {
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    key[0] = four.x, key[1] = four.y, key[2] = four.z, key[3] = four.w;
  }
  __device__ __forceinline__ void write(uint32_t* to) const {
    *reinterpret_cast<uint4*>(to) = make_uint4(key[0], key[1], key[2], key[3]);
  }
  __device__ __forceinline__ uint32_t highest() const {
    return max(max(key[0], key[1]), max(key[2], key[3]));
  }
};

// Which of a step's keys are taken, as take_lanes: of this lane's four, as bits; how many of the
// lanes below it, and of all.
struct Taken {
  unsigned mine = 0;
  int before, total;

  __device__ __forceinline__ Taken(const Fours& of, uint32_t cut, int& ties) {
    unsigned same = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      mine |= static_cast<unsigned>(of.key[e] > cut) << e;
      same |= static_cast<unsigned>(of.key[e] == cut) << e;
    }
    if (ties > 0 && __any_sync(kFullWarp, same != 0)) {  // the same for the whole warp
      count(same);
      const int equal = total;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if ((same >> e & 1) != 0 && before++ < ties) mine |= 1u << e;
      }
      if (ties != INT_MAX) ties -= min(ties, equal);
    }
    count(mine);
  }

 private:
  __device__ __forceinline__ void count(unsigned bits) {
    const unsigned below = (1u << threadIdx.x % 32) - 1;
    before = total = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const unsigned lanes = __ballot_sync(kFullWarp, (bits >> e & 1) != 0);
      before += __popc(lanes & below);
      total += __popc(lanes);
    }
  }
};

// A row of keys, made relative to its highest, which is written to *of_row as a score; returns how
// many of this lane's exist.
__device__ __forceinline__ int relate_row(uint32_t* row, int width, float* of_row) {
  const int lane = threadIdx.x % 32;
  uint32_t highest = kAbsent;
#pragma unroll 1
  for (int y = 4 * lane; y < width; y += 128) highest = max(highest, Fours(row + y).highest());
  const float top = relative_to(__reduce_max_sync(kFullWarp, highest));
  if (lane == 0) *of_row = fmaxf(top, -FLT_MAX);
  int exist = 0;
#pragma unroll 1
  for (int y = 4 * lane; y < width; y += 128) {
    Fours four(row + y);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      exist += four.key[e] != kAbsent;
      four.key[e] = relative_key(four.key[e], top);
    }
    four.write(row + y);
  }
  return exist;
}

// A row of scores, -inf for what isn't left -> weights of the block-coarse state, in place.
// counts[y]: keys of block y. *of_row, added to the lse of the row, becomes 1 / sum of its weights,
// or 0.
__device__ __forceinline__ void weigh_row(float* row, int width, const float* counts, bool tf32,
                                          float* of_row, float* lse) {
  const int lane = threadIdx.x % 32;
  const float offset = *of_row;
  float top = -INFINITY;
#pragma unroll 1
  for (int y = 4 * lane; y < width; y += 128) {
    const float4 four = *reinterpret_cast<const float4*>(row + y);
    top = fmaxf(top, fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)));
  }
  top = top_score(__reduce_max_sync(kFullWarp, key_of(top)));
  float sum = 0.f;
#pragma unroll 1
  for (int y = 4 * lane; y < width; y += 128) {
    const float4 count = *reinterpret_cast<const float4*>(counts + y);
    float4* const at = reinterpret_cast<float4*>(row + y);
    const float4 four = *at;
    const float weight[4] = {weight_of(four.x, top, count.x), weight_of(four.y, top, count.y),
                             weight_of(four.z, top, count.z), weight_of(four.w, top, count.w)};
    sum += (weight[0] + weight[1]) + (weight[2] + weight[3]);
    *at = make_float4(weight_operand(weight[0], tf32), weight_operand(weight[1], tf32),
                      weight_operand(weight[2], tf32), weight_operand(weight[3], tf32));
  }
  const float inverse = finish_weights(sum, offset + top, lse);
  __syncwarp();  // every lane has read *of_row
  if (lane == 0) *of_row = inverse;
}

}  // namespace mra::cuda
