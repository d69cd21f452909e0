// Runs CUDA C++ kernels on threads of the CPU, so that a kernel's source can be tested, and watched
// by ThreadSanitizer, where there is no GPU. A launch starts blockDim threads; they go through the
// blocks of the grid one after another, with real barriers and warp shuffles. What it cannot show:
// speed, memory coalescing, races between blocks, and anything that needs the GPU's own units.
#pragma once

// CUDA's own headers give __half, __nv_bfloat16, dim3 and the vector types to a host compiler.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time, and all its threads share it

using std::max;
using std::min;

namespace host_shim {

constexpr unsigned kWarp = 32;

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes), values(lanes) {}
  std::barrier<> barrier;
  std::vector<uint64_t> values;
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    for (unsigned first = 0; first < threads; first += kWarp)
      warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - first)));
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local uint3 thread_index, block_index;
inline thread_local dim3 block_size, grid_size;
inline thread_local Block* block = nullptr;

inline void run_thread(Block& shared, dim3 grid, dim3 threads, unsigned index,
                       const std::function<void()>& kernel) {
  block = &shared;
  block_size = threads;
  grid_size = grid;
  thread_index = {index, 0, 0};
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        kernel();
        shared.barrier.arrive_and_wait();  // the next block reuses the shared memory
      }
}

inline void launch(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
  Block shared(threads.x);
  std::vector<std::thread> pool;
  for (unsigned index = 0; index < threads.x; ++index)
    pool.emplace_back(run_thread, std::ref(shared), grid, threads, index, std::cref(kernel));
  for (std::thread& thread : pool) thread.join();
}

inline Warp& warp() { return *block->warps[thread_index.x / kWarp]; }

}  // namespace host_shim

#define threadIdx (::host_shim::thread_index)
#define blockIdx (::host_shim::block_index)
#define blockDim (::host_shim::block_size)
#define gridDim (::host_shim::grid_size)

inline void __syncthreads() { host_shim::block->barrier.arrive_and_wait(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  host_shim::Warp& warp = host_shim::warp();
  const unsigned lane = threadIdx.x % host_shim::kWarp;
  std::memcpy(&warp.values[lane], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  T other;
  std::memcpy(&other, &warp.values[lane ^ lane_mask], sizeof(T));
  warp.barrier.arrive_and_wait();
  return other;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

#define FASTKD_LAUNCH(kernel, grid, block, stream, ...) \
  ::host_shim::launch((grid), (block), [&, run = (kernel)] { run(__VA_ARGS__); })
