// One tile of lift_kd, in the registers of two warps: 16 tokens, lifted, compared, differentiated.
// Each warp has half of the outputs; they meet to add up what concerns whole tokens.
#pragma once

#include <cmath>

#include "lift_kd_rows.cuh"

namespace fastkd {

constexpr float kCosineEps = 1e-8f;  // tokens with a smaller norm have no direction
constexpr int kGradientChannels =
    2 * kGroup;  // of the tokens' gradient at a time: one group a warp

// A thread's octets of two rows, g and g + 8, as four mma tiles hold them.
using Octets = float[4][4];

__device__ __forceinline__ float& at(Octets& octets, int row, int channel) {
  return octets[channel / 2][2 * row + channel % 2];
}

// Shared memory of a block, as offsets in bytes.
template <int In, int Out>
struct LiftShared {
  static constexpr int kStride = In + kPadding;  // of W's rows, in elements
  static constexpr int kVectors = Out * kStride * 2;
  static constexpr int kTokenSums = kVectors + 3 * Out * 4;
  static constexpr int kTokenSumFloats = 2 * kLiftTileRows * 3;  // per worker
  static constexpr int kExchange = kTokenSums + 2 * kLiftWorkers * kTokenSumFloats * 4;
  static constexpr int kExchangeVectors = 4 * kWarpSize;  // float4s per warp
  static constexpr int kColumnSums = kExchange + 2 * kLiftWarps * kExchangeVectors * 16;
  static constexpr int kBytes = kColumnSums + kLiftWorkers * 3 * Out * 4;
};

// What a tile needs to know, the same for all.
struct Lift {
  OctetMap tokens, teacher, gradient;  // without data: not there, or not wanted
  Slots slots;
  int first_tile, tiles;
  FeatureLoss loss;
  bool norm;
  float beta, inverse_beta, eps;
  const void* packed;    // [Out, In]
  const float* vectors;  // [3, Out]
  const float *upstream, *pooled_upstream;
  // Slopes are kept in units of result_scale.
  float slope_scale, pooled_scale, result_scale;
  float half_row_share;  // spectral: one over the tokens of half a grid row, or of an odd one
  float *loss_parts, *pooled_parts, *column_parts;
  bool sum_norm, sum_bias;  // which columns' sums are wanted
  void* slopes;
  bool accumulate;  // onto the parts of the chunk before
};

// Lane 4 g + q of the warp that has the worker's first or second half of the outputs.
struct Place {
  int worker, half, lane, g, q;

  // The shuffle tells the compiler that all lanes have the same warp: nothing on it diverges.
  __device__ Place()
      : Place(__shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpSize, 0)) {}

  __device__ explicit Place(int warp)
      : worker(warp / 2), half(warp % 2), lane(threadIdx.x % kWarpSize), g(lane / 4), q(lane % 4) {}
};

// Two warps that wait for each other between writing and reading. Their buffers alternate: who
// writes again has seen the other one through with reading what was written before the last.
struct Meeting {
  int phase = 0;

  __device__ __forceinline__ void wait(const Place& place) {
    sync_some(1 + place.worker, 2 * kWarpSize);
    phase ^= 1;
  }
};

// Sums of an octet over the eight lanes with the same q; lane g is left with channel g's.
__device__ __forceinline__ float column_sum(float (&octet)[kOctet], int g) {
#pragma unroll
  for (int size = kOctet / 2; size > 0; size /= 2) {
    const bool upper = g & size;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const float kept = upper ? octet[i + size] : octet[i];
      const float sent = upper ? octet[i] : octet[i + size];
      octet[i] = kept + __shfl_xor_sync(kFullWarp, sent, 4 * size);
    }
  }
  return octet[0];
}

// `inverse` is 1 / beta, infinite where the parabola has no width.
__device__ __forceinline__ float smooth_l1(float d, float beta, float inverse) {
  const float size = fabsf(d);
  return size < beta ? 0.5f * d * d * inverse : size - 0.5f * beta;
}

// NaN fails every comparison and is handed on.
__device__ __forceinline__ float smooth_l1_slope(float d, float beta, float inverse) {
  if (fabsf(d) < beta) return d * inverse;
  return d > 0.f ? 1.f : d < 0.f ? -1.f : d;
}

// Adds to differences their means over half rows (feature_kd.cu): the spectral loss is the sum of
// d (d + mean), and its slope 2 (d + mean). A grid row is all 16 rows of a tile, or 8 of them; of
// an odd one, neighboring columns are of the same half row, too.
template <bool kWholeTile, bool kOdd>
__device__ __forceinline__ void add_means(Octets& d, float share, const bool (&filled)[2]) {
#pragma unroll
  for (int channel = 0; channel < kOctet; ++channel) {
    float sums[2] = {at(d, 0, channel), at(d, 1, channel)};
    if (kWholeTile) sums[0] += sums[1];
#pragma unroll
    for (int row = 0; row < (kWholeTile ? 1 : 2); ++row)
#pragma unroll
      for (int lanes = kOdd ? 4 : 8; lanes < kWarpSize; lanes *= 2)
        sums[row] += __shfl_xor_sync(kFullWarp, sums[row], lanes);
    if (filled[0]) at(d, 0, channel) += sums[0] * share;
    if (filled[1]) at(d, 1, channel) += sums[kWholeTile ? 0 : 1] * share;
  }
}

__device__ __forceinline__ void add_half_row_means(Octets& d, const Lift& p,
                                                   const bool (&filled)[2]) {
  const bool whole_tile = p.slots.pitch == kLiftTileRows;
  if (p.slots.width % 2 == 0)
    whole_tile ? add_means<true, false>(d, p.half_row_share, filled)
               : add_means<false, false>(d, p.half_row_share, filled);
  else
    whole_tile ? add_means<true, true>(d, p.half_row_share, filled)
               : add_means<false, true>(d, p.half_row_share, filled);
}

// Two rows of tokens as the left factors of In / 16 products.
template <typename C, int In>
struct TokenFactors {
  uint32_t steps[In / 16][4];

  __device__ __forceinline__ void fetch(const Lift& p, int tile, const Place& place) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Slot slot = slot_at(p.slots, tile * kLiftTileRows + 8 * row + place.g);
      const int64_t offset = slot.filled ? offset_of(p.tokens, slot, kOctet * place.q) : 0;
      typed(p.tokens, offset, [&](const auto* source) { fetch_row(source, p.tokens, row); });
      if (slot.filled) continue;
#pragma unroll
      for (int step = 0; step < In / 16; ++step) steps[step][row] = steps[step][2 + row] = 0;
    }
  }

 private:
  // All loads before the first conversion: they have one latency together.
  template <typename T>
  __device__ __forceinline__ void fetch_row(const T* source, const OctetMap& map, int row) {
    if (map.packed) {
      Pack<T, kOctet> octets[In / kGroup];
#pragma unroll
      for (int group = 0; group < In / kGroup; ++group)
        octets[group] = *reinterpret_cast<const Pack<T, kOctet>*>(source + group * kGroup);
#pragma unroll
      for (int group = 0; group < In / kGroup; ++group)
        put(operand_octet<C>(octets[group].values), group, row);
    } else {
#pragma unroll
      for (int group = 0; group < In / kGroup; ++group)
        put(operand_octet<C>(source + group * kGroup * map.channel_stride, map.channel_stride),
            group, row);
    }
  }

  __device__ __forceinline__ void put(const uint4& octet, int group, int row) {
    steps[2 * group][row] = octet.x;
    steps[2 * group][2 + row] = octet.y;
    steps[2 * group + 1][row] = octet.z;
    steps[2 * group + 1][2 + row] = octet.w;
  }
};

// Two rows of the teacher's tokens; of empty slots, some other token's. Fetched early and kept, if
// they are of 16 bits.
template <bool kWide, int kGroups>
struct TeacherRows {
  uint4 kept[2][kGroups];

  __device__ __forceinline__ void fetch(const OctetMap& map, const Slot& slot, int row,
                                        int channel) {
    const int64_t offset = slot.filled ? offset_of(map, slot, channel) : 0;
    const uint16_t* source = static_cast<const uint16_t*>(map.data) + offset;
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      kept[row][group] = bits(source + group * kGroup * map.channel_stride, map);
  }

  __device__ __forceinline__ void read(const OctetMap& map, int row, int group,
                                       float (&out)[kOctet]) {
    const uint4& octet = kept[row][group];
    const uint32_t words[4] = {octet.x, octet.y, octet.z, octet.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = map.dtype == Dtype::kFloat16 ? unpack_pair<__half>(words[i])
                                                       : unpack_pair<__nv_bfloat16>(words[i]);
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  }

 private:
  static __device__ __forceinline__ uint4 bits(const uint16_t* octet, const OctetMap& map) {
    if (map.packed) return *reinterpret_cast<const uint4*>(octet);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = octet[2 * i * map.channel_stride] |
                 uint32_t{octet[(2 * i + 1) * map.channel_stride]} << 16;
    return {words[0], words[1], words[2], words[3]};
  }
};

// Floats would take too many registers: those of a few groups are under way at a time, in a ring. A
// whole pass of reads, in order, leaves it as it was before.
template <int kGroups>
struct TeacherRows<true, kGroups> {
  static constexpr int kAhead = kGroups < 3 ? kGroups : 3;
  static_assert(kGroups % kAhead == 0);  // or the ring would meet its start at another place
  float ring[2][kAhead][kOctet];
  const float* rows[2];

  __device__ __forceinline__ void fetch(const OctetMap& map, const Slot& slot, int row,
                                        int channel) {
    const int64_t offset = slot.filled ? offset_of(map, slot, channel) : 0;
    rows[row] = static_cast<const float*>(map.data) + offset;
#pragma unroll
    for (int group = 0; group < kAhead; ++group) fetch_group(map, row, group);
  }

  __device__ __forceinline__ void read(const OctetMap& map, int row, int group,
                                       float (&out)[kOctet]) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) out[i] = ring[row][group % kAhead][i];
    fetch_group(map, row, (group + kAhead) % kGroups);
  }

 private:
  __device__ __forceinline__ void fetch_group(const OctetMap& map, int row, int group) {
    read_octet(rows[row] + group * kGroup * map.channel_stride, map, ring[row][group % kAhead]);
  }
};

template <typename C, int In, int Out, bool kWide>
struct LiftTile {
  static constexpr int kGroups = Out / 2 / kGroup;
  using Shared = LiftShared<In, Out>;

  const Lift& p;
  const Place& place;
  Meeting& meeting;
  unsigned char* memory;

  int index;
  int image[2];
  bool filled[2];
  // y; normalized, if there is a norm; and in place of them their gradients.
  Octets y[kGroups];
  TeacherRows<kWide, kGroups> teacher;
  uint32_t normalized[kGroups][4][2];  // what the norm's backward needs of y, in half precision
  float inverse_deviation[2];
  float along[2], across[2];  // cosine's slope is along s - across t

  __device__ __forceinline__ int channel(int group) const {
    return place.half * (Out / 2) + kGroup * group + kOctet * place.q;
  }

  __device__ __forceinline__ const C* weight() const {
    return reinterpret_cast<const C*>(memory) + place.half * (Out / 2) * Shared::kStride;
  }

  // Bias (0), norm weight (1) or norm bias (2) of a group's octet.
  __device__ __forceinline__ void read_vector(int which, int group, float (&out)[kOctet]) const {
    const float* vectors = reinterpret_cast<const float*>(memory + Shared::kVectors);
    load_pack(vectors + which * Out + channel(group), out);
  }

  __device__ __forceinline__ void read_teacher(int row, int group, float (&out)[kOctet]) {
    teacher.read(p.teacher, row, group, out);
  }

  // Sums over whole tokens, K for each of the thread's rows, as all threads of a row get them.
  template <int K>
  __device__ __forceinline__ void sum_over_tokens(float (&sums)[2][K]) {
    float* buffer = reinterpret_cast<float*>(memory + Shared::kTokenSums) +
                    (meeting.phase * kLiftWorkers + place.worker) * Shared::kTokenSumFloats;
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int k = 0; k < K; ++k) {
        float& sum = sums[row][k];
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        if (place.q == 0) buffer[(2 * k + place.half) * kLiftTileRows + 8 * row + place.g] = sum;
      }
    meeting.wait(place);
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int k = 0; k < K; ++k)
        sums[row][k] += buffer[(2 * k + 1 - place.half) * kLiftTileRows + 8 * row + place.g];
  }

  __device__ __forceinline__ Slot slot(int row) const {
    return slot_at(p.slots, index * kLiftTileRows + 8 * row + place.g);
  }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Slot at_row = slot(row);
      image[row] = at_row.image;
      filled[row] = at_row.filled;
      if (p.teacher.data != nullptr) teacher.fetch(p.teacher, at_row, row, channel(0));
    }
  }

  // y = W x + b
  __device__ __forceinline__ void project(const TokenFactors<C, In>& tokens) {
    __syncwarp();
    const int matrix = place.lane / 8;
    const C* mine =
        weight() + (8 * (matrix / 2) + place.lane % 8) * Shared::kStride + 8 * (matrix % 2);
#pragma unroll
    for (int i = 0; i < kGroups * 16; ++i) y[i / 16][i / 4 % 4][i % 4] = 0.f;
#pragma unroll
    for (int step = 0; step < In / 16; ++step)
#pragma unroll
      for (int tile = 0; tile < 4 * kGroups; tile += 2) {
        uint32_t b[4];
        load_matrices<false>(b, mine + 8 * tile * Shared::kStride + 16 * step);
        mma<C>(y[tile / 4][tile % 4], tokens.steps[step], b[0], b[1]);
        mma<C>(y[tile / 4][tile % 4 + 1], tokens.steps[step], b[2], b[3]);
      }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float bias[kOctet];
      read_vector(0, group, bias);
#pragma unroll
      for (int i = 0; i < 2 * kOctet; ++i) at(y[group], i / kOctet, i % kOctet) += bias[i % kOctet];
    }
  }

  // W is centered, and so is y: its variance is its mean square. Empty slots become zero.
  __device__ __forceinline__ void normalize() {
    float squares[2][1] = {};
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int i = 0; i < 2 * kOctet; ++i) {
        const float x = at(y[group], i / kOctet, i % kOctet);
        squares[i / kOctet][0] += x * x;
      }
    sum_over_tokens(squares);
#pragma unroll
    for (int row = 0; row < 2; ++row)
      inverse_deviation[row] = filled[row] ? rsqrtf(squares[row][0] * (1.f / Out) + p.eps) : 0.f;
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int i = 0; i < 2 * kOctet; ++i)
        at(y[group], i / kOctet, i % kOctet) *= inverse_deviation[i / kOctet];
  }

  __device__ __forceinline__ void lifted(int group, Octets& out) {
    float norm_weight[kOctet], norm_bias[kOctet];
    read_vector(1, group, norm_weight);
    read_vector(2, group, norm_bias);
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int i = 0; i < kOctet; ++i)
        at(out, row, i) = at(y[group], row, i) * norm_weight[i] + norm_bias[i];
  }

  // Of one image, by the lanes as `column_sum` leaves them.
  __device__ __forceinline__ void add_lifted(int wanted, float (&sums)[kGroups]) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      Octets s;
      lifted(group, s);
      float octet[kOctet] = {};
#pragma unroll
      for (int row = 0; row < 2; ++row)
#pragma unroll
        for (int i = 0; i < kOctet; ++i)
          if (filled[row] && image[row] == wanted) octet[i] += at(s, row, i);
      sums[group] += column_sum(octet, place.g);
    }
  }

  // The cosine loss of the tile's tokens, in one thread each; and what its slope takes.
  __device__ __forceinline__ float cosine_loss(float factor) {
    float sums[2][3] = {};  // s t, s s, t t
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      Octets s;
      lifted(group, s);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float t[kOctet];
        read_teacher(row, group, t);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
          const float x = at(s, row, i);
          sums[row][0] += x * t[i];
          sums[row][1] += x * x;
          sums[row][2] += t[i] * t[i];
        }
      }
    }
    sum_over_tokens(sums);
    float value = 0.f;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float student_norm = sqrtf(sums[row][1]), teacher_norm = sqrtf(sums[row][2]);
      // A NaN shows, also beside a token of zeros.
      const bool is_short = student_norm < kCosineEps || teacher_norm < kCosineEps;
      const bool directed = filled[row] && !(is_short && sums[row][0] == sums[row][0]);
      // Squares that float32 does not hold: a second walk with scaled tokens would spill.
      const float one = student_norm + teacher_norm < INFINITY ? 1.f : NAN;
      const float student_inverse = directed ? one / student_norm : 0.f;
      across[row] = directed ? student_inverse / teacher_norm : 0.f;
      const float cosine = directed ? sums[row][0] * across[row] : 0.f;
      along[row] = factor * cosine * student_inverse * student_inverse;
      across[row] *= factor;
      if (filled[row] && place.half == 0 && place.q == 0) value += 1.f - cosine;
    }
    return value;
  }

  // Lifted octets become their slopes, in multiples of `factor`; returns the loss (cosine's apart).
  __device__ __forceinline__ float compare(int group, float factor, Octets& s) {
    float d[2][kOctet];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      read_teacher(row, group, d[row]);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        float& x = at(s, row, i);
        if (p.loss == FeatureLoss::kCosine)
          x = filled[row] ? along[row] * x - across[row] * d[row][i] : 0.f;
        else
          x = d[row][i] = filled[row] ? x - d[row][i] : 0.f;
      }
    }
    float value = 0.f;
    if (p.loss == FeatureLoss::kCosine) return value;
    if (p.loss == FeatureLoss::kSmoothL1) {
#pragma unroll
      for (int i = 0; i < 2 * kOctet; ++i) {
        float& x = at(s, i / kOctet, i % kOctet);
        value += smooth_l1(x, p.beta, p.inverse_beta);
        x = factor * smooth_l1_slope(x, p.beta, p.inverse_beta);
      }
      return value;
    }
    if (p.loss == FeatureLoss::kSpectral) add_half_row_means(s, p, filled);
#pragma unroll
    for (int i = 0; i < 2 * kOctet; ++i) {
      float& x = at(s, i / kOctet, i % kOctet);
      value += d[i / kOctet][i % kOctet] * x;
      x *= 2.f * factor;
    }
    return value;
  }

  __device__ __forceinline__ float loss(float factor) {
    if (p.loss == FeatureLoss::kCosine) return cosine_loss(factor);
    float value = 0.f;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      Octets s;
      lifted(group, s);
      value += compare(group, factor, s);
    }
    return value;
  }

  // y becomes the gradient for y; returns the loss.
  __device__ __forceinline__ float differentiate(float factor) {
    float value = 0.f;
    if (p.teacher.data != nullptr && p.loss == FeatureLoss::kCosine) value = cosine_loss(factor);
    float sums[2][2] = {};  // over a token: slopes for the normalized y, and their products with it
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      Octets slope = {};
      if (p.teacher.data != nullptr) {
        lifted(group, slope);
        value += compare(group, factor, slope);
      }
      if (p.pooled_upstream != nullptr) add_pooled_slope(group, slope);
      if (p.norm && p.sum_norm) add_norm_sums(group, slope);
      pass_norm_weight(group, slope, sums);
    }
    if (p.norm) pass_norm(sums);
    if (p.sum_bias) add_bias_sums();
    return value;
  }

  __device__ __forceinline__ void add_pooled_slope(int group, Octets& slope) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (!filled[row]) continue;
      float share[kOctet];
      load_pack(p.pooled_upstream + int64_t{image[row]} * Out + channel(group), share);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) at(slope, row, i) += p.pooled_scale * share[i];
    }
  }

  // The worker's sums of gradients of norm weight (0), norm bias (1) and bias (2): each lane adds
  // to its own channel.
  __device__ __forceinline__ void add_column_sum(int which, int group, float (&octet)[kOctet]) {
    float* sums = reinterpret_cast<float*>(memory + Shared::kColumnSums);
    sums[(3 * place.worker + which) * Out + channel(group) + place.g] += column_sum(octet, place.g);
  }

  __device__ __forceinline__ void add_norm_sums(int group, Octets& slope) {
    float octet[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      octet[i] = at(slope, 0, i) * at(y[group], 0, i) + at(slope, 1, i) * at(y[group], 1, i);
    add_column_sum(0, group, octet);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) octet[i] = at(slope, 0, i) + at(slope, 1, i);
    add_column_sum(1, group, octet);
  }

  __device__ __forceinline__ void add_bias_sums() {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float octet[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) octet[i] = at(y[group], 0, i) + at(y[group], 1, i);
      add_column_sum(2, group, octet);
    }
  }

  __device__ __forceinline__ void pass_norm_weight(int group, Octets& slope, float (&sums)[2][2]) {
    float norm_weight[kOctet];
    read_vector(1, group, norm_weight);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& low = y[group][pair][2 * row];
        float& high = y[group][pair][2 * row + 1];
        const float low_slope = slope[pair][2 * row] * norm_weight[2 * pair];
        const float high_slope = slope[pair][2 * row + 1] * norm_weight[2 * pair + 1];
        normalized[group][pair][row] = pack_pair<C>(low, high);
        sums[row][0] += low_slope + high_slope;
        sums[row][1] += low_slope * low + high_slope * high;
        low = low_slope;
        high = high_slope;
      }
  }

  __device__ __forceinline__ void pass_norm(float (&sums)[2][2]) {
    sum_over_tokens(sums);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float mean = sums[row][0] * (1.f / Out), along_y = sums[row][1] * (1.f / Out);
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const float2 z = unpack_pair<C>(normalized[group][pair][row]);
          float& low = y[group][pair][2 * row];
          float& high = y[group][pair][2 * row + 1];
          low = inverse_deviation[row] * (low - mean - along_y * z.x);
          high = inverse_deviation[row] * (high - mean - along_y * z.y);
        }
    }
  }

  // y's gradient as the left factors of Out / 2 / 16 products.
  __device__ __forceinline__ void pack(uint32_t (&slopes)[2 * kGroups][4]) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int pair = 0; pair < 4; ++pair)
#pragma unroll
        for (int row = 0; row < 2; ++row)
          slopes[2 * group + pair / 2][2 * (pair % 2) + row] =
              pack_pair<C>(y[group][pair][2 * row], y[group][pair][2 * row + 1]);
  }

  __device__ __forceinline__ void write_slopes(const uint32_t (&slopes)[2 * kGroups][4]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int64_t first =
          (int64_t{index - p.first_tile} * kLiftTileRows + 8 * row + place.g) * Out;
      C* target = static_cast<C*>(p.slopes) + first + channel(0);
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
        *reinterpret_cast<uint4*>(target + kGroup * group) = {
            slopes[2 * group][row], slopes[2 * group][2 + row], slopes[2 * group + 1][row],
            slopes[2 * group + 1][2 + row]};
    }
  }

  // Slopes times W. Each warp sums over its half of the outputs; a group of channels at a time is
  // its own to finish, with what the other warp has for it, and one the other's.
  __device__ __forceinline__ void write_gradient(const uint32_t (&slopes)[2 * kGroups][4]) {
    const int matrix = place.lane / 8;
    const C* mine =
        weight() + (8 * (matrix % 2) + place.lane % 8) * Shared::kStride + 8 * (matrix / 2);
#pragma unroll 1
    for (int first = 0; first < In; first += kGradientChannels) {
      __syncwarp();  // lanes without a token were ahead
      const int own = first + kGroup * place.half, other = first + kGroup * (1 - place.half);
      Octets sums[2] = {};
#pragma unroll
      for (int step = 0; step < 2 * kGroups; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t b[4];
          load_matrices<true>(
              b, mine + 16 * step * Shared::kStride + (i < 2 ? own : other) + 16 * (i % 2));
          mma<C>(sums[i / 2][2 * (i % 2)], slopes[step], b[0], b[1]);
          mma<C>(sums[i / 2][2 * (i % 2) + 1], slopes[step], b[2], b[3]);
        }
      add_others(sums[0], sums[1]);
      if (own >= In) continue;  // with an odd number of groups, the last is the first warp's
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (!filled[row]) continue;
        float octet[kOctet];
#pragma unroll
        for (int i = 0; i < kOctet; ++i) octet[i] = p.result_scale * at(sums[0], row, i);
        typed(p.gradient, offset_of(p.gradient, slot(row), own + kOctet * place.q),
              [&](auto* target) { write_octet(target, p.gradient, octet); });
      }
    }
  }

  // Both warps hold their mma tiles in the same lanes, so they pass registers on as they are.
  __device__ __forceinline__ void add_others(Octets& own, const Octets& others) {
    const int warp = 2 * place.worker + place.half;
    float4* buffer = reinterpret_cast<float4*>(memory + Shared::kExchange) +
                     meeting.phase * kLiftWarps * Shared::kExchangeVectors + place.lane;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      buffer[warp * Shared::kExchangeVectors + i * kWarpSize] = {others[i][0], others[i][1],
                                                                 others[i][2], others[i][3]};
    meeting.wait(place);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 more = buffer[(warp ^ 1) * Shared::kExchangeVectors + i * kWarpSize];
      own[i][0] += more.x;
      own[i][1] += more.y;
      own[i][2] += more.z;
      own[i][3] += more.w;
    }
  }
};

}  // namespace fastkd
