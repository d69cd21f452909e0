// What every binding file needs: torch's stable ABI, argument checks, the current stream, and the
// dispatch key. A library built on this loads on any torch >= 2.11, with or without CUDA.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "memory.cuh"

#ifdef FASTKD_HOST_SHIM
#define FASTKD_DISPATCH_KEY CPU
#else
#define FASTKD_DISPATCH_KEY CUDA
#endif

namespace fastkd {

using torch::stable::Tensor;

#ifdef FASTKD_HOST_SHIM
struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
#else
struct DeviceGuard {
  explicit DeviceGuard(const Tensor& tensor) : guard(tensor.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};
// The one function that lives in libtorch_cuda is looked up at the first call: linking it would
// keep the library from loading next to a CPU build of torch.
inline cudaStream_t current_stream(const Tensor& tensor) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    STD_TORCH_CHECK(torch_cuda != nullptr, "fastkd: libtorch_cuda.so is not loaded");
    return reinterpret_cast<GetStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get_stream != nullptr, "fastkd: this torch has no stable access to CUDA streams");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(tensor.get_device_index(), &stream) == 0,
                  "fastkd: torch did not hand out its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}
#endif

inline Dtype dtype_of(const Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Dtype::kFloat32;
    case torch::headeronly::ScalarType::Half:
      return Dtype::kFloat16;
    case torch::headeronly::ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, what, " must be float32, float16 or bfloat16");
  }
}

// Kernel launches report a bad configuration only through this; it does not synchronize.
inline void check_launch(const char* operation) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, operation, ": ", cudaGetErrorString(error));
}

}  // namespace fastkd
