// Runs every kernel of feature_kd on the host shim, to be watched by ThreadSanitizer.

#include <cmath>
#include <cstdio>
#include <vector>

#include "feature_kd.h"

using namespace fastkd;

namespace {

constexpr int kBatch = 2, kHeight = 3, kWidth = 4, kChannels = 16;

TokenMap map_of(std::vector<float>& data, int channels) {
  return {data.data(),       Dtype::kFloat32, channels, kHeight * kWidth * channels,
          kWidth * channels, channels,        1};
}

bool runs(FeatureLoss loss, int teacher_channels) {
  const int tokens = kBatch * kHeight * kWidth;
  std::vector<float> student(tokens * kChannels), teacher(tokens * teacher_channels);
  for (size_t i = 0; i < student.size(); ++i) student[i] = std::sin(0.1f * i);
  for (size_t i = 0; i < teacher.size(); ++i) teacher[i] = std::cos(0.3f * i);
  const FeatureKd problem{map_of(student, kChannels),
                          map_of(teacher, teacher_channels),
                          kBatch,
                          kHeight,
                          kWidth,
                          kChannels,
                          loss,
                          1.f,
                          1e-8f};

  std::vector<float> scratch(feature_kd_scratch(problem)), stats(3 * tokens);
  std::vector<float> gradient(student.size(), NAN);
  float value = NAN, upstream = 1.f;
  feature_kd_forward(problem, scratch.data(), stats.data(), &value, nullptr);
  feature_kd_backward(problem, &upstream, stats.data(), map_of(gradient, kChannels), false,
                      nullptr);
  bool finite = std::isfinite(value);
  for (const float x : gradient) finite = finite && std::isfinite(x);
  return finite;
}

}  // namespace

int main() {
  bool ok = true;
  for (const auto loss :
       {FeatureLoss::kMse, FeatureLoss::kSpectral, FeatureLoss::kSmoothL1, FeatureLoss::kCosine})
    for (const int teacher_channels : {16, 24, 32}) ok = runs(loss, teacher_channels) && ok;
  std::printf("%s\n", ok ? "every value is finite" : "a value is missing");
  return ok ? 0 : 1;
}
