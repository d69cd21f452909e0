// spectrum: all eigenvalues of many small positive semidefinite matrices, and for each level q the
// fewest leading ones that sum to q of the total.
//
// One block per matrix and one launch per batch: scaled by a power of two, reduced to tridiagonal
// form in registers (spectrum_tridiagonal.cuh), searched by bisection with a thread per eigenvalue
// (spectrum_bisection.cuh), cumulated. Between reading the matrix and writing the results nothing
// leaves the multiprocessor.
//
// Cut and budget on sm_90a, nothing spilled anywhere:
//     n <=   threads   elements of the matrix, registers a thread   shared memory   blocks per SM
//       64       128                          20,  64                      4.7 KB           8
//      128       128                          72, 128                      8.2 KB           4
//      200       128                         169, 255                     12.7 KB           2
//      257       256                         153, 255                     20.7 KB           1
// Few threads with many elements each, because shared memory is the limit: a step's three vectors
// are read along all rows and columns of every thread, a word per 3.5 multiply-adds at n = 196, and
// the more elements share them the better. The last class would not fit into 128 threads.
// Moves: the lower triangle once, n energies and the ranks. Work: 4/3 n^3 flops in n - 1 steps of
// two barriers, and 22 to 24 recurrences of 7 n instructions per eigenvalue: about 1 ms for 1,000
// matrices of 196 on an H100 (an estimate from the count of instructions: no GPU has run this).

#include "spectrum.h"
#include "spectrum_bisection.cuh"
#include "spectrum_tridiagonal.cuh"

namespace fastkd {
namespace {

constexpr unsigned kInfinity = 0x7f800000u, kNaN = 0x7fc00000u;

// Blocks per multiprocessor are what registers leave room for.
using Small = SpectrumShape<8, 8, 8>;
using Medium = SpectrumShape<8, 16, 4>;
using Large = SpectrumShape<8, 25, 2>;
using Largest = SpectrumShape<16, 17, 1>;
static_assert(Largest::kSize >= kSpectrumLargest);

template <typename Shape>
__device__ __forceinline__ unsigned block_max(unsigned value) {
  __shared__ unsigned maxima[Shape::kWarps];
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value = max(value, __shfl_xor_sync(kFullWarp, value, offset));
  if (threadIdx.x % kWarpSize == 0) maxima[threadIdx.x / kWarpSize] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < Shape::kWarps; ++warp) value = max(value, maxima[warp]);
  return value;
}

// For a matrix without energy, or without energies that a float can hold.
__device__ __forceinline__ void store_constant(const Spectrum& p, float energy, float* energies,
                                               int64_t* ranks) {
  for (int i = threadIdx.x; i < p.size; i += blockDim.x) energies[i] = energy;
  for (int i = threadIdx.x; i < p.level_count; i += blockDim.x) ranks[i] = 0;
}

// One block per matrix.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    solve(const __grid_constant__ Spectrum p) {
  __shared__ TridiagonalWorkspace<Shape> reduction;
  __shared__ BisectionWorkspace<Shape> search;
  const int64_t index = blockIdx.x;
  float* const energies = p.energies + index * p.size;
  int64_t* const ranks = p.ranks + index * p.level_count;

  TriangleTiles<Shape> triangle;
  const unsigned largest =
      block_max<Shape>(triangle.load(p.gram + index * p.size * p.size, p.size));
  if (largest == 0 || largest >= kInfinity) {
    store_constant(p, largest == 0 ? 0.f : __uint_as_float(kNaN), energies, ranks);
    return;
  }

  // The largest element goes to between 1 and 2, by a factor that is normal, as its inverse is.
  const int exponent = min(max(static_cast<int>(largest >> 23), 1), 2 * kOne - 1);
  triangle.scale(power_of_two(2 * kOne - exponent));
  Tridiagonalizer<Shape>(triangle, p.size, reduction).run();

  Bisection<Shape> bisection(reduction.result, p.size, search);
  bisection.run();
  const float unit = bisection.unit(), scale = power_of_two(exponent);
  if (__float_as_uint(search.energies[0] * unit * scale) >= kInfinity) {
    store_constant(p, __uint_as_float(kNaN), energies, ranks);
    return;
  }
  for (int i = threadIdx.x; i < p.size; i += Shape::kThreads)
    energies[i] = search.energies[i] * unit * scale;
  if (threadIdx.x < kWarpSize) bisection.store_ranks(p, ranks);
}

template <typename Shape>
void launch(const Spectrum& problem, cudaStream_t stream) {
  FASTKD_LAUNCH(solve<Shape>, static_cast<unsigned>(problem.batch), Shape::kThreads, stream,
                problem);
}

}  // namespace

void spectrum_solve(const Spectrum& problem, cudaStream_t stream) {
  if (problem.batch == 0 || problem.size == 0) return;
  if (problem.size <= Small::kSize)
    launch<Small>(problem, stream);
  else if (problem.size <= Medium::kSize)
    launch<Medium>(problem, stream);
  else if (problem.size <= Large::kSize)
    launch<Large>(problem, stream);
  else
    launch<Largest>(problem, stream);
}

}  // namespace fastkd
