// Where a kernel source is compiled: by nvcc for a GPU, or by a C++ compiler against the host shim
// (tests/harness/shim), which runs the same source on threads of the CPU. Kernels include this file
// instead of cuda_runtime.h, start themselves with FASTKD_LAUNCH or FASTKD_LAUNCH_SHARED, and name
// their dynamic shared memory with FASTKD_DYNAMIC_SHARED; nothing else differs.
#pragma once

#ifdef FASTKD_HOST_SHIM
#include "host_shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FASTKD_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)

// More than 48 KB of shared memory must be asked for; that it was refused shows at the launch.
#define FASTKD_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...)                     \
  do {                                                                                    \
    cudaFuncSetAttribute((kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, (bytes)); \
    kernel<<<(grid), (block), (bytes), (stream)>>>(__VA_ARGS__);                          \
  } while (false)

#define FASTKD_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif
