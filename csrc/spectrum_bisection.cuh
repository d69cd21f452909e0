// Eigenvalues of a tridiagonal matrix by bisection, and the ranks that follow from them.
//
// All threads descend one binary tree over [0, 1], in units of the trace: at a node x, an
// eigenvalue that `below` others are less than lies to the right if at most `below` eigenvalues are
// less than x. Those are counted as sign changes of a recurrence without divisions. As every thread
// asks the same question at the same node, the leaves are in the order of the eigenvalues, whatever
// the rounding: nothing needs sorting. The upper levels of the tree are looked up in a table that
// the block fills once, a count per node.
#pragma once

#include "spectrum.h"
#include "spectrum_tridiagonal.cuh"

namespace fastkd {

constexpr int kTableSize = 256;       // nodes: levels 1 to 8 of the tree
constexpr int kHalvings = 21;         // levels below: leaves of 2^-29, finer than the reflections
constexpr int kRun = 8;               // rows per round of the recurrence
constexpr int kRescale = 4;           // rows between rescalings
constexpr int kMostPerLane = 9;       // eigenvalues per lane of the warp that cumulates them
constexpr double kLevelSlack = 1e-6;  // of the total: equal energies may miss their share by a hair
static_assert(kMostPerLane * kWarpSize >= kSpectrumLargest);

// Squared couplings below this are raised to it, which moves no eigenvalue by more than 2^-29 of
// the trace. However close x is to an eigenvalue, the recurrence then shrinks by no more than 2^-60
// every two rows, and 2^-60 once: it is rescaled to kTop to stay within float. From 1 it would not:
// on a diagonal of small integers both of its values would reach zero, and all that follow.
constexpr float kLeastCoupling = 0x1p-60f, kTop = 0x1p100f;
constexpr int kOne = 127, kTopExponent = kOne + 100, kLargestExponent = 254;  // biased

__device__ __forceinline__ float power_of_two(int biased_exponent) {
  return __uint_as_float(static_cast<unsigned>(biased_exponent) << 23);
}

// Of the least power of two above a normal x, or x itself.
__device__ __forceinline__ int exponent_above(float x) {
  return static_cast<int>((__float_as_uint(x) + 0x7fffffu) >> 23);
}

// Signs of the leading principal minors of T - x: they change as often as T has eigenvalues less
// than x. A minor of exactly 0 has neighbors of opposite signs, so its own does not matter.
struct SturmSequence {
  float x, last = 0.f, minor = kTop;
  unsigned signs = 0;
  int changes = 0;

  // Which product is fused is not left to the compiler: all instances are to count alike.
  __device__ __forceinline__ void extend(const TridiagonalRow& row) {
    const float next = fmaf(row.diagonal - x, minor, -row.coupling * last);
    last = minor;
    minor = next;
    signs = __funnelshift_l(__float_as_uint(next), signs, 1);
  }

  // The larger value goes to kTop, or as near as one factor takes it.
  __device__ __forceinline__ void rescale() {
    const unsigned larger = __float_as_uint(fmaxf(fabsf(last), fabsf(minor)));
    const int exponent = kTopExponent + kOne - static_cast<int>(larger >> 23);
    const float factor = power_of_two(min(exponent, kLargestExponent));
    last *= factor;
    minor *= factor;
  }

  __device__ __forceinline__ void count_run() {
    changes += __popc((signs ^ signs >> 1) & ((1 << kRun) - 1));
  }
};

template <typename Shape>
struct BisectionWorkspace {
  static constexpr int kRows = (Shape::kPadded + kRun - 1) / kRun * kRun;
  alignas(16) TridiagonalRow rows[kRows];
  int table[kTableSize];
  float energies[Shape::kPadded];
};

template <typename Shape>
class Bisection {
 public:
  using Workspace = BisectionWorkspace<Shape>;

  // rows: the tridiagonal matrix.
  __device__ __forceinline__ Bisection(const TridiagonalRow* rows, int size, Workspace& workspace)
      : size(size), rounds((size + kRun - 1) / kRun), shared(workspace) {
    exponent = exponent_above(trace_of(rows));
    const float factor = power_of_two(2 * kOne - exponent);
    for (int i = threadIdx.x; i < rounds * kRun; i += Shape::kThreads) {
      // What fills up the last round adds eigenvalues of 2, above every x.
      TridiagonalRow row{2.f, kLeastCoupling};
      if (i < size)
        row = {rows[i].diagonal * factor,
               fmaxf(rows[i].coupling * factor * factor, kLeastCoupling)};
      shared.rows[i] = row;
    }
    __syncthreads();
  }

  // Leaves shared.energies, in units, descending, for all threads to read.
  __device__ __forceinline__ void run() {
    fill_table();
    __syncthreads();
    resolve_own();
    __syncthreads();
  }

  // Called by one whole warp.
  __device__ __forceinline__ void store_ranks(const Spectrum& problem, int64_t* ranks) const {
    const int lane = threadIdx.x % kWarpSize;
    const int share = (size + kWarpSize - 1) / kWarpSize;
    double sums[kMostPerLane], sum = 0.0;
#pragma unroll
    for (int i = 0; i < kMostPerLane; ++i) {
      const int at = lane * share + i;
      if (i < share && at < size) sum += shared.energies[at];
      sums[i] = sum;
    }
    const double before = sum_before(sum),
                 total = __shfl_sync(kFullWarp, before + sum, kWarpSize - 1);
    for (int level = 0; level < problem.level_count; ++level) {
      const double wanted = (problem.levels[level] - kLevelSlack) * total;
      int short_of = 0;
#pragma unroll
      for (int i = 0; i < kMostPerLane; ++i)
        short_of += i < share && lane * share + i < size && before + sums[i] < wanted;
      const int rank = static_cast<int>(warp_sum(static_cast<float>(short_of))) + 1;
      if (lane == 0) ranks[level] = total > 0.0 ? min(rank, size) : 0;
    }
  }

  // What energies are counted in: the trace, rounded up to a power of two.
  __device__ __forceinline__ float unit() const { return power_of_two(exponent); }

 private:
  // Every warp sums on its own, in the same order. A positive semidefinite matrix has its largest
  // element, which is at least 1, on the diagonal; the bound is for what is none.
  __device__ __forceinline__ float trace_of(const TridiagonalRow* rows) const {
    float sum = 0.f;
    for (int i = threadIdx.x % kWarpSize; i < size; i += kWarpSize) sum += rows[i].diagonal;
    return fmaxf(warp_sum(sum), 1.f);
  }

  __device__ __forceinline__ void fill_table() const {
    constexpr int kCount = kTableSize / Shape::kThreads;
    SturmSequence nodes[kCount];
#pragma unroll
    for (int m = 0; m < kCount; ++m)
      nodes[m].x = static_cast<float>(threadIdx.x + m * Shape::kThreads + 1) / kTableSize;
    run_through(nodes);
#pragma unroll
    for (int m = 0; m < kCount; ++m)
      shared.table[threadIdx.x + m * Shape::kThreads] = nodes[m].changes;
  }

  // Several sequences at once do not wait for each other.
  template <int kCount>
  __device__ __forceinline__ void run_through(SturmSequence (&sequences)[kCount]) const {
    for (int round = 0; round < rounds; ++round) {
      const TridiagonalRow* rows = shared.rows + round * kRun;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
#pragma unroll
        for (SturmSequence& sequence : sequences) {
          sequence.extend(rows[i]);
          if (i % kRescale == kRescale - 1) sequence.rescale();
        }
      }
#pragma unroll
      for (SturmSequence& sequence : sequences) sequence.count_run();
    }
  }

  // A warp does no work for energies that none of its threads has.
  __device__ __forceinline__ void resolve_own() const {
    const int first_of_warp = threadIdx.x / kWarpSize * kWarpSize;
    if (first_of_warp >= size) return;
    if (Shape::kOwned == 1 || first_of_warp + Shape::kThreads >= size)
      resolve<1>();
    else
      resolve<Shape::kOwned>();
  }

  // Energies threadIdx.x + kThreads * m, m < kCount.
  template <int kCount>
  __device__ __forceinline__ void resolve() const {
    int below[kCount];
    float left[kCount], half = 0.5f / kTableSize;
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      below[m] = size - 1 - static_cast<int>(threadIdx.x + m * Shape::kThreads);
      left[m] = look_up(below[m]);
    }
    for (int i = 0; i < kHalvings; ++i, half *= 0.5f) {
      SturmSequence nodes[kCount];
#pragma unroll
      for (int m = 0; m < kCount; ++m) nodes[m].x = left[m] + half;
      run_through(nodes);
#pragma unroll
      for (int m = 0; m < kCount; ++m)
        if (nodes[m].changes <= below[m]) left[m] = nodes[m].x;
    }
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      // The first leaf has 0, and what rounding made of it.
      const float energy = left[m] > 0.f ? left[m] + half : 0.f;
      if (below[m] >= 0) shared.energies[threadIdx.x + m * Shape::kThreads] = energy;
    }
  }

  // The left end of the table's interval.
  __device__ __forceinline__ float look_up(int below) const {
    int entry = 0;
#pragma unroll
    for (int step = kTableSize / 2; step > 0; step /= 2)
      if (shared.table[entry + step - 1] <= below) entry += step;
    return static_cast<float>(entry) / kTableSize;
  }

  static __device__ __forceinline__ double sum_before(double value) {
    const int lane = threadIdx.x % kWarpSize;
    double sum = value;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const double given = __shfl_up_sync(kFullWarp, sum, distance);
      if (lane >= distance) sum += given;
    }
    return sum - value;
  }

  const int size, rounds;
  int exponent;
  Workspace& shared;
};

}  // namespace fastkd
