// Binding of lift_kd: checks what the kernels rely on, launches, registers. The schemas and the
// buffers are fastkd/ops/lift_kd/cuda.py's. A tensor without elements stands for one that is
// absent.

#include <algorithm>
#include <initializer_list>

#include "common/binding.h"
#include "lift_kd.h"

namespace fastkd {
namespace {

constexpr auto kFloat = torch::headeronly::ScalarType::Float;

bool is_absent(const Tensor& tensor) { return tensor.numel() == 0; }

// tensor: [batch, height, width, channels], any strides
TokenMap map_of(const Tensor& tensor, const Tensor& tokens, int64_t channels, const char* what) {
  if (is_absent(tensor)) return {};
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(3) == channels, "lift_kd: ", what,
                  " must be [B, H, W, ", channels, "]");
  for (int dim = 0; dim < 3; ++dim)
    STD_TORCH_CHECK(tensor.size(dim) == tokens.size(dim), "lift_kd: ", what,
                    " and tokens differ in dim ", dim);
  STD_TORCH_CHECK(tensor.get_device_index() == tokens.get_device_index(), "lift_kd: ", what,
                  " and tokens are on different devices");
  return {tensor.data_ptr(), dtype_of(tensor, what), static_cast<int>(channels),
          tensor.stride(0),  tensor.stride(1),       tensor.stride(2),
          tensor.stride(3)};
}

Parameter parameter_of(const Tensor& tensor, std::initializer_list<int64_t> shape,
                       const char* what) {
  if (is_absent(tensor)) return {};
  bool matches = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t dim = 0; matches && dim < shape.size(); ++dim)
    matches = tensor.size(dim) == shape.begin()[dim];
  STD_TORCH_CHECK(matches, "lift_kd: ", what, " has the wrong shape");
  return {tensor.data_ptr(), dtype_of(tensor, what), tensor.stride(0),
          tensor.dim() == 2 ? tensor.stride(1) : 0};
}

float* floats(const Tensor& tensor, int64_t count, const char* what) {
  if (is_absent(tensor)) return nullptr;
  STD_TORCH_CHECK(
      tensor.scalar_type() == kFloat && tensor.is_contiguous() && tensor.numel() >= count,
      "lift_kd: ", what, " must be contiguous float32 with at least ", count, " elements");
  return static_cast<float*>(tensor.data_ptr());
}

void* halves(const Tensor& tensor, int64_t count, Dtype dtype, const char* what) {
  if (is_absent(tensor)) return nullptr;
  STD_TORCH_CHECK(
      dtype_of(tensor, what) == dtype && tensor.is_contiguous() && tensor.numel() >= count,
      "lift_kd: ", what, " must be contiguous, of the products' dtype, with at least ", count,
      " elements");
  return tensor.data_ptr();
}

LiftKd problem_of(const Tensor& tokens, const Tensor& teacher, const Tensor& weight,
                  const Tensor& bias, const Tensor& norm_weight, const Tensor& norm_bias,
                  int64_t loss, double beta, double eps, int64_t blocks, const Tensor& packed) {
  STD_TORCH_CHECK(tokens.dim() == 4 && weight.dim() == 2 && !is_absent(tokens),
                  "lift_kd: tokens must be [B, H, W, Ds], weight [Dt, Ds]");
  const int64_t in = weight.size(1), out = weight.size(0);
  STD_TORCH_CHECK(lift_kd_supports(static_cast<int>(in), static_cast<int>(out)),
                  "lift_kd: no kernel lifts ", in, " channels to ", out);
  STD_TORCH_CHECK(0 <= loss && loss <= 3, "lift_kd: unknown loss ", loss);
  STD_TORCH_CHECK(blocks >= 1, "lift_kd: blocks must be positive");
  LiftKd problem;
  problem.tokens = map_of(tokens, tokens, in, "tokens");
  problem.teacher = map_of(teacher, tokens, out, "teacher");
  problem.weight = parameter_of(weight, {out, in}, "weight");
  problem.bias = parameter_of(bias, {out}, "bias");
  problem.norm_weight = parameter_of(norm_weight, {out}, "norm_weight");
  problem.norm_bias = parameter_of(norm_bias, {out}, "norm_bias");
  problem.batch = tokens.size(0);
  problem.height = static_cast<int>(tokens.size(1));
  problem.width = static_cast<int>(tokens.size(2));
  problem.out = static_cast<int>(out);
  problem.loss = static_cast<FeatureLoss>(loss);
  problem.beta = static_cast<float>(beta);
  problem.eps = static_cast<float>(eps);
  problem.compute = dtype_of(packed, "lift_kd: packed");
  problem.blocks = static_cast<int>(blocks);
  STD_TORCH_CHECK(problem.compute != Dtype::kFloat32, "lift_kd: packed must be of half precision");
  STD_TORCH_CHECK(problem.loss != FeatureLoss::kSpectral || is_absent(teacher) ||
                      problem.width <= kLiftTileRows,
                  "lift_kd: spectral takes grid rows of up to ", kLiftTileRows, " tokens");
  return problem;
}

LiftBuffers buffers_of(const LiftKd& p, const Tensor& packed, const Tensor& vectors,
                       const Tensor& loss_parts) {
  LiftBuffers buffers{};
  buffers.packed = halves(packed, int64_t{p.out} * p.tokens.channels, p.compute, "packed");
  buffers.vectors = floats(vectors, 3 * p.out, "vectors");
  buffers.loss_parts = floats(loss_parts, p.blocks, "loss_parts");
  STD_TORCH_CHECK(buffers.vectors != nullptr, "lift_kd: vectors are needed");
  return buffers;
}

void forward(Tensor tokens, Tensor teacher, Tensor weight, Tensor bias, Tensor norm_weight,
             Tensor norm_bias, int64_t loss, double beta, double eps, int64_t blocks, Tensor packed,
             Tensor vectors, Tensor loss_parts, Tensor pooled_parts, Tensor result, Tensor pooled) {
  const DeviceGuard guard(tokens);
  const LiftKd problem = problem_of(tokens, teacher, weight, bias, norm_weight, norm_bias, loss,
                                    beta, eps, blocks, packed);
  LiftBuffers buffers = buffers_of(problem, packed, vectors, loss_parts);
  const int64_t pooled_rows = blocks * kLiftWorkers + problem.batch;
  buffers.pooled_parts = floats(pooled_parts, pooled_rows * problem.out, "pooled_parts");
  STD_TORCH_CHECK(is_absent(teacher) || buffers.loss_parts != nullptr,
                  "lift_kd: a loss needs loss_parts");
  STD_TORCH_CHECK(is_absent(pooled) || buffers.pooled_parts != nullptr,
                  "lift_kd: pooled tokens need pooled_parts");
  lift_kd_forward(problem, buffers, floats(result, 1, "result"),
                  floats(pooled, problem.batch * problem.out, "pooled"), current_stream(tokens));
  check_launch("lift_kd forward");
}

void gradients(Tensor upstream, Tensor pooled_upstream, Tensor tokens, Tensor teacher,
               Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, int64_t loss,
               double beta, double eps, int64_t blocks, Tensor packed, Tensor vectors,
               Tensor loss_parts, Tensor column_parts, Tensor slopes, Tensor weight_parts,
               Tensor result, Tensor tokens_gradient, Tensor weight_gradient, Tensor bias_gradient,
               Tensor norm_weight_gradient, Tensor norm_bias_gradient) {
  const DeviceGuard guard(tokens);
  const LiftKd p = problem_of(tokens, teacher, weight, bias, norm_weight, norm_bias, loss, beta,
                              eps, blocks, packed);
  const int64_t in = p.tokens.channels, out = p.out;
  LiftGradients wanted;
  wanted.tokens = map_of(tokens_gradient, tokens, in, "the tokens' gradient");
  wanted.weight = parameter_of(weight_gradient, {out, in}, "the weight's gradient");
  wanted.bias = parameter_of(bias_gradient, {out}, "the bias' gradient");
  wanted.norm_weight = parameter_of(norm_weight_gradient, {out}, "the norm weight's gradient");
  wanted.norm_bias = parameter_of(norm_bias_gradient, {out}, "the norm bias' gradient");

  LiftBuffers buffers = buffers_of(p, packed, vectors, loss_parts);
  buffers.column_parts = floats(column_parts, blocks * 3 * out, "column_parts");
  buffers.slopes = halves(slopes, kLiftTileRows * out, p.compute, "slopes");
  buffers.slope_rows = slopes.numel() / out;
  buffers.weight_parts = floats(weight_parts, kWeightSplits * out * in, "weight_parts");
  STD_TORCH_CHECK(!(wanted.norm_weight.data || wanted.norm_bias.data || wanted.bias.data) ||
                      buffers.column_parts != nullptr,
                  "lift_kd: gradients of vectors need column_parts");
  STD_TORCH_CHECK(!wanted.weight.data || (buffers.slopes && buffers.weight_parts),
                  "lift_kd: the weight's gradient needs slopes and weight_parts");

  float* loss_result = floats(result, 1, "result");
  STD_TORCH_CHECK(loss_result == nullptr || (buffers.loss_parts && !is_absent(teacher) &&
                                             is_absent(upstream) && is_absent(pooled_upstream)),
                  "lift_kd: the loss comes with its own gradients only");
  lift_kd_gradients(p, floats(upstream, 1, "upstream"),
                    floats(pooled_upstream, p.batch * out, "pooled_upstream"), buffers, loss_result,
                    wanted, current_stream(tokens));
  check_launch("lift_kd gradients");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, FASTKD_DISPATCH_KEY, library) {
  library.impl("_lift_kd_forward", TORCH_BOX(&forward));
  library.impl("_lift_kd_gradients", TORCH_BOX(&gradients));
}

}  // namespace fastkd
