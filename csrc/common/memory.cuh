// Typed global memory: element types, conversion to and from the fp32 that all kernels compute in,
// and packs of V neighboring elements that move in 16-byte transactions.
#pragma once

#include <cstdint>

#include "platform.h"

namespace fastkd {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

__host__ __device__ __forceinline__ float to_float(float x) { return x; }
__host__ __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__host__ __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__host__ __device__ __forceinline__ T from_float(float x);
template <>
__host__ __device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__host__ __device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__host__ __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// The alignment is what makes the compiler use one 16-byte access (two for eight floats).
template <typename T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack {
  T values[V];
};

template <typename T, int V>
__device__ __forceinline__ void load_pack(const T* source, float (&out)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(source);
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = to_float(pack.values[v]);
}

template <typename T, int V>
__device__ __forceinline__ void store_pack(T* target, const float (&in)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.values[v] = from_float<T>(in[v]);
  *reinterpret_cast<Pack<T, V>*>(target) = pack;
}

// Calls body(T{}) with the element type that a runtime Dtype stands for.
template <typename Body>
void with_type(Dtype dtype, Body&& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(float{});
    case Dtype::kFloat16:
      return body(__half{});
    case Dtype::kBFloat16:
      return body(__nv_bfloat16{});
  }
}

}  // namespace fastkd
