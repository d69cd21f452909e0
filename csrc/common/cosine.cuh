// The cosine of two tokens from sums over their channels, for tokens of any size.
#pragma once

#include <cmath>

#include "platform.h"

namespace fastkd {

struct Cosine {
  float cosine, student_inverse, teacher_inverse;
};

// A power of two to scale a token by, of which float32 does not hold the sum of squares.
__device__ __forceinline__ float rescaling(float square) {
  if (square > 1e36f) return 0x1p-80f;
  return square < 1e-30f ? 0x1p100f : 1.f;
}

// Whether a token must be scaled. Small ones count where eps lets them have a direction.
__device__ __forceinline__ bool needs_rescaling(float student_square, float teacher_square,
                                                float eps) {
  return student_square > 1e36f || teacher_square > 1e36f || eps < 1e-15f;
}

// All zero for a token shorter than eps; but a NaN shows, also beside a token of zeros.
__device__ __forceinline__ Cosine cosine_of(float dot, float student_square, float teacher_square,
                                            float student_scale, float teacher_scale, float eps) {
  const float student_norm = sqrtf(student_square), teacher_norm = sqrtf(teacher_square);
  const bool is_short = student_norm < eps * student_scale || teacher_norm < eps * teacher_scale;
  if (is_short && dot == dot) return {0.f, 0.f, 0.f};
  const float student_inverse = 1.f / student_norm, teacher_inverse = 1.f / teacher_norm;
  return {dot * student_inverse * teacher_inverse, student_inverse * student_scale,
          teacher_inverse * teacher_scale};
}

}  // namespace fastkd
