// Where a kernel source is compiled: by nvcc for a GPU, or by a C++ compiler against the host shim
// (tests/harness/shim), which runs the same source on threads of the CPU. Kernels include this file
// instead of cuda_runtime.h and start themselves with FASTKD_LAUNCH; nothing else differs.
#pragma once

#ifdef FASTKD_HOST_SHIM
#include "host_shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FASTKD_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#endif
