// Warp-level tensor-core instructions, sm_80 and later: m16n8k16 products, loads of 8 x 8 matrices
// from shared memory, and pairs of half-precision numbers in the registers that they take.
//
// Registers of lane 4 g + q, of 16 x 16 A (row-major), 16 x 8 B and 16 x 8 D:
//   a[0] A[g, 2q..]  a[1] A[g + 8, 2q..]  a[2] A[g, 2q + 8..]  a[3] A[g + 8, 2q + 8..]
//   b[0] B[2q.., g]  b[1] B[2q + 8.., g]
//   d[0..1] D[g, 2q..]  d[2..3] D[g + 8, 2q..]
// An A operand so has the layout of two neighboring D tiles: results can be factors at once.
#pragma once

#include <cstring>
#include <type_traits>

#include "memory.cuh"

namespace fastkd {

template <typename To, typename From>
__host__ __device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

template <typename C>
__host__ __device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  if constexpr (std::is_same_v<C, __half>)
    return bit_cast<uint32_t>(__floats2half2_rn(first, second));
  else
    return bit_cast<uint32_t>(__floats2bfloat162_rn(first, second));
}

template <typename C>
__host__ __device__ __forceinline__ float2 unpack_pair(uint32_t pair) {
  if constexpr (std::is_same_v<C, __half>)
    return __half22float2(bit_cast<__half2>(pair));
  else
    return __bfloat1622float2(bit_cast<__nv_bfloat162>(pair));
}

#ifndef FASTKD_HOST_SHIM

template <typename C>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<C, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices: lane l hands in the address of row l % 8 of matrix l / 8 (16 bytes, aligned)
// and gets M[g, 2q..] of each; transposed: M[2q.., g].
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// Waits until `threads` threads of the block, whole warps, have come to barrier 1 .. 15.
__device__ __forceinline__ void sync_some(int barrier, int threads) {
  __syncwarp();
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

#else

template <typename C>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto lanes = host_shim::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned g = host_shim::lane() / 4, q = host_shim::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned column = 2 * q + i % 2;
    for (unsigned pair = 0; pair < 8; ++pair) {
      const float2 x = unpack_pair<C>(lanes[4 * g + pair % 4].a[i / 2 + 2 * (pair / 4)]);
      const float2 y = unpack_pair<C>(lanes[4 * column + pair % 4].b[pair / 4]);
      d[i] += x.x * y.x + x.y * y.y;
    }
  }
}

template <bool kTransposed>
void load_matrices(uint32_t (&out)[4], const void* row) {
  const auto rows = host_shim::exchange(static_cast<const uint16_t*>(row));
  const unsigned g = host_shim::lane() / 4, q = host_shim::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const uint32_t low = kTransposed ? rows[8 * i + 2 * q][g] : rows[8 * i + g][2 * q];
    const uint32_t high = kTransposed ? rows[8 * i + 2 * q + 1][g] : rows[8 * i + g][2 * q + 1];
    out[i] = low | high << 16;
  }
}

inline void sync_some(int barrier, int threads) { host_shim::sync_some(barrier, threads); }

#endif

}  // namespace fastkd
