// Householder tridiagonalisation of a symmetric matrix A that one block keeps in registers.
//
// Thread (r, c) of R x 16 holds the elements (r + R i, c + 16 j) of the lower triangle, and the
// 16 x 16 blocks on the diagonal whole. Step p eliminates column x = A e_(p - 1) below row p by
// I - tau u u', which changes the rest of A by -u w' - w u', w = tau (A u - tau/2 (u' A u) u).
//
// That change waits for the sweep of the next step, which applies it to an element and at once
// multiplies the element by the next x: one pass over registers a step. The next x is made of the
// one column it needs, which the sweep leaves in shared memory before the change. And u is x but in
// row p, so the sweep need not know |x|: A u follows from A x and A e_p, u' A u from those and
// x' A x. So all that spans the block is summed behind the same barrier, and a step has two.
#pragma once

#include <bit>

#include "common/reduce.cuh"

namespace fastkd {

constexpr int kTileColumns = 16;  // half a warp shares a row: its sums need no shared memory
constexpr int kHalfWarps = 2;

// A column whose squared norm is less, where A's largest element is 1 or more, counts as
// eliminated: its reciprocal might overflow, and 2^-50 is far below rounding.
constexpr float kZeroColumn = 0x1p-100f;

// How a matrix of up to `kSize` rows is cut.
template <int R, int RowTiles, int BlocksPerSm>
struct SpectrumShape {
  static constexpr int kTileRows = R, kRowTiles = RowTiles, kBlocksPerSm = BlocksPerSm;
  static constexpr int kTilesPerDiagonal = kTileColumns / R;  // row tiles beside a diagonal block
  static constexpr int kColumnTiles = (RowTiles + kTilesPerDiagonal - 1) / kTilesPerDiagonal;
  static constexpr int kThreads = R * kTileColumns, kWarps = kThreads / kWarpSize;
  static constexpr int kSize = R * RowTiles, kPadded = kTileColumns * kColumnTiles;
  static constexpr int kOwned = (kPadded + kThreads - 1) / kThreads;  // vector elements per thread
};

// A row's part of the change that is still to be applied.
struct Change {
  float u, w;
};

// The tridiagonal matrix: row i's diagonal element, and the square of what couples it to row i - 1.
struct TridiagonalRow {
  float diagonal, coupling;
};

template <typename Shape>
struct TridiagonalWorkspace {
  Change change[Shape::kPadded];
  float x[Shape::kPadded];             // what the sweep multiplies by: 0 down to the pivot
  float pivot_column[Shape::kPadded];  // A e_p without the last change
  // A x: sums along rows of the lower triangle, and per warp those along its columns.
  float row_sums[Shape::kPadded];
  float column_sums[Shape::kWarps][Shape::kPadded];
  float tails[Shape::kWarps];       // parts of x' x, the pivot's element left out
  float quadratics[Shape::kWarps];  // parts of x' A x
  TridiagonalRow result[Shape::kPadded];

  __device__ __forceinline__ float product(int row) const {
    float sum = row_sums[row];
#pragma unroll
    for (int warp = 0; warp < Shape::kWarps; ++warp) sum += column_sums[warp][row];
    return sum;
  }
};

template <int kCount>
__device__ __forceinline__ float sum_of(const float (&parts)[kCount]) {
  float sum = parts[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) sum += parts[i];
  return sum;
}

// Sums `kCount` values each over half a warp; every lane gets one of the sums, `index`. Each round
// halves the values a lane still sums, which takes kCount shuffles in all instead of 4 kCount.
template <int kCount>
struct HalfWarpSums {
  static constexpr int kPadded = std::bit_ceil(static_cast<unsigned>(kCount));
  static constexpr int kCopies = kTileColumns / kPadded;  // neighboring lanes with the same sum
  static_assert(kPadded <= kTileColumns);
  float sum;
  int index;
  bool first;  // of the copies

  __device__ __forceinline__ explicit HalfWarpSums(float (&values)[kCount]) {
    const int lane = threadIdx.x % kTileColumns;
    index = lane / kCopies;
    first = lane % kCopies == 0;
#pragma unroll
    for (int half = kPadded / 2; half > 0; half /= 2) {
      const int distance = half * kCopies;
      const bool upper = lane & distance;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        if (i >= kCount) break;
        const float high = i + half < kCount ? values[i + half] : 0.f;
        const float given = __shfl_xor_sync(kFullWarp, upper ? values[i] : high, distance);
        values[i] = (upper ? high : values[i]) + given;
      }
    }
    sum = values[0];
#pragma unroll
    for (int distance = kCopies / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(kFullWarp, sum, distance);
  }
};

// This thread's elements of the lower triangle.
template <typename Shape>
struct TriangleTiles {
  using Workspace = TridiagonalWorkspace<Shape>;
  static constexpr int kChunk = 6;  // columns in registers at once: each chunk reads all rows again

  float tiles[Shape::kRowTiles][Shape::kColumnTiles];  // those left of diagonal_tile(i) and it
  int row, column, lane, warp;

  static __host__ __device__ constexpr int diagonal_tile(int row_tile) {
    return row_tile / Shape::kTilesPerDiagonal;
  }

  // Returns the bits of this thread's largest magnitude; those of infinity and NaN are larger
  // still.
  __device__ __forceinline__ unsigned load(const float* matrix, int size) {
    row = threadIdx.x / kTileColumns;
    column = threadIdx.x % kTileColumns;
    lane = threadIdx.x % kWarpSize;
    warp = threadIdx.x / kWarpSize;
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j <= diagonal_tile(i); ++j) {
        const int at_row = row + i * Shape::kTileRows, at_column = column + j * kTileColumns;
        const int lower = max(at_row, at_column), left = min(at_row, at_column);
        tiles[i][j] = lower < size ? matrix[lower * size + left] : 0.f;
        largest = max(largest, __float_as_uint(fabsf(tiles[i][j])));
      }
    }
    return largest;
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j <= diagonal_tile(i); ++j) tiles[i][j] *= factor;
    }
  }

  template <int kTile>
  __device__ __forceinline__ void store_column(int pivot, Workspace& shared) const {
    if (column != pivot % kTileColumns) return;
#pragma unroll
    for (int i = kTile * Shape::kTilesPerDiagonal; i < Shape::kRowTiles; ++i)
      shared.pivot_column[row + i * Shape::kTileRows] = tiles[i][kTile];
  }

  // Applies the pending change to all from column tile kFirst on, which holds the pivot, and
  // multiplies by x; leaves the parts of A x and x' A x, and the pivot's column.
  template <int kFirst>
  __device__ __forceinline__ void sweep(int pivot, Workspace& shared) {
    constexpr int kFirstRow = kFirst * Shape::kTilesPerDiagonal;
    float row_sums[Shape::kRowTiles - kFirstRow] = {};
    float quadratic = sweep_columns<kFirst, kFirstRow>(row_sums, shared);
    quadratic = warp_sum(quadratic + store_row_sums<kFirstRow>(row_sums, shared));
    if (lane == 0) shared.quadratics[warp] = quadratic;
    store_column<kFirst>(pivot, shared);
  }

  // The column tiles from `kLeft` on, a chunk at a time; returns their part of x' A x.
  template <int kLeft, int kFirstRow, int kRows>
  __device__ __forceinline__ float sweep_columns(float (&row_sums)[kRows], Workspace& shared) {
    constexpr int kRest = Shape::kColumnTiles - kLeft, kCount = kRest < kChunk ? kRest : kChunk;
    Change changes[kCount];
    float xs[kCount], sums[kCount] = {};
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      changes[j] = shared.change[column + (kLeft + j) * kTileColumns];
      xs[j] = shared.x[column + (kLeft + j) * kTileColumns];
    }
#pragma unroll
    for (int i = kLeft * Shape::kTilesPerDiagonal; i < Shape::kRowTiles; ++i) {
      const Change change = shared.change[row + i * Shape::kTileRows];
      const float x = shared.x[row + i * Shape::kTileRows];
#pragma unroll
      for (int j = 0; j < kCount && kLeft + j <= diagonal_tile(i); ++j) {
        float& element = tiles[i][kLeft + j];
        element -= change.u * changes[j].w;
        element -= change.w * changes[j].u;
        row_sums[i - kFirstRow] += element * xs[j];
        if (kLeft + j < diagonal_tile(i)) sums[j] += element * x;  // its mirror image
      }
    }
    float quadratic = 0.f;
#pragma unroll
    for (int j = 0; j < kCount; j += kHalfWarps)
      quadratic +=
          store_column_sums(kLeft + j, sums[j], j + 1 < kCount ? &sums[j + 1] : nullptr, shared);
    if constexpr (kRest > kChunk)
      quadratic += sweep_columns<kLeft + kChunk, kFirstRow>(row_sums, shared);
    return quadratic;
  }

  // Of two neighboring column tiles, or the last one, each half of the warp finishes one.
  __device__ __forceinline__ float store_column_sums(int tile, float first, const float* second,
                                                     Workspace& shared) const {
    const bool upper = lane >= kTileColumns;
    const float other = second == nullptr ? 0.f : *second;
    const float given = __shfl_xor_sync(kFullWarp, upper ? first : other, kTileColumns);
    if (upper && second == nullptr) return 0.f;
    const int at = tile * kTileColumns + lane;
    const float sum = (upper ? other : first) + given;
    shared.column_sums[warp][at] = sum;
    return sum * shared.x[at];
  }

  // `sums` are of the rows of tiles from kFirstRow on; returns their part of x' A x.
  template <int kFirstRow, int kCount>
  __device__ __forceinline__ float store_row_sums(float (&sums)[kCount], Workspace& shared) const {
    constexpr int kGroup = kCount < kTileColumns ? kCount : kTileColumns;
    float group[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group[i] = sums[i];
    const HalfWarpSums<kGroup> total(group);
    float quadratic = 0.f;
    if (total.first && total.index < kGroup) {
      const int at = row + (kFirstRow + total.index) * Shape::kTileRows;
      shared.row_sums[at] = total.sum;
      quadratic = total.sum * shared.x[at];
    }
    if constexpr (kCount > kGroup) {
      float rest[kCount - kGroup];
#pragma unroll
      for (int i = kGroup; i < kCount; ++i) rest[i - kGroup] = sums[i];
      quadratic += store_row_sums<kFirstRow + kGroup>(rest, shared);
    }
    return quadratic;
  }
};

// I - tau u u', tau = 2 / u' u, u = x + shift e_pivot: it maps x to -shift e_pivot.
struct Reflection {
  float shift = 0.f, tau = 0.f, half_curvature = 0.f;  // tau u' A u / 2

  // tail: x' x without the pivot's element. The few steps in double halve the error of eigenvalues:
  // all rounding of tau and of the curvature goes, fourfold, along the same u into the matrix.
  __device__ __forceinline__ Reflection(float pivot_x, float tail, float quadratic,
                                        float pivot_product, float pivot_diagonal) {
    if (tail < kZeroColumn) return;
    shift = copysignf(sqrtf(pivot_x * pivot_x + tail), pivot_x);  // u without cancellation
    const double pivot_u = pivot_x + shift, exact_shift = pivot_u - pivot_x;
    const double exact_tau = 2.0 * reciprocal(pivot_u * pivot_u + tail);
    const double curvature =
        quadratic + exact_shift * (2.0 * pivot_product + exact_shift * pivot_diagonal);
    tau = static_cast<float>(exact_tau);
    half_curvature = static_cast<float>(0.5 * exact_tau * curvature);
  }

  __device__ __forceinline__ Change change(float u, float product, float pivot_column) const {
    return {u, tau * (product + shift * pivot_column - half_curvature * u)};
  }

 private:
  // A Newton step from float's: a division in double takes ten times as long.
  static __device__ __forceinline__ double reciprocal(double x) {
    const double guess = 1.f / static_cast<float>(x);
    return guess * (2.0 - x * guess);
  }
};

// The block's threads, each with the elements threadIdx.x + kThreads * m of every vector.
template <typename Shape>
class Tridiagonalizer {
 public:
  using Workspace = TridiagonalWorkspace<Shape>;

  __device__ __forceinline__ Tridiagonalizer(TriangleTiles<Shape>& triangle, int size,
                                             Workspace& workspace)
      : triangle(triangle), size(size), shared(workspace) {}

  // Leaves shared.result, for all threads to read.
  __device__ __forceinline__ void run() {
    begin();
    eliminate<0>();
  }

 private:
  __device__ __forceinline__ void begin() {
    triangle.template store_column<0>(0, shared);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < Shape::kOwned; ++m) {
      const int i = threadIdx.x + m * Shape::kThreads;
      x[m] = 0 < i && i < size ? shared.pivot_column[i] : 0.f;
      if (i >= Shape::kPadded) continue;
      shared.change[i] = {0.f, 0.f};
      shared.x[i] = x[m];
      if (i == 0) shared.result[0] = {shared.pivot_column[0], 0.f};
    }
    __syncthreads();
  }

  // One instance per column tile of the pivot: what is finished takes neither time nor registers.
  template <int kTile>
  __device__ __forceinline__ void eliminate() {
    const int end = min(size, (kTile + 1) * kTileColumns);
#pragma unroll 1
    for (int pivot = max(1, kTile * kTileColumns); pivot < end; ++pivot) {
      const float pivot_x = shared.x[pivot];
      store_tail(pivot);
      triangle.template sweep<kTile>(pivot, shared);
      __syncthreads();
      reflect(pivot, pivot_x);
      __syncthreads();
    }
    if constexpr (kTile + 1 < Shape::kColumnTiles) eliminate<kTile + 1>();
  }

  __device__ __forceinline__ void store_tail(int pivot) {
    float square = 0.f;
#pragma unroll
    for (int m = 0; m < Shape::kOwned; ++m)
      if (static_cast<int>(threadIdx.x) + m * Shape::kThreads != pivot) square += x[m] * x[m];
    square = warp_sum(square);
    if (triangle.lane == 0) shared.tails[triangle.warp] = square;
  }

  // The change that eliminates column pivot - 1, and the pivot's column after it.
  __device__ __forceinline__ void reflect(int pivot, float pivot_x) {
    const float tail = sum_of(shared.tails);
    const float pivot_product = shared.product(pivot);
    const float pivot_diagonal = shared.pivot_column[pivot];
    const Reflection reflection(pivot_x, tail, sum_of(shared.quadratics), pivot_product,
                                pivot_diagonal);
    const Change at_pivot =
        reflection.change(pivot_x + reflection.shift, pivot_product, pivot_diagonal);
#pragma unroll
    for (int m = 0; m < Shape::kOwned; ++m) {
      const int i = threadIdx.x + m * Shape::kThreads;
      if (i >= size) continue;
      Change change{0.f, 0.f};
      float next = 0.f;
      if (i >= pivot) {
        const float element = shared.pivot_column[i];
        change = i == pivot ? at_pivot : reflection.change(x[m], shared.product(i), element);
        next = element - change.u * at_pivot.w - change.w * at_pivot.u;
      }
      if (i == pivot) shared.result[pivot] = {next, pivot_x * pivot_x + tail};
      x[m] = i > pivot ? next : 0.f;
      shared.change[i] = change;
      shared.x[i] = x[m];
    }
  }

  TriangleTiles<Shape>& triangle;
  const int size;
  Workspace& shared;
  float x[Shape::kOwned];
};

}  // namespace fastkd
