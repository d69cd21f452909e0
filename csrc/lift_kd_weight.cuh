// The weight's gradient of lift_kd: slopes, transposed, times tokens.
//
// A block sums a tile of the weight over a run of rows, two stages of 64 rows in shared memory (62
// KB for 192 -> 384): while one is multiplied, the next is on its way through registers. Slopes are
// read In / 96 times and tokens Out / 128 times, from L2.
#pragma once

#include "lift_kd_rows.cuh"

namespace fastkd {

template <int In, int Out>
struct WeightTile {
  static constexpr int kOutputs = Out < 128 ? Out : 128, kInputs = In < 64 ? In : In / 2,
                       kRows = 64;
  static constexpr int kOutputStride = kOutputs + kPadding, kInputStride = kInputs + kPadding;
  static constexpr int kStage = kRows * (kOutputStride + kInputStride);  // elements
  static constexpr int kBytes = 2 * kStage * 2;
  static constexpr int kCount = Out / kOutputs * (In / kInputs);
  // Octets per thread and stage.
  static constexpr int kSlopeOctets = kRows * kOutputs / kOctet / kLiftThreads;
  static constexpr int kTokenOctets = kRows * kInputs / kOctet / kLiftThreads;
  static constexpr int kWarpOutputs = kOutputs / 4 / 16,
                       kWarpInputs = kInputs / 2 / 8;  // mma tiles
};

struct WeightGradient {
  OctetMap tokens;
  Slots slots;
  int first_row, rows;  // of the chunk, in slots
  const void* slopes;
  float* weight_parts;
  bool accumulate;
};

// A stage of both factors on its way from global to shared memory, through registers.
template <typename C, int In, int Out>
struct WeightStage {
  using Tile = WeightTile<In, Out>;
  uint4 slopes[Tile::kSlopeOctets], tokens[Tile::kTokenOctets];

  __device__ __forceinline__ void fetch(const WeightGradient& p, int first, int end, int output,
                                        int input) {
    constexpr int kSlopesPerRow = Tile::kOutputs / kOctet, kTokensPerRow = Tile::kInputs / kOctet;
#pragma unroll
    for (int i = 0; i < Tile::kSlopeOctets; ++i) {
      const int index = i * kLiftThreads + threadIdx.x;
      const int row = first + index / kSlopesPerRow;
      const int64_t place = int64_t{row} * Out + output + index % kSlopesPerRow * kOctet;
      slopes[i] = uint4{};
      if (row < end)
        slopes[i] = *reinterpret_cast<const uint4*>(static_cast<const C*>(p.slopes) + place);
    }
#pragma unroll
    for (int i = 0; i < Tile::kTokenOctets; ++i) {
      const int index = i * kLiftThreads + threadIdx.x;
      const int row = first + index / kTokensPerRow;
      const Slot slot = slot_at(p.slots, p.first_row + row);
      tokens[i] = uint4{};
      if (row >= end || !slot.filled) continue;
      const int channel = input + index % kTokensPerRow * kOctet;
      typed(p.tokens, offset_of(p.tokens, slot, channel),
            [&](const auto* source) { tokens[i] = read_operand<C>(source, p.tokens); });
    }
  }

  __device__ __forceinline__ void store(C* memory) const {
    constexpr int kSlopesPerRow = Tile::kOutputs / kOctet, kTokensPerRow = Tile::kInputs / kOctet;
#pragma unroll
    for (int i = 0; i < Tile::kSlopeOctets; ++i) {
      const int index = i * kLiftThreads + threadIdx.x;
      *reinterpret_cast<uint4*>(memory + index / kSlopesPerRow * Tile::kOutputStride +
                                index % kSlopesPerRow * kOctet) = slopes[i];
    }
    memory += Tile::kRows * Tile::kOutputStride;
#pragma unroll
    for (int i = 0; i < Tile::kTokenOctets; ++i) {
      const int index = i * kLiftThreads + threadIdx.x;
      *reinterpret_cast<uint4*>(memory + index / kTokensPerRow * Tile::kInputStride +
                                index % kTokensPerRow * kOctet) = tokens[i];
    }
  }
};

// One block per tile of the weight (blockIdx.x) and run of the chunk's rows (blockIdx.y).
template <typename C, int In, int Out>
__global__ void __launch_bounds__(kLiftThreads, 1) weight_gradient(WeightGradient p) {
  using Tile = WeightTile<In, Out>;
  constexpr int kM = Tile::kWarpOutputs, kN = Tile::kWarpInputs;
  FASTKD_DYNAMIC_SHARED(memory);
  C* const stages = reinterpret_cast<C*>(memory);

  const int output = blockIdx.x / (In / Tile::kInputs) * Tile::kOutputs;
  const int input = blockIdx.x % (In / Tile::kInputs) * Tile::kInputs;
  const int count = (p.rows + Tile::kRows - 1) / Tile::kRows;
  const int first = first_of(blockIdx.y, gridDim.y, count);
  const int last = first_of(blockIdx.y + 1, gridDim.y, count);

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warp_output = warp % 4 * kM * 16, warp_input = warp / 4 * kN * 8;
  const int matrix = lane / 8;

  float sums[kM][kN][4] = {};
  WeightStage<C, In, Out> stage;
  if (first < last) {
    stage.fetch(p, first * Tile::kRows, p.rows, output, input);
    stage.store(stages);
  }
  __syncthreads();
  for (int at = first; at < last; ++at) {
    const int buffer = (at - first) % 2;
    if (at + 1 < last) stage.fetch(p, (at + 1) * Tile::kRows, p.rows, output, input);
    __syncwarp();  // lanes without a token to fetch are ahead
    const C* slopes = stages + buffer * Tile::kStage;
    const C* tokens = slopes + Tile::kRows * Tile::kOutputStride;
#pragma unroll
    for (int step = 0; step < Tile::kRows; step += 16) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        load_matrices<true>(a[m], slopes +
                                      (step + 8 * (matrix / 2) + lane % 8) * Tile::kOutputStride +
                                      warp_output + 16 * m + 8 * (matrix % 2));
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t b[4];
        load_matrices<true>(b, tokens + (step + 8 * (matrix % 2) + lane % 8) * Tile::kInputStride +
                                   warp_input + 8 * n + 8 * (matrix / 2));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma<C>(sums[m][n], a[m], b[0], b[1]);
          mma<C>(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
    if (at + 1 < last) stage.store(stages + (1 - buffer) * Tile::kStage);
    __syncthreads();
  }

  const auto add = [&](float* part, float sum) { *part = sum + (p.accumulate ? *part : 0.f); };
  float* weight_part = p.weight_parts + int64_t{blockIdx.y} * Out * In;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = output + warp_output + 16 * m + 8 * (i / 2) + lane / 4;
#pragma unroll
      for (int n = 0; n < kN; ++n)
        add(weight_part + row * In + input + warp_input + 8 * n + 2 * (lane % 4) + i % 2,
            sums[m][n][i]);
    }
}

}  // namespace fastkd
