// Sums over a block in a fixed order: the same inputs give the same bits on every run.
#pragma once

#include "platform.h"

namespace fastkd {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// Every thread of the block must call this; the sum is valid in all threads of the first warp.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value) {
  static_assert(kThreads % kWarpSize == 0 && kThreads <= kWarpSize * kWarpSize);
  __shared__ float warp_sums[kThreads / kWarpSize];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;

  value = warp_sum(value);
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < kThreads / kWarpSize ? warp_sums[lane] : 0.f);
  __syncthreads();  // warp_sums may be written again right after
  return value;
}

// Adds the per-block partial sums and scales them; launched with one block of kThreads.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    finish_sum(const float* partials, int count, float scale, float* result) {
  float sum = 0.f;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) *result = sum * scale;
}

}  // namespace fastkd
