// spectrum: eigenvalues of a batch of small Gram matrices, as raw pointers and a stream. Does not
// depend on torch.
#pragma once

#include <cstdint>

#include "common/platform.h"

namespace fastkd {

constexpr int kSpectrumLargest = 257;  // tokens of a ViT at 224 / 14, with its CLS token
constexpr int kSpectrumLevels = 8;     // by value: a list in device memory would cost a copy a call

struct Spectrum {
  const float* gram;  // [batch, size, size], positive semidefinite; the lower triangle is read
  float* energies;    // [batch, size]: eigenvalues, descending
  int64_t* ranks;     // [batch, level_count]
  int64_t batch;
  int size;
  int level_count;
  double levels[kSpectrumLevels];  // shares of the total energy
};

// One launch. ranks: the fewest leading energies that sum to at least levels - 1e-6 of their total.
// A matrix with NaN or infinity, or an energy beyond a float's range, has NaN energies and ranks of
// 0; one of zeros has ranks of 0.
void spectrum_solve(const Spectrum& problem, cudaStream_t stream);

}  // namespace fastkd
