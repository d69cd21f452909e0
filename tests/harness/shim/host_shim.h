// Runs CUDA C++ kernels on the CPU, so that a kernel's source can be tested, and watched by
// ThreadSanitizer, where there is no GPU. A launch goes through the blocks of its grid one after
// another. A block's threads are fibers, which take turns whenever they wait: that is a hundred
// times faster than real threads, which they are under a sanitizer. What neither can show: speed,
// memory coalescing, races between blocks, and anything that needs the GPU's own units.
#pragma once

// CUDA's own headers give __half, __nv_bfloat16, dim3 and the vector types to a host compiler.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block runs at a time, and all its threads share it

using std::max;
using std::min;

namespace host_shim {

#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define FASTKD_HOST_FIBERS
#endif

// What a kernel knows of the thread that runs it.
struct Thread {
  uint3 index, block_index;
  dim3 block_size, grid_size;
  struct Block* block;
  unsigned exchanges = 0;
};

inline thread_local Thread* self = nullptr;

#ifdef FASTKD_HOST_FIBERS

// Saves the registers that a call must keep, and goes on where `to` was saved.
[[gnu::naked, gnu::noinline]] inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

class Fibers {
 public:
  // Calls body(i) for i < count, in turns; returns when all have returned.
  static void run(unsigned count, const std::function<void(unsigned)>& body) {
    Fibers fibers;
    fibers.body_ = &body;
    current() = &fibers;
    while (stacks().size() < count)
      stacks().push_back(std::make_unique_for_overwrite<std::byte[]>(kStack));
    for (unsigned i = 0; i < count; ++i) fibers.saved_.push_back(prepare(stacks()[i].get()));
    fibers.done_.resize(count);
    for (unsigned left = count; left > 0;)
      for (fibers.at_ = 0; fibers.at_ < count; ++fibers.at_) {
        if (fibers.done_[fibers.at_]) continue;
        switch_stack(&fibers.scheduler_, fibers.saved_[fibers.at_]);
        left -= fibers.done_[fibers.at_];
      }
  }

  // Lets the others have their turn.
  static void yield() {
    Thread* thread = self;
    Fibers& fibers = *current();
    switch_stack(&fibers.saved_[fibers.at_], fibers.scheduler_);
    self = thread;
  }

 private:
  static constexpr size_t kStack = 256 << 10;

  static Fibers*& current() {
    static thread_local Fibers* fibers = nullptr;
    return fibers;
  }

  static std::vector<std::unique_ptr<std::byte[]>>& stacks() {
    static thread_local std::vector<std::unique_ptr<std::byte[]>> kept;
    return kept;
  }

  static void enter() {
    Fibers& fibers = *current();
    (*fibers.body_)(fibers.at_);
    fibers.done_[fibers.at_] = 1;
    yield();
  }

  // A stack as `switch_stack` would have saved it just before a call of `enter`.
  static void* prepare(std::byte* stack) {
    const auto top = (reinterpret_cast<uintptr_t>(stack) + kStack) / 16 * 16;
    void** frame = reinterpret_cast<void**>(top) - 8;
    std::fill_n(frame, 8, nullptr);
    frame[6] = reinterpret_cast<void*>(&enter);
    return frame;
  }

  const std::function<void(unsigned)>* body_;
  std::vector<void*> saved_;
  std::vector<char> done_;
  void* scheduler_;
  unsigned at_;
};

class Barrier {
 public:
  explicit Barrier(unsigned threads) : expected_(threads) {}

  void arrive_and_wait() {
    if (++arrived_ == expected_) {
      arrived_ = 0;
      ++passed_;
      return;
    }
    for (const unsigned before = passed_; passed_ == before;) Fibers::yield();
  }

 private:
  unsigned expected_, arrived_ = 0, passed_ = 0;
};

inline void run_together(unsigned count, const std::function<void(unsigned)>& body) {
  Fibers::run(count, body);
}

#else

using Barrier = std::barrier<>;

inline void run_together(unsigned count, const std::function<void(unsigned)>& body) {
  std::vector<std::thread> pool;
  for (unsigned i = 0; i < count; ++i) pool.emplace_back(std::cref(body), i);
  for (std::thread& thread : pool) thread.join();
}

#endif

constexpr unsigned kWarp = 32;
constexpr unsigned kNamedBarriers = 16;
constexpr size_t kExchanged = 32;  // bytes per lane of the largest value exchanged

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  Barrier barrier;
  // Two, so that a lane may hand in its next value while others still read the last ones.
  alignas(16) std::array<std::array<std::byte, kWarp * kExchanged>, 2> values;
};

struct Block {
  Block(unsigned threads, size_t shared_bytes)
      : barrier(threads), shared((shared_bytes + sizeof(uint4) - 1) / sizeof(uint4)) {
    for (unsigned first = 0; first < threads; first += kWarp)
      warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - first)));
  }
  Barrier barrier;
  std::array<std::unique_ptr<Barrier>, kNamedBarriers> named;
  std::mutex naming;
  std::vector<uint4> shared;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline void launch(dim3 grid, dim3 threads, size_t shared_bytes,
                   const std::function<void()>& kernel) {
  Block block(threads.x, shared_bytes);
  std::vector<Thread> all(threads.x);
  run_together(threads.x, [&](unsigned index) {
    Thread& thread = all[index];
    thread = {{index, 0, 0}, {0, 0, 0}, threads, grid, &block};
    self = &thread;
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          thread.block_index = {x, y, z};
          kernel();
          block.barrier.arrive_and_wait();  // the next block reuses the shared memory
        }
  });
}

inline unsigned lane() { return self->index.x % kWarp; }

inline void* dynamic_shared() { return self->block->shared.data(); }

// Hands in this lane's value and returns those of the whole warp, valid until its next exchange.
template <typename T>
const T* exchange(const T& value) {
  static_assert(sizeof(T) <= kExchanged);
  Warp& warp = *self->block->warps[self->index.x / kWarp];
  T* values = reinterpret_cast<T*>(warp.values[self->exchanges++ % 2].data());
  values[lane()] = value;
  warp.barrier.arrive_and_wait();
  return values;
}

inline void sync_some(unsigned barrier, unsigned threads) {
  {
    const std::lock_guard lock(self->block->naming);
    auto& named = self->block->named[barrier];
    if (!named) named = std::make_unique<Barrier>(threads);
  }
  self->block->named[barrier]->arrive_and_wait();
}

}  // namespace host_shim

#define threadIdx (::host_shim::self->index)
#define blockIdx (::host_shim::self->block_index)
#define blockDim (::host_shim::self->block_size)
#define gridDim (::host_shim::self->grid_size)

inline void __syncthreads() { host_shim::self->block->barrier.arrive_and_wait(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  return host_shim::exchange(value)[host_shim::lane() ^ lane_mask];
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return host_shim::exchange(value)[lane];
}

// A lane that nobody is `distance` below keeps its own.
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = host_shim::lane();
  return host_shim::exchange(value)[lane < distance ? lane : lane - distance];
}

inline void __syncwarp() { host_shim::exchange(0); }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << shift % 32 >> 32);
}

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

#define FASTKD_LAUNCH(kernel, grid, block, stream, ...) \
  FASTKD_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)
#define FASTKD_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  ::host_shim::launch((grid), (block), (bytes), [&, run = (kernel)] { run(__VA_ARGS__); })
#define FASTKD_DYNAMIC_SHARED(name) \
  auto* const name = static_cast<unsigned char*>(::host_shim::dynamic_shared())
