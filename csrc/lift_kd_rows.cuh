// lift_kd's view of a token map: rows of channels, cut into tiles of slots and octets of channels.
#pragma once

#include <type_traits>

#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "lift_kd.h"

namespace fastkd {

constexpr int kLiftWarps = 2 * kLiftWorkers;
constexpr int kLiftThreads = kLiftWarps * kWarpSize;
constexpr int kOctet = 8;    // neighboring channels that one thread holds of a row
constexpr int kGroup = 32;   // channels of the four threads that share a row of an mma tile
constexpr int kPadding = 8;  // elements after each row in shared memory, against bank conflicts

// Where a channel is put in shared memory: permuted within its group, such that what a thread finds
// in four neighboring mma tiles is an octet.
__device__ inline int packed_place(int channel) {
  const int in_group = channel % kGroup;
  const int place = 8 * (in_group % kOctet / 2) + 2 * (in_group / kOctet) + in_group % 2;
  return channel / kGroup * kGroup + place;
}

// Tokens as tiles take them: grid rows of `pitch` slots, of which the last ones may be empty.
struct Slots {
  int images, height, width, pitch;

  __host__ __device__ int per_image() const { return height * pitch; }
  __host__ __device__ int count() const { return images * per_image(); }
};

struct Slot {
  int image, row, column;
  bool filled;
};

__device__ __forceinline__ Slot slot_at(const Slots& slots, int index) {
  const unsigned line = static_cast<unsigned>(index) / static_cast<unsigned>(slots.pitch);
  Slot slot;
  slot.column = index - static_cast<int>(line) * slots.pitch;
  slot.image = static_cast<int>(line / static_cast<unsigned>(slots.height));
  slot.row = static_cast<int>(line) - slot.image * slots.height;
  slot.filled = slot.column < slots.width && slot.image < slots.images;
  return slot;
}

// A map whose octets are 16-byte aligned neighbors, or not.
struct OctetMap : TokenMap {
  bool packed;
};

inline OctetMap octet_map(const TokenMap& map) {
  const bool packed = map.channel_stride == 1 && map.batch_stride % kOctet == 0 &&
                      map.row_stride % kOctet == 0 && map.column_stride % kOctet == 0 &&
                      reinterpret_cast<uintptr_t>(map.data) % 16 == 0;
  return {map, packed};
}

__device__ __forceinline__ int64_t offset_of(const TokenMap& map, const Slot& slot, int channel) {
  return slot.image * map.batch_stride + slot.row * map.row_stride +
         slot.column * map.column_stride + channel * map.channel_stride;
}

// Calls body with a typed pointer to an element; all threads take the same branch.
template <typename Body>
__device__ __forceinline__ void typed(const TokenMap& map, int64_t offset, Body&& body) {
  if (map.dtype == Dtype::kFloat32)
    body(static_cast<float*>(map.data) + offset);
  else if (map.dtype == Dtype::kFloat16)
    body(static_cast<__half*>(map.data) + offset);
  else
    body(static_cast<__nv_bfloat16*>(map.data) + offset);
}

template <typename T>
__device__ __forceinline__ void read_octet(const T* source, const OctetMap& map,
                                           float (&out)[kOctet]) {
  if (map.packed) {
    load_pack(source, out);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) out[i] = to_float(source[i * map.channel_stride]);
  }
}

template <typename T>
__device__ __forceinline__ void write_octet(T* target, const OctetMap& map,
                                            const float (&in)[kOctet]) {
  if (map.packed) {
    store_pack(target, in);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) target[i * map.channel_stride] = from_float<T>(in[i]);
  }
}

// An octet of tokens in the dtype of the products; what is of that dtype is only moved.
template <typename C, typename T>
__device__ __forceinline__ uint4 operand_octet(const T* source, int64_t stride = 1) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T low = source[2 * i * stride], high = source[(2 * i + 1) * stride];
    if constexpr (std::is_same_v<C, T>)
      pairs[i] = bit_cast<uint16_t>(low) | uint32_t{bit_cast<uint16_t>(high)} << 16;
    else
      pairs[i] = pack_pair<C>(to_float(low), to_float(high));
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

template <typename C, typename T>
__device__ __forceinline__ uint4 read_operand(const T* source, const OctetMap& map) {
  if (!map.packed) return operand_octet<C>(source, map.channel_stride);
  const Pack<T, kOctet> octet = *reinterpret_cast<const Pack<T, kOctet>*>(source);
  return operand_octet<C>(octet.values);
}

// Work is dealt out in runs: `worker`'s begins here.
__host__ __device__ __forceinline__ int first_of(int worker, int workers, int count) {
  return static_cast<int>(int64_t{count} * worker / workers);
}

// The worker in whose run `index` is.
__host__ __device__ __forceinline__ int worker_of(int index, int workers, int count) {
  return static_cast<int>((int64_t{index + 1} * workers - 1) / count);
}

}  // namespace fastkd
