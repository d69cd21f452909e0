// feature_kd: mse, spectral, smooth L1 and cosine between student and teacher token maps.
//
//   mse        mean d^2,  d = student - teacher
//   smooth_l1  mean of d^2 / (2 beta) below beta, |d| - beta / 2 above
//   spectral   SpectralKD (arXiv 2412.19055) without an FFT: by Parseval, over half the spectrum,
//              (sum d^2 + sum over half rows (sum d)^2 / length) / (4 B C H (W / 2 + 1)),
//              where a row of even W is two interleaved half rows and one of odd W is a single one
//   cosine     mean over tokens of 1 - cos(student, teacher)
//
// Cut: a line is a run of tokens (a grid row for spectral, else up to kRun tokens) at V
// neighboring channels; one thread walks one line and keeps its row sums in registers, so no
// thread waits for another until the final block sum. Neighboring threads take lines that are
// neighbors in memory. Moves: forward 2 reads of B N C elements; backward 2 reads (spectral
// re-reads its row, a few KB per block, from L1) and 1 write. Shared memory: 32 floats. Nothing of
// size [B, N, C] is allocated.

#include <algorithm>
#include <utility>

#include "common/cosine.cuh"
#include "common/reduce.cuh"
#include "feature_kd.h"

namespace fastkd {
namespace {

#ifdef FASTKD_HOST_SHIM
constexpr int kThreads = 64, kMaxBlocks = 66;  // small: few images reach every loop's second round
#else
constexpr int kThreads = 256;
constexpr int kMaxBlocks = 4096;  // 31 per SM of an H100; beyond it threads take several lines
#endif
constexpr int kBlocksPerSm = 2;  // leaves 128 registers per thread, so that nothing spills
constexpr int kRun = 16;         // tokens in a line where grid rows do not matter
constexpr int kPack = 8;         // channels per thread: 16 bytes of bf16 or fp16

// How tokens are cut into lines: `runs` lines of `length` tokens per image and channel pack.
struct Lines {
  int runs, length, tokens;
  int packs;            // channel packs of the walked map
  bool channels_inner;  // neighboring threads: neighboring channels, or neighboring runs
  int64_t count;
};

struct Line {
  int64_t image;
  int run, channel, length;
};

__device__ Line locate(int64_t index, const Lines& lines, int pack) {
  const int inner_size = lines.channels_inner ? lines.packs : lines.runs;
  const int outer_size = lines.channels_inner ? lines.runs : lines.packs;
  const int inner = static_cast<int>(index % inner_size);
  index /= inner_size;
  const int outer = static_cast<int>(index % outer_size);
  Line line;
  line.image = index / outer_size;
  line.run = lines.channels_inner ? outer : inner;
  line.channel = (lines.channels_inner ? inner : outer) * pack;
  line.length = min(lines.length, lines.tokens - line.run * lines.length);
  return line;
}

// Strides of a map along a line: where a run starts, and the step from token to token.
struct Walk {
  int64_t batch_stride, run_stride, token_stride, channel_stride;
};

// The channels of a wide map that one compared channel averages (adaptive average pooling).
struct Window {
  int start, size;
};

__device__ __forceinline__ Window window_of(int channel, int wide, int narrow) {
  const int start = static_cast<int>(int64_t{channel} * wide / narrow);
  const int end = static_cast<int>((int64_t{channel + 1} * wide + narrow - 1) / narrow);
  return {start, end - start};
}

template <typename T, int K>
struct Reader {
  const T* line;  // first token of the line, channel 0
  Walk walk;
  Window windows[K];

  // Compared channels `channel` .. `channel + K - 1`; past `last` the last one is read again, for
  // the caller to ignore.
  __device__ Reader(const TokenMap& map, const Walk& w, const Line& at, int channel, int last,
                    int channels)
      : walk(w) {
    line = static_cast<const T*>(map.data) + at.image * w.batch_stride + at.run * w.run_stride;
#pragma unroll
    for (int k = 0; k < K; ++k)
      windows[k] = window_of(min(channel + k, last), map.channels, channels);
  }

  __device__ __forceinline__ void read(int token, float (&out)[K]) const {
    const T* source = line + token * walk.token_stride;
    if constexpr (K == kPack) {
      load_pack(source + windows[0].start, out);
    } else {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const T* first = source + windows[k].start * walk.channel_stride;
        float sum = to_float(first[0]);
#pragma unroll 1
        for (int i = 1; i < windows[k].size; ++i) sum += to_float(first[i * walk.channel_stride]);
        out[k] = windows[k].size == 1 ? sum : sum / windows[k].size;
      }
    }
  }
};

struct Cut {
  Lines lines;
  Walk student, teacher, gradient;
};

__device__ __forceinline__ float smooth_l1(float d, float beta) {
  const float size = fabsf(d);
  return size < beta ? 0.5f * d * d / beta : size - 0.5f * beta;
}

// NaN fails every comparison and is handed on.
__device__ __forceinline__ float smooth_l1_slope(float d, float beta) {
  if (fabsf(d) < beta) return d / beta;
  return d > 0.f ? 1.f : d < 0.f ? -1.f : d;
}

// Sums over the two interleaved halves of a row; an odd row counts as one.
template <int K>
struct RowSums {
  float even[K] = {}, odd[K] = {};

  __device__ __forceinline__ void add(int token, const float (&d)[K]) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (token & 1)
        odd[k] += d[k];
      else
        even[k] += d[k];
    }
  }

  __device__ __forceinline__ void merge_if_odd(int width) {
    if (width % 2 == 0) return;
#pragma unroll
    for (int k = 0; k < K; ++k) even[k] = odd[k] = even[k] + odd[k];
  }
};

__device__ __forceinline__ float half_row_length(int width) {
  return width % 2 == 0 ? 0.5f * width : width;
}

template <typename S, typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    difference_forward(FeatureKd p, Cut cut, float* partials) {
  float sum = 0.f;
  for (int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x; index < cut.lines.count;
       index += int64_t{gridDim.x} * kThreads) {
    const Line at = locate(index, cut.lines, V);
    const Reader<S, V> student(p.student, cut.student, at, at.channel, p.channels - 1, p.channels);
    const Reader<T, V> teacher(p.teacher, cut.teacher, at, at.channel, p.channels - 1, p.channels);
    RowSums<V> rows;
#pragma unroll 4
    for (int token = 0; token < at.length; ++token) {
      float s[V], d[V];
      student.read(token, s);
      teacher.read(token, d);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        d[v] = s[v] - d[v];
        sum += p.loss == FeatureLoss::kSmoothL1 ? smooth_l1(d[v], p.beta) : d[v] * d[v];
      }
      if (p.loss == FeatureLoss::kSpectral) rows.add(token, d);
    }
    if (p.loss == FeatureLoss::kSpectral) {
      rows.merge_if_odd(p.width);
      float squares = 0.f;
#pragma unroll
      for (int v = 0; v < V; ++v)
        squares +=
            rows.even[v] * rows.even[v] + (p.width % 2 == 0 ? rows.odd[v] * rows.odd[v] : 0.f);
      sum += squares / half_row_length(p.width);
    }
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Sums over a token's channels, which are scaled by a power of two each.
struct CosineSums {
  float dot = 0.f, student_square = 0.f, teacher_square = 0.f;
};

// The channels of lane `lane`; the caller adds up the lanes.
template <typename S, typename T, int V>
__device__ __forceinline__ CosineSums cosine_sums(const FeatureKd& p, const Cut& cut,
                                                  const Line& at, int offset, int lane, int lanes,
                                                  float student_scale, float teacher_scale) {
  CosineSums sums;
  for (int channel = lane * V; channel < p.channels; channel += lanes * V) {
    float s[V], t[V];
    Reader<S, V>(p.student, cut.student, at, channel, p.channels - 1, p.channels).read(offset, s);
    Reader<T, V>(p.teacher, cut.teacher, at, channel, p.channels - 1, p.channels).read(offset, t);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      s[v] *= student_scale;
      t[v] *= teacher_scale;
      sums.dot += s[v] * t[v];
      sums.student_square += s[v] * s[v];
      sums.teacher_square += t[v] * t[v];
    }
  }
  if (lanes == kWarpSize) {
    sums.dot = warp_sum(sums.dot);
    sums.student_square = warp_sum(sums.student_square);
    sums.teacher_square = warp_sum(sums.teacher_square);
  }
  return sums;
}

// One token per `lanes` threads: a whole warp where channels are neighbors in memory, else one
// thread, so that neighboring threads still read neighboring addresses.
template <typename S, typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    cosine_forward(FeatureKd p, Cut cut, int lanes, float* stats, float* partials) {
  const int lane = threadIdx.x % lanes;
  const int64_t tokens = p.batch * cut.lines.tokens;
  float sum = 0.f;
  // All lanes of a warp have the same token, so that the shuffles stay converged.
  const int64_t step = int64_t{gridDim.x} * kThreads / lanes;
  for (int64_t token = int64_t{blockIdx.x} * kThreads / lanes + threadIdx.x / lanes; token < tokens;
       token += step) {
    Line at;
    at.image = token / cut.lines.tokens;
    const int position = static_cast<int>(token % cut.lines.tokens);
    at.run = position / cut.lines.length;
    const int offset = position % cut.lines.length;
    float student_scale = 1.f, teacher_scale = 1.f;
    CosineSums sums = cosine_sums<S, T, V>(p, cut, at, offset, lane, lanes, 1.f, 1.f);
    if (needs_rescaling(sums.student_square, sums.teacher_square, p.eps)) {
      student_scale = rescaling(sums.student_square);
      teacher_scale = rescaling(sums.teacher_square);
      sums = cosine_sums<S, T, V>(p, cut, at, offset, lane, lanes, student_scale, teacher_scale);
    }
    if (lane != 0) continue;
    const Cosine found = cosine_of(sums.dot, sums.student_square, sums.teacher_square,
                                   student_scale, teacher_scale, p.eps);
    stats[3 * token] = found.cosine;
    stats[3 * token + 1] = found.student_inverse;
    stats[3 * token + 2] = found.teacher_inverse;
    sum += 1.f - found.cosine;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// The gradient of the student; all four losses are symmetric, so the launcher swaps the maps to get
// the teacher's, and `own` says which of the saved inverse norms (1 or 2) belongs to the first map.
// V channels are one pack (nothing pooled) or a single one. A channel of a pooled map lies in up to
// two windows, hence K = 2 compared channels there.
template <typename S, typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gradient(FeatureKd p, Cut cut, float scale, const float* upstream, const float* stats, int own,
             TokenMap out) {
  constexpr int K = V == 1 ? 2 : V;
  const float factor = *upstream * scale;
  const float inverse_length = 1.f / half_row_length(p.width);
  for (int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x; index < cut.lines.count;
       index += int64_t{gridDim.x} * kThreads) {
    const Line at = locate(index, cut.lines, V);
    int first = at.channel, last = at.channel + V - 1;
    if constexpr (V == 1) {
      const Window covering = window_of(at.channel, p.channels, out.channels);
      first = covering.start;
      last = covering.start + covering.size - 1;
    }
    const Reader<S, K> student(p.student, cut.student, at, first, last, p.channels);
    const Reader<T, K> teacher(p.teacher, cut.teacher, at, first, last, p.channels);
    float weight[K];
#pragma unroll
    for (int k = 0; k < K; ++k)
      weight[k] = factor / window_of(min(first + k, last), out.channels, p.channels).size;

    RowSums<K> rows;
    if (p.loss == FeatureLoss::kSpectral) {
#pragma unroll 4
      for (int token = 0; token < at.length; ++token) {
        float s[K], d[K];
        student.read(token, s);
        teacher.read(token, d);
#pragma unroll
        for (int k = 0; k < K; ++k) d[k] = s[k] - d[k];
        rows.add(token, d);
      }
      rows.merge_if_odd(p.width);
    }

    S* target = static_cast<S*>(out.data) + at.image * cut.gradient.batch_stride +
                at.run * cut.gradient.run_stride + at.channel * cut.gradient.channel_stride;
    for (int token = 0; token < at.length; ++token) {
      float s[K], t[K], slope[K];
      student.read(token, s);
      teacher.read(token, t);
      if (p.loss == FeatureLoss::kCosine) {
        const float* stat =
            stats + 3 * (at.image * cut.lines.tokens + at.run * cut.lines.length + token);
        // Unit vectors first: the inverses' product may underflow.
        const float along = stat[0] * stat[own], other = stat[3 - own];
#pragma unroll
        for (int k = 0; k < K; ++k) slope[k] = (along * s[k] - other * t[k]) * stat[own];
      } else {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const float d = s[k] - t[k];
          slope[k] = p.loss == FeatureLoss::kSmoothL1 ? smooth_l1_slope(d, p.beta) : 2.f * d;
          if (p.loss == FeatureLoss::kSpectral)
            slope[k] += 2.f * inverse_length * (token & 1 ? rows.odd[k] : rows.even[k]);
        }
      }
      if constexpr (V == 1) {
        // Adding zero times the repeated window instead would let its NaN through.
        float value = slope[0] * weight[0];
        if (last > first) value += slope[1] * weight[1];
        target[token * cut.gradient.token_stride] = from_float<S>(value);
      } else {
        float values[V];
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = slope[v] * weight[v];
        store_pack(target + token * cut.gradient.token_stride, values);
      }
    }
  }
}

bool collapses(const TokenMap& map, const FeatureKd& p) {
  return p.height == 1 || map.row_stride == p.width * map.column_stride;
}

Walk walk_of(const TokenMap& map, bool by_rows) {
  return {map.batch_stride, by_rows ? map.row_stride : kRun * map.column_stride, map.column_stride,
          map.channel_stride};
}

bool packs(const TokenMap& map, int channels) {
  const auto address = reinterpret_cast<uintptr_t>(map.data);
  return map.channels == channels && channels % kPack == 0 && map.channel_stride == 1 &&
         map.column_stride % kPack == 0 && map.row_stride % kPack == 0 &&
         map.batch_stride % kPack == 0 && address % 16 == 0;
}

Cut cut_lines(const FeatureKd& p, const TokenMap& walked, int pack, const TokenMap* gradient) {
  const bool by_rows = p.loss == FeatureLoss::kSpectral || !collapses(p.student, p) ||
                       !collapses(p.teacher, p) || (gradient && !collapses(*gradient, p));
  Cut cut;
  cut.lines.tokens = p.height * p.width;
  cut.lines.length = by_rows ? p.width : kRun;
  cut.lines.runs = (cut.lines.tokens + cut.lines.length - 1) / cut.lines.length;
  cut.lines.packs = walked.channels / pack;
  cut.lines.channels_inner = walked.channel_stride <= walked.column_stride;
  cut.lines.count = p.batch * cut.lines.runs * cut.lines.packs;
  cut.student = walk_of(p.student, by_rows);
  cut.teacher = walk_of(p.teacher, by_rows);
  if (gradient) cut.gradient = walk_of(*gradient, by_rows);
  return cut;
}

int blocks_for(int64_t threads) {
  return static_cast<int>(std::clamp<int64_t>((threads + kThreads - 1) / kThreads, 1, kMaxBlocks));
}

const TokenMap& narrower(const FeatureKd& p) {
  return p.student.channels <= p.teacher.channels ? p.student : p.teacher;
}

float mean_scale(const FeatureKd& p) {
  const double tokens = static_cast<double>(p.batch) * p.height * p.width;
  if (p.loss == FeatureLoss::kCosine) return static_cast<float>(1.0 / tokens);
  if (p.loss == FeatureLoss::kSpectral)
    return static_cast<float>(1.0 / (4.0 * p.batch * p.channels * p.height * (p.width / 2 + 1)));
  return static_cast<float>(1.0 / (tokens * p.channels));
}

}  // namespace

int64_t feature_kd_scratch(const FeatureKd&) { return kMaxBlocks; }

void feature_kd_forward(const FeatureKd& p, float* scratch, float* stats, float* loss,
                        cudaStream_t stream) {
  const bool packed = packs(p.student, p.channels) && packs(p.teacher, p.channels);
  const Cut cut = cut_lines(p, narrower(p), packed ? kPack : 1, nullptr);
  const int lanes = cut.lines.channels_inner ? kWarpSize : 1;
  const int64_t threads =
      p.loss == FeatureLoss::kCosine ? p.batch * cut.lines.tokens * lanes : cut.lines.count;
  const int blocks = blocks_for(threads);
  with_type(p.student.dtype, [&](auto student) {
    with_type(p.teacher.dtype, [&](auto teacher) {
      using S = decltype(student);
      using T = decltype(teacher);
      if (p.loss == FeatureLoss::kCosine) {
        const auto kernel = packed ? cosine_forward<S, T, kPack> : cosine_forward<S, T, 1>;
        FASTKD_LAUNCH(kernel, blocks, kThreads, stream, p, cut, lanes, stats, scratch);
      } else {
        const auto kernel = packed ? difference_forward<S, T, kPack> : difference_forward<S, T, 1>;
        FASTKD_LAUNCH(kernel, blocks, kThreads, stream, p, cut, scratch);
      }
    });
  });
  FASTKD_LAUNCH(finish_sum<kThreads>, 1, kThreads, stream, scratch, blocks, mean_scale(p), loss);
}

void feature_kd_backward(const FeatureKd& problem, const float* upstream, const float* stats,
                         const TokenMap& out, bool for_teacher, cudaStream_t stream) {
  FeatureKd p = problem;
  if (for_teacher) std::swap(p.student, p.teacher);
  const bool packed =
      packs(p.student, p.channels) && packs(p.teacher, p.channels) && packs(out, p.channels);
  const Cut cut = cut_lines(p, out, packed ? kPack : 1, &out);
  with_type(p.student.dtype, [&](auto student) {
    with_type(p.teacher.dtype, [&](auto teacher) {
      using S = decltype(student);
      using T = decltype(teacher);
      const auto kernel = packed ? gradient<S, T, kPack> : gradient<S, T, 1>;
      FASTKD_LAUNCH(kernel, blocks_for(cut.lines.count), kThreads, stream, p, cut, mean_scale(p),
                    upstream, stats, for_teacher ? 2 : 1, out);
    });
  });
}

}  // namespace fastkd
