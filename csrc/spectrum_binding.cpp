// Binding of spectrum: checks what the kernel relies on, launches, registers. The schema and the
// buffers are fastkd/ops/spectrum/cuda.py's.

#include <algorithm>
#include <limits>
#include <vector>

#include "common/binding.h"
#include "spectrum.h"

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;

template <typename T>
T* data_of(const Tensor& tensor, ScalarType dtype, int64_t count, const Tensor& gram,
           const char* what) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                      tensor.numel() == count &&
                      tensor.get_device_index() == gram.get_device_index(),
                  "spectrum: ", what, " with ", count, " elements, on the device of gram");
  return static_cast<T*>(tensor.data_ptr());
}

void solve(Tensor gram, std::vector<double> levels, Tensor energies, Tensor ranks) {
  const DeviceGuard guard(gram);
  STD_TORCH_CHECK(
      gram.dim() == 3 && gram.size(1) == gram.size(2) && gram.size(1) <= kSpectrumLargest,
      "spectrum: gram must be [B, n, n] with n <= ", kSpectrumLargest);
  STD_TORCH_CHECK(levels.size() <= kSpectrumLevels, "spectrum: up to ", kSpectrumLevels,
                  " levels, got ", levels.size());
  Spectrum problem{};
  problem.batch = gram.size(0);
  problem.size = static_cast<int>(gram.size(1));
  problem.level_count = static_cast<int>(levels.size());
  std::copy(levels.begin(), levels.end(), problem.levels);
  STD_TORCH_CHECK(problem.batch <= std::numeric_limits<int32_t>::max(),
                  "spectrum: a grid has no room for ", problem.batch, " matrices");
  problem.gram = data_of<float>(gram, ScalarType::Float, gram.numel(), gram,
                                "gram must be contiguous float32");
  problem.energies = data_of<float>(energies, ScalarType::Float, problem.batch * problem.size, gram,
                                    "energies must be contiguous float32");
  problem.ranks = data_of<int64_t>(ranks, ScalarType::Long, problem.batch * problem.level_count,
                                   gram, "ranks must be contiguous int64");
  spectrum_solve(problem, current_stream(gram));
  check_launch("spectrum");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, FASTKD_DISPATCH_KEY, library) {
  library.impl("_spectrum_solve", TORCH_BOX(&solve));
}

}  // namespace fastkd
