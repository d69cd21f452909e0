// Runs the kernel of spectrum on the host shim, to be watched by ThreadSanitizer: sizes that reach
// several column tiles, several chunks of them and several vector elements per thread, and a matrix
// of zeros, which leaves early.

#include <cmath>
#include <cstdio>
#include <vector>

#include "spectrum.h"

using namespace fastkd;

namespace {

constexpr int kBatch = 2, kLevels = 2;

// The first matrix has ones everywhere and size + 1 on the diagonal, the second is zero.
bool runs(int size) {
  std::vector<float> gram(kBatch * size * size), energies(kBatch * size, NAN);
  std::vector<int64_t> ranks(kBatch * kLevels, -1);
  for (int i = 0; i < size * size; ++i) gram[i] = i % (size + 1) == 0 ? size + 1.f : 1.f;
  spectrum_solve({gram.data(), energies.data(), ranks.data(), kBatch, size, kLevels, {0.5, 1.0}},
                 nullptr);
  const bool first = std::abs(energies[0] - 2.f * size) < 1e-3f * size && ranks[1] == size;
  const bool second = energies[size] == 0.f && ranks[kLevels] == 0;
  return first && second;
}

}  // namespace

int main() {
  const bool ok = runs(20) && runs(65) && runs(129);
  std::printf("%s\n", ok ? "energies are right" : "an energy or a rank is wrong");
  return ok ? 0 : 1;
}
