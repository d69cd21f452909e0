// lift_kd: y = W x + b; z = LayerNorm(y); the distance of z to the teacher's token, as feature_kd
// defines it; the mean of z over an image's tokens; and the gradients of both.
//
// Cut: one block per multiprocessor, with W in its shared memory, and in it four workers of two
// warps. A worker takes tiles of 16 tokens; each of its warps lifts them to half of the outputs, so
// that a lifted token stays in registers (96 per thread) from product to gradient, and is computed
// once. Spectral tiles are whole grid rows: one of up to 16 tokens, or two of up to 8, whose sums
// are taken by shuffles. The gradient for y is a factor of the next product where it is, as in
// FlashAttention-2: times the same W it is the tokens' gradient. The weight's does not fit beside
// W: y's gradient is written, for a chunk of rows that stays in L2, for lift_kd_weight.cuh.
//
// W is centered over the outputs before it is rounded: LayerNorm(W x) = RMSNorm(W_c x). Its rows
// and columns are permuted within groups of 32, such that what a thread holds of a row in four mma
// tiles are eight neighboring channels: tokens, teacher and gradients go between global memory and
// registers 16 bytes at a time, with no shared memory between.
//
// Moves: tokens and teacher once, the tokens' gradient once; y's gradient once to L2. Every worker
// reads all of W for 16 tokens, which should keep shared memory busy about twice as long as the
// tensor cores (an estimate: no GPU has run this); the registers are already those that wgmma,
// which would read it once for 64, has in two warpgroups. 192 -> 384 on sm_90a: 240 to 255
// registers, nothing spilled, 207.5 KB of shared memory (W 150, what warps exchange 35, column sums
// 18, vectors 4.5). Fetching a tile's inputs during the tile before would cost 48 registers more
// and spill: four independent workers hide the latency instead.

#include <algorithm>

#include "lift_kd_tile.cuh"
#include "lift_kd_weight.cuh"

namespace fastkd {
namespace {

constexpr float kSlopeUnit = 256.f;  // puts slopes of about 1 in the middle of fp16's range

constexpr int kPrepareThreads = 256, kPrepareColumns = 8;

__device__ float read(const Parameter& parameter, int64_t index) {
  if (parameter.dtype == Dtype::kFloat32) return static_cast<const float*>(parameter.data)[index];
  if (parameter.dtype == Dtype::kFloat16)
    return to_float(static_cast<const __half*>(parameter.data)[index]);
  return to_float(static_cast<const __nv_bfloat16*>(parameter.data)[index]);
}

__device__ float read_or(const Parameter& vector, int index, float missing) {
  return vector.data == nullptr ? missing : read(vector, index * vector.row_stride);
}

__device__ void prepare_vectors(const LiftKd& p, int out, float* vectors) {
  __shared__ float mean;
  float sum = 0.f;
  for (int i = threadIdx.x; i < out; i += kPrepareThreads) sum += read_or(p.bias, i, 0.f);
  sum = block_sum<kPrepareThreads>(sum);
  if (threadIdx.x == 0) mean = p.norm_weight.data == nullptr ? 0.f : sum / out;
  __syncthreads();
  for (int i = threadIdx.x; i < out; i += kPrepareThreads) {
    vectors[i] = read_or(p.bias, i, 0.f) - mean;
    vectors[out + i] = read_or(p.norm_weight, i, 1.f);
    vectors[2 * out + i] = read_or(p.norm_bias, i, 0.f);
  }
}

// One block per kPrepareColumns columns of W, and one for the vectors.
template <typename C>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare(LiftKd p, int in, int out, C* packed, float* vectors) {
  if (blockIdx.x == static_cast<unsigned>(in / kPrepareColumns)) {
    prepare_vectors(p, out, vectors);
    return;
  }
  constexpr int kRuns = kPrepareThreads / kPrepareColumns;
  __shared__ float sums[kRuns][kPrepareColumns];
  const int lane = threadIdx.x % kPrepareColumns, run = threadIdx.x / kPrepareColumns;
  const int column = blockIdx.x * kPrepareColumns + lane;
  const auto weight = [&](int row) {
    return read(p.weight, row * p.weight.row_stride + column * p.weight.column_stride);
  };
  float mean = 0.f;
  if (p.norm_weight.data != nullptr) {
    float sum = 0.f;
    for (int row = run; row < out; row += kRuns) sum += weight(row);
    sums[run][lane] = sum;
    __syncthreads();
    for (int i = 0; i < kRuns; ++i) mean += sums[i][lane];
    mean /= out;
  }
  for (int row = run; row < out; row += kRuns)
    packed[packed_place(row) * in + packed_place(column)] = from_float<C>(weight(row) - mean);
}

// The mean of an image's lifted tokens: a part per worker and image that it has tokens of.
template <int Out>
struct Pool {
  static constexpr int kGroups = Out / 2 / kGroup;
  float sums[kGroups];
  int image;

  __device__ __forceinline__ void start(int with) {
    image = with;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) sums[group] = 0.f;
  }

  __device__ __forceinline__ void finish(const Lift& p, int worker, const Place& place) const {
    float* part = p.pooled_parts + int64_t{worker + image} * Out + place.half * (Out / 2);
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      part[kGroup * group + kOctet * place.q + place.g] = sums[group];
  }

  // Images follow one another, also within a tile.
  template <typename Tile>
  __device__ __forceinline__ void add(const Lift& p, int worker, const Place& place, int tile,
                                      Tile& tokens) {
    const int last_slot = min((tile + 1) * kLiftTileRows, p.slots.count()) - 1;
    const int last_image = last_slot / p.slots.per_image();
    while (true) {
      tokens.add_lifted(image, sums);
      if (image == last_image) break;
      finish(p, worker, place);
      start(image + 1);
    }
  }
};

template <typename C, int In, int Out>
__device__ void load_parameters(const Lift& p, unsigned char* memory) {
  constexpr int kOctets = In / kOctet;
  C* weight = reinterpret_cast<C*>(memory);
  float* vectors = reinterpret_cast<float*>(memory + LiftShared<In, Out>::kVectors);
  for (int i = threadIdx.x; i < Out * kOctets; i += kLiftThreads)
    *reinterpret_cast<uint4*>(weight + i / kOctets * LiftShared<In, Out>::kStride +
                              i % kOctets * kOctet) = static_cast<const uint4*>(p.packed)[i];
  for (int i = threadIdx.x; i < 3 * Out; i += kLiftThreads) vectors[i] = p.vectors[i];
}

template <int In, int Out>
__device__ float* column_sums(unsigned char* memory) {
  return reinterpret_cast<float*>(memory + LiftShared<In, Out>::kColumnSums);
}

// Adds the workers' sums to the block's part [3, Out].
template <int In, int Out>
__device__ void add_column_parts(const Lift& p, unsigned char* memory) {
  const float* sums = column_sums<In, Out>(memory);
  float* part = p.column_parts + int64_t{blockIdx.x} * 3 * Out;
  __syncthreads();
  for (int i = threadIdx.x; i < 3 * Out; i += kLiftThreads) {
    float sum = p.accumulate ? part[i] : 0.f;
    for (int worker = 0; worker < kLiftWorkers; ++worker) sum += sums[worker * 3 * Out + i];
    part[i] = sum;
  }
}

template <typename C, int In, int Out, bool kGradient, bool kWide>
__global__ void __launch_bounds__(kLiftThreads, 1) lift(Lift p) {
  FASTKD_DYNAMIC_SHARED(memory);
  load_parameters<C, In, Out>(p, memory);
  for (int i = threadIdx.x; i < kLiftWorkers * 3 * Out; i += kLiftThreads)
    column_sums<In, Out>(memory)[i] = 0.f;
  __syncthreads();

  const Place place;
  Meeting meeting;
  const int workers = gridDim.x * kLiftWorkers;
  const int worker = blockIdx.x * kLiftWorkers + place.worker;
  const int first = p.first_tile + first_of(worker, workers, p.tiles);
  const int end = p.first_tile + first_of(worker + 1, workers, p.tiles);
  const float factor = p.slope_scale * (p.upstream == nullptr ? 1.f : *p.upstream);

  float value = 0.f;
  Pool<Out> pool;
  pool.start(first * kLiftTileRows / p.slots.per_image());
  for (int index = first; index < end; ++index) {
    LiftTile<C, In, Out, kWide> tile{p, place, meeting, memory, index};
    TokenFactors<C, In> tokens;
    tokens.fetch(p, index, place);
    tile.start();
    tile.project(tokens);
    if (p.norm) tile.normalize();
    if constexpr (kGradient) {
      value += tile.differentiate(factor);
      uint32_t slopes[Out / 2 / 16][4];
      tile.pack(slopes);
      if (p.slopes != nullptr) tile.write_slopes(slopes);
      if (p.gradient.data != nullptr) tile.write_gradient(slopes);
    } else {
      if (p.pooled_parts != nullptr) pool.add(p, worker, place, index, tile);
      if (p.teacher.data != nullptr) value += tile.loss(factor);
    }
  }

  if constexpr (kGradient) {
    if (p.sum_norm || p.sum_bias) add_column_parts<In, Out>(p, memory);
  } else {
    if (p.pooled_parts != nullptr && first < end) pool.finish(p, worker, place);
  }
  if (p.loss_parts != nullptr) {
    value = block_sum<kLiftThreads>(value);
    if (threadIdx.x == 0)
      p.loss_parts[blockIdx.x] = value + (p.accumulate ? p.loss_parts[blockIdx.x] : 0.f);
  }
}

// `rows` x `columns` sums over `count` parts that are `stride` floats apart.
struct PartialSums {
  const float* parts;
  int count;
  int64_t stride;
  int rows, columns;
  Parameter result;
};

struct PartialSumsList {
  PartialSums items[4];
};

__global__ void __launch_bounds__(kLiftThreads)
    finish_gradients(PartialSumsList list, float scale) {
  const PartialSums& p = list.items[blockIdx.y];
  const int index = blockIdx.x * kLiftThreads + threadIdx.x;
  if (index >= p.rows * p.columns) return;
  float sum = 0.f;
#pragma unroll 8
  for (int part = 0; part < p.count; ++part) sum += p.parts[part * p.stride + index];
  sum *= scale;
  const int64_t place =
      index / p.columns * p.result.row_stride + index % p.columns * p.result.column_stride;
  if (p.result.dtype == Dtype::kFloat32)
    static_cast<float*>(p.result.data)[place] = sum;
  else if (p.result.dtype == Dtype::kFloat16)
    static_cast<__half*>(p.result.data)[place] = from_float<__half>(sum);
  else
    static_cast<__nv_bfloat16*>(p.result.data)[place] = from_float<__nv_bfloat16>(sum);
}

// One block per image.
__global__ void __launch_bounds__(kLiftThreads)
    finish_pooled(const float* parts, Slots slots, int workers, int tiles, int out, float* pooled) {
  const int image = blockIdx.x;
  const int first_tile = image * slots.per_image() / kLiftTileRows;
  const int last_tile = ((image + 1) * slots.per_image() - 1) / kLiftTileRows;
  const int first = worker_of(first_tile, workers, tiles);
  const int last = worker_of(last_tile, workers, tiles);
  for (int channel = threadIdx.x; channel < out; channel += kLiftThreads) {
    float sum = 0.f;
    for (int worker = first; worker <= last; ++worker) {
      const bool has_tiles =
          first_of(worker, workers, tiles) < first_of(worker + 1, workers, tiles);
      if (has_tiles) sum += parts[int64_t{worker + image} * out + channel];
    }
    pooled[int64_t{image} * out + channel] = sum / (slots.height * slots.width);
  }
}

Slots slots_of(const LiftKd& p) {
  int pitch = p.width;
  if (p.loss == FeatureLoss::kSpectral && p.teacher.data != nullptr)
    pitch = p.width <= kLiftTileRows / 2 ? kLiftTileRows / 2 : kLiftTileRows;
  return {static_cast<int>(p.batch), p.height, p.width, pitch};
}

float mean_scale(const LiftKd& p) {
  const double tokens = static_cast<double>(p.batch) * p.height * p.width;
  if (p.loss == FeatureLoss::kCosine) return static_cast<float>(1.0 / tokens);
  if (p.loss == FeatureLoss::kSpectral)
    return static_cast<float>(1.0 / (4.0 * p.batch * p.out * p.height * (p.width / 2 + 1)));
  return static_cast<float>(1.0 / (tokens * p.out));
}

Lift lift_of(const LiftKd& p, const LiftBuffers& buffers) {
  Lift lift{};
  lift.tokens = octet_map(p.tokens);
  lift.teacher = octet_map(p.teacher);
  lift.slots = slots_of(p);
  lift.tiles = (lift.slots.count() + kLiftTileRows - 1) / kLiftTileRows;
  lift.loss = p.loss;
  lift.norm = p.norm_weight.data != nullptr;
  lift.beta = p.beta;
  lift.inverse_beta = 1.f / p.beta;
  lift.half_row_share = (p.width % 2 == 0 ? 2.f : 1.f) / p.width;
  lift.eps = p.eps;
  lift.packed = buffers.packed;
  lift.vectors = buffers.vectors;
  return lift;
}

// Widths that there are kernels for.
template <int In_, int Out_>
struct Widths {
  static constexpr int In = In_, Out = Out_;
};

template <typename Body>
bool with_widths(int in, int out, Body&& body) {
  if (in == 192 && out == 384) {
    body(Widths<192, 384>{});
    return true;
  }
#ifdef FASTKD_HOST_SHIM
  if (in == 32 && out == 64) {
    body(Widths<32, 64>{});
    return true;
  }
#endif
  return false;
}

// Calls body(widths, C{}) for the widths and the dtype of the products.
template <typename Body>
void with_kernels(const LiftKd& p, Body&& body) {
  with_widths(p.tokens.channels, p.out, [&](auto widths) {
    if (p.compute == Dtype::kFloat16)
      body(widths, __half{});
    else
      body(widths, __nv_bfloat16{});
  });
}

template <typename C>
void launch_prepare(const LiftKd& p, int in, int out, const LiftBuffers& buffers,
                    cudaStream_t stream) {
  FASTKD_LAUNCH(prepare<C>, in / kPrepareColumns + 1, kPrepareThreads, stream, p, in, out,
                static_cast<C*>(buffers.packed), buffers.vectors);
}

template <typename C, int In, int Out, bool kGradient>
void launch_lift(const Lift& lift_problem, int blocks, cudaStream_t stream) {
  const bool wide =
      lift_problem.teacher.data != nullptr && lift_problem.teacher.dtype == Dtype::kFloat32;
  const auto kernel = wide ? lift<C, In, Out, kGradient, true> : lift<C, In, Out, kGradient, false>;
  const int bytes = LiftShared<In, Out>::kBytes;
  FASTKD_LAUNCH_SHARED(kernel, blocks, kLiftThreads, bytes, stream, lift_problem);
}

void launch_finish(const LiftKd& p, int in, const LiftBuffers& buffers,
                   const LiftGradients& gradients, float scale, cudaStream_t stream) {
  PartialSumsList list{};
  int count = 0, largest = 0;
  const auto add = [&](const Parameter& result, const float* parts, int number, int64_t stride,
                       int columns) {
    if (result.data == nullptr) return;
    list.items[count++] = {parts, number, stride, p.out, columns, result};
    largest = std::max(largest, p.out * columns);
  };
  add(gradients.weight, buffers.weight_parts, kWeightSplits, int64_t{p.out} * in, in);
  add(gradients.norm_weight, buffers.column_parts, p.blocks, 3 * p.out, 1);
  add(gradients.norm_bias, buffers.column_parts + p.out, p.blocks, 3 * p.out, 1);
  add(gradients.bias, buffers.column_parts + 2 * p.out, p.blocks, 3 * p.out, 1);
  if (count == 0) return;
  const dim3 grid((largest + kLiftThreads - 1) / kLiftThreads, count);
  FASTKD_LAUNCH(finish_gradients, grid, kLiftThreads, stream, list, scale);
}

}  // namespace

bool lift_kd_supports(int in, int out) {
  return with_widths(in, out, [](auto) {});
}

void lift_kd_forward(const LiftKd& p, const LiftBuffers& buffers, float* loss, float* pooled,
                     cudaStream_t stream) {
  with_kernels(p, [&](auto widths, auto compute) {
    using C = decltype(compute);
    constexpr int In = decltype(widths)::In, Out = decltype(widths)::Out;
    launch_prepare<C>(p, In, Out, buffers, stream);
    Lift problem = lift_of(p, buffers);
    problem.loss_parts = p.teacher.data == nullptr ? nullptr : buffers.loss_parts;
    problem.pooled_parts = pooled == nullptr ? nullptr : buffers.pooled_parts;
    launch_lift<C, In, Out, false>(problem, p.blocks, stream);
    if (p.teacher.data != nullptr)
      FASTKD_LAUNCH(finish_sum<kLiftThreads>, 1, kLiftThreads, stream, buffers.loss_parts, p.blocks,
                    mean_scale(p), loss);
    if (pooled != nullptr)
      FASTKD_LAUNCH(finish_pooled, static_cast<unsigned>(p.batch), kLiftThreads, stream,
                    buffers.pooled_parts, problem.slots, p.blocks * kLiftWorkers, problem.tiles,
                    Out, pooled);
  });
}

void lift_kd_gradients(const LiftKd& given, const float* upstream, const float* pooled_upstream,
                       const LiftBuffers& buffers, float* loss, const LiftGradients& gradients,
                       cudaStream_t stream) {
  LiftKd p = given;
  if (upstream == nullptr && loss == nullptr) p.teacher = {};  // nothing comes from its side
  with_kernels(p, [&](auto widths, auto compute) {
    using C = decltype(compute);
    constexpr int In = decltype(widths)::In, Out = decltype(widths)::Out;
    launch_prepare<C>(p, In, Out, buffers, stream);

    const bool with_weight = gradients.weight.data != nullptr;
    Lift problem = lift_of(p, buffers);
    problem.gradient = octet_map(gradients.tokens);
    problem.upstream = upstream;
    problem.pooled_upstream = pooled_upstream;
    problem.pooled_scale = 1.f / (p.height * p.width);
    // Half-precision slopes of an unscaled loss would vanish: their unit is then about one
    // element's share. Whoever hands in an upstream gradient (a GradScaler, say) has chosen the
    // unit.
    problem.result_scale = loss == nullptr ? 1.f : kSlopeUnit * mean_scale(p);
    problem.slope_scale = loss == nullptr ? mean_scale(p) : 1.f / kSlopeUnit;
    problem.loss_parts = loss == nullptr ? nullptr : buffers.loss_parts;
    problem.column_parts = buffers.column_parts;
    problem.sum_norm = gradients.norm_weight.data || gradients.norm_bias.data;
    problem.sum_bias = gradients.bias.data != nullptr;
    problem.slopes = with_weight ? buffers.slopes : nullptr;

    WeightGradient weight{};
    weight.tokens = problem.tokens;
    weight.slots = problem.slots;
    weight.slopes = buffers.slopes;
    weight.weight_parts = buffers.weight_parts;

    const int tiles = problem.tiles;
    const int chunk =
        with_weight ? static_cast<int>(std::min<int64_t>(tiles, buffers.slope_rows / kLiftTileRows))
                    : tiles;
    for (int first = 0; first < tiles; first += chunk) {
      problem.first_tile = first;
      problem.tiles = std::min(chunk, tiles - first);
      problem.accumulate = first > 0;
      launch_lift<C, In, Out, true>(problem, p.blocks, stream);
      if (!with_weight) continue;
      weight.first_row = first * kLiftTileRows;
      weight.rows = problem.tiles * kLiftTileRows;
      weight.accumulate = first > 0;
      const auto kernel = weight_gradient<C, In, Out>;
      const dim3 grid(WeightTile<In, Out>::kCount, kWeightSplits);
      const int bytes = WeightTile<In, Out>::kBytes;
      FASTKD_LAUNCH_SHARED(kernel, grid, kLiftThreads, bytes, stream, weight);
    }

    if (loss != nullptr)
      FASTKD_LAUNCH(finish_sum<kLiftThreads>, 1, kLiftThreads, stream, buffers.loss_parts, p.blocks,
                    mean_scale(p), loss);
    launch_finish(p, In, buffers, gradients, problem.result_scale, stream);
  });
}

}  // namespace fastkd
