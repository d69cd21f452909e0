// Runs every kernel of lift_kd on the host shim, to be watched by ThreadSanitizer.

#include <cmath>
#include <cstdio>
#include <vector>

#include "lift_kd.h"

using namespace fastkd;

namespace {

constexpr int kBatch = 2, kHeight = 3, kWidth = 9, kIn = 32, kOut = 64, kBlocks = 2;
constexpr int kTokens = kBatch * kHeight * kWidth;
constexpr int kSlopeRows = 4 * kLiftTileRows;  // two chunks or more

std::vector<float> waves(int size, float pace) {
  std::vector<float> values(size);
  for (int i = 0; i < size; ++i) values[i] = std::sin(pace * i);
  return values;
}

TokenMap map_of(std::vector<float>& data, int channels) {
  return {data.data(),       Dtype::kFloat32, channels, kHeight * kWidth * channels,
          kWidth * channels, channels,        1};
}

Parameter parameter_of(std::vector<float>& data, int columns = 1) {
  return {data.data(), Dtype::kFloat32, columns, 1};
}

bool finite(const std::vector<float>& values) {
  for (const float x : values)
    if (!std::isfinite(x)) return false;
  return true;
}

bool runs(FeatureLoss loss) {
  std::vector<float> tokens = waves(kTokens * kIn, 0.1f), teacher = waves(kTokens * kOut, 0.3f);
  std::vector<float> weight = waves(kOut * kIn, 0.7f), vector = waves(kOut, 0.2f);
  LiftKd problem{};
  problem.tokens = map_of(tokens, kIn);
  problem.teacher = map_of(teacher, kOut);
  problem.weight = parameter_of(weight, kIn);
  problem.bias = problem.norm_weight = problem.norm_bias = parameter_of(vector);
  problem.batch = kBatch;
  problem.height = kHeight;
  problem.width = kWidth;
  problem.out = kOut;
  problem.loss = loss;
  problem.beta = 1.f;
  problem.eps = 1e-6f;
  problem.compute = Dtype::kBFloat16;
  problem.blocks = kBlocks;

  std::vector<uint4> packed(kOut * kIn / 8), slopes(kSlopeRows * kOut / 8);
  std::vector<float> vectors(3 * kOut), loss_parts(kBlocks), column_parts(kBlocks * 3 * kOut);
  std::vector<float> pooled_parts((kBlocks * kLiftWorkers + kBatch) * kOut);
  std::vector<float> weight_parts(kWeightSplits * kOut * kIn);
  const LiftBuffers buffers{packed.data(),       vectors.data(),      loss_parts.data(),
                            pooled_parts.data(), column_parts.data(), slopes.data(),
                            kSlopeRows,          weight_parts.data()};

  std::vector<float> value(1, NAN), pooled(kBatch * kOut, NAN), upstream(1, 1.f);
  lift_kd_forward(problem, buffers, value.data(), pooled.data(), nullptr);
  bool ok = finite(value) && finite(pooled);

  for (const bool one_pass : {true, false}) {
    std::vector<float> token_slope(tokens.size(), NAN), weight_slope(weight.size(), NAN);
    std::vector<float> bias(kOut, NAN), norm_weight(kOut, NAN), norm_bias(kOut, NAN);
    const LiftGradients gradients{map_of(token_slope, kIn), parameter_of(weight_slope, kIn),
                                  parameter_of(bias), parameter_of(norm_weight),
                                  parameter_of(norm_bias)};
    lift_kd_gradients(problem, one_pass ? nullptr : upstream.data(),
                      one_pass ? nullptr : pooled.data(), buffers,
                      one_pass ? value.data() : nullptr, gradients, nullptr);
    for (const auto* slope : {&token_slope, &weight_slope, &bias, &norm_weight, &norm_bias})
      ok = ok && finite(*slope);
  }
  return ok && finite(value);
}

}  // namespace

int main() {
  bool ok = true;
  for (const auto loss :
       {FeatureLoss::kMse, FeatureLoss::kSpectral, FeatureLoss::kSmoothL1, FeatureLoss::kCosine})
    ok = runs(loss) && ok;
  std::printf("%s\n", ok ? "every value is finite" : "a value is missing");
  return ok ? 0 : 1;
}
