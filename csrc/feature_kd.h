// feature_kd: the distance between two token maps, as raw pointers and a stream. Does not depend on
// torch.
#pragma once

#include <cstdint>

#include "common/memory.cuh"

namespace fastkd {

enum class FeatureLoss : int { kMse = 0, kSpectral = 1, kSmoothL1 = 2, kCosine = 3 };

// One [batch, height, width, channels] map with arbitrary strides, counted in elements.
struct TokenMap {
  void* data;
  Dtype dtype;
  int channels;
  int64_t batch_stride, row_stride, column_stride, channel_stride;
};

struct FeatureKd {
  TokenMap student, teacher;
  int64_t batch;
  int height, width;
  int channels;  // compared: the narrower map's; the wider one is averaged down to them
  FeatureLoss loss;
  float beta;  // smooth L1: where the parabola ends
  float eps;   // cosine: tokens shorter than this have no direction
};

// Floats of scratch memory that the forward needs.
int64_t feature_kd_scratch(const FeatureKd& problem);

// loss: one float. stats: [batch, height * width, 3] floats for kCosine (cosine, 1/|s|, 1/|t|),
// untouched otherwise.
void feature_kd_forward(const FeatureKd& problem, float* scratch, float* stats, float* loss,
                        cudaStream_t stream);

// Writes upstream * d loss / d student into `gradient` (or d teacher). `upstream`: one float.
void feature_kd_backward(const FeatureKd& problem, const float* upstream, const float* stats,
                         const TokenMap& gradient, bool for_teacher, cudaStream_t stream);

}  // namespace fastkd
