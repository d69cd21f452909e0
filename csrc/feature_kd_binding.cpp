// Binding of feature_kd: checks what the kernels rely on, launches, registers. The schemas and
// everything a user sees are declared in fastkd/ops/feature_kd.

#include "common/binding.h"
#include "feature_kd.h"

namespace fastkd {
namespace {

// tensor: [batch, height, width, channels], any strides
TokenMap token_map(const Tensor& tensor, const char* what) {
  STD_TORCH_CHECK(tensor.dim() == 4, what, " must be [B, H, W, D], got ", tensor.dim(), " dims");
  TokenMap map;
  map.data = tensor.data_ptr();
  map.dtype = dtype_of(tensor, what);
  map.channels = static_cast<int>(tensor.size(3));
  map.batch_stride = tensor.stride(0);
  map.row_stride = tensor.stride(1);
  map.column_stride = tensor.stride(2);
  map.channel_stride = tensor.stride(3);
  return map;
}

FeatureKd problem_of(const Tensor& student, const Tensor& teacher, int64_t loss, double beta,
                     double eps) {
  FeatureKd problem;
  problem.student = token_map(student, "feature_kd: student");
  problem.teacher = token_map(teacher, "feature_kd: teacher");
  for (int dim = 0; dim < 3; ++dim)
    STD_TORCH_CHECK(student.size(dim) == teacher.size(dim),
                    "feature_kd: student and teacher differ in dim ", dim);
  STD_TORCH_CHECK(student.get_device_index() == teacher.get_device_index(),
                  "feature_kd: student and teacher are on different devices");
  STD_TORCH_CHECK(0 <= loss && loss <= 3, "feature_kd: unknown loss ", loss);
  problem.batch = student.size(0);
  problem.height = static_cast<int>(student.size(1));
  problem.width = static_cast<int>(student.size(2));
  problem.channels = std::min(problem.student.channels, problem.teacher.channels);
  problem.loss = static_cast<FeatureLoss>(loss);
  problem.beta = static_cast<float>(beta);
  problem.eps = static_cast<float>(eps);
  return problem;
}

float* floats(const Tensor& tensor, int64_t at_least, const char* what) {
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Float &&
                      tensor.is_contiguous() && tensor.numel() >= at_least,
                  what, " must be contiguous float32 with at least ", at_least, " elements");
  return static_cast<float*>(tensor.data_ptr());
}

int64_t stats_size(const FeatureKd& p) {
  return p.loss == FeatureLoss::kCosine ? 3 * p.batch * p.height * p.width : 0;
}

void forward(Tensor student, Tensor teacher, int64_t loss, double beta, double eps, Tensor scratch,
             Tensor stats, Tensor result) {
  const DeviceGuard guard(student);
  const FeatureKd problem = problem_of(student, teacher, loss, beta, eps);
  feature_kd_forward(problem, floats(scratch, feature_kd_scratch(problem), "feature_kd: scratch"),
                     floats(stats, stats_size(problem), "feature_kd: stats"),
                     floats(result, 1, "feature_kd: result"), current_stream(student));
  check_launch("feature_kd forward");
}

void backward(Tensor upstream, Tensor student, Tensor teacher, Tensor stats, int64_t loss,
              double beta, double eps, bool for_teacher, Tensor gradient) {
  const DeviceGuard guard(student);
  const FeatureKd problem = problem_of(student, teacher, loss, beta, eps);
  const TokenMap out = token_map(gradient, "feature_kd: gradient");
  const TokenMap& like = for_teacher ? problem.teacher : problem.student;
  STD_TORCH_CHECK(out.channels == like.channels && out.dtype == like.dtype,
                  "feature_kd: gradient must match the map it is of");
  feature_kd_backward(problem, floats(upstream, 1, "feature_kd: upstream"),
                      floats(stats, stats_size(problem), "feature_kd: stats"), out, for_teacher,
                      current_stream(student));
  check_launch("feature_kd backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, FASTKD_DISPATCH_KEY, library) {
  library.impl("_feature_kd_forward", TORCH_BOX(&forward));
  library.impl("_feature_kd_backward", TORCH_BOX(&backward));
}

}  // namespace fastkd
