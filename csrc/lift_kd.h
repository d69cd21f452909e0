// lift_kd: Linear, LayerNorm and the distance of feature_kd in one kernel, as raw pointers and a
// stream. Does not depend on torch.
#pragma once

#include <cstdint>

#include "feature_kd.h"

namespace fastkd {

// A parameter, or its gradient; no data: there is none, or it is not needed.
struct Parameter {
  void* data;
  Dtype dtype;
  int64_t row_stride, column_stride;  // of the weight [out, in]; a vector has its rows' alone
};

struct LiftKd {
  TokenMap tokens;   // [batch, height, width, in]
  TokenMap teacher;  // [batch, height, width, out]; without data there is no loss
  Parameter weight, bias, norm_weight, norm_bias;  // no norm weight: no LayerNorm
  int64_t batch;
  int height, width;
  int out;  // channels of the lifted tokens
  FeatureLoss loss;
  float beta;     // smooth L1: where the parabola ends
  float eps;      // of the LayerNorm
  Dtype compute;  // of the matrix products' operands: fp16 or bf16
  int blocks;     // persistent blocks to start: as many as there are multiprocessors
};

// Scratch memory. Parts are partial sums, of `blocks` blocks or of kWeightSplits runs of rows.
struct LiftBuffers {
  void* packed;         // [out, in] of the compute dtype: the weight as the kernels want it
  float* vectors;       // [3, out]: bias, norm weight, norm bias
  float* loss_parts;    // [blocks]
  float* pooled_parts;  // [blocks * kLiftWorkers + batch, out]
  float* column_parts;  // [blocks, 3, out]: of the gradients of norm weight, norm bias, bias
  void* slopes;         // [slope_rows, out] of the compute dtype: gradients of a chunk's Linear
  int64_t slope_rows;   // a multiple of kLiftTileRows
  float* weight_parts;  // [kWeightSplits, out, in]
};

constexpr int kLiftWorkers = 4;    // per block
constexpr int kLiftTileRows = 16;  // of a worker: it must hold a grid row for kSpectral
constexpr int kWeightSplits = 22;  // times 6 tiles of the weight: the 132 SMs of an H100

struct LiftGradients {
  TokenMap tokens;
  Parameter weight, bias, norm_weight, norm_bias;
};

// Whether there are kernels for tokens of `in` channels, lifted to `out`.
bool lift_kd_supports(int in, int out);

// Writes what is asked for: loss: one float, if there is a teacher. pooled: [batch, out], the mean
// lifted token of every image; null: not wanted. Uses packed, vectors, loss_parts and pooled_parts.
void lift_kd_forward(const LiftKd& problem, const LiftBuffers& buffers, float* loss, float* pooled,
                     cudaStream_t stream);

// Writes the gradients that have data. With `loss`: the loss, too, and gradients of exactly it
// (upstream and pooled_upstream are null). Else those of upstream * loss + sum of pooled_upstream *
// pooled; either may be null. Slopes and weight_parts serve the gradient of the weight,
// column_parts those of the vectors.
void lift_kd_gradients(const LiftKd& problem, const float* upstream, const float* pooled_upstream,
                       const LiftBuffers& buffers, float* loss, const LiftGradients& gradients,
                       cudaStream_t stream);

}  // namespace fastkd
