// Stage 1 on the CPU: one pass over the features, in vectors of 16 floats whatever the instruction set.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "kernels.h"

// The loops below are compiled once per instruction set and chosen when the library loads.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SG_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SG_MULTIVERSION
#endif
#define SG_INLINE [[gnu::always_inline]] inline

namespace sg_kernels::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kTile = 4;  // vectors of sums that stay in registers
constexpr std::int64_t kBlock = 32;  // channels summed before they join the total: less rounding

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t U16 __attribute__((vector_size(kLanes * 2)));
typedef double F64 __attribute__((vector_size(kLanes * 8)));

template <class To, class From>
SG_INLINE To load(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

SG_INLINE F32 bits_to_float(U32 bits) { return reinterpret_cast<F32>(bits); }

SG_INLINE F32 magnitudes(const float* x) {
  return bits_to_float(load<U32>(x) & 0x7FFFFFFFu);
}

SG_INLINE F32 magnitudes(const double* x) {
  const F32 rounded = __builtin_convertvector(load<F64>(x), F32);
  return bits_to_float(reinterpret_cast<U32>(rounded) & 0x7FFFFFFFu);
}

SG_INLINE F32 magnitudes(const BFloat16* x) {
  return bits_to_float(__builtin_convertvector(load<U16>(x) & std::uint16_t{0x7FFF}, U32) << 16);
}

SG_INLINE F32 magnitudes(const Half* x) {
  const U32 bits = __builtin_convertvector(load<U16>(x) & std::uint16_t{0x7FFF}, U32) << 13;
  // The product moves the exponent's bias and makes subnormals normal; infinity and NaN it cannot.
  const F32 finite = bits_to_float(bits) * 0x1p112f;
  return bits >= (0x7C00u << 13) ? bits_to_float(bits | 0x7F800000u) : finite;
}

// The first `count` < 16 elements, `stride` apart, and zeros.
template <class T>
SG_INLINE F32 some_magnitudes(const char* x, std::int64_t count, std::int64_t stride) {
  T buffer[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) std::memcpy(&buffer[i], x + i * stride, sizeof(T));
  return magnitudes(buffer);
}

SG_INLINE float sum(F32 lanes) {
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2)
    for (std::int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Sums over channels of kVectors vectors of a plane, at the given offsets.
template <int kVectors, class T>
SG_INLINE void sum_planes(
    const T* x, std::int64_t channels, std::int64_t stride, const std::int64_t* offset, float* out) {
  F32 total[kVectors] = {};
  for (std::int64_t begin = 0; begin < channels; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, channels);
    F32 part[kVectors] = {};
    for (std::int64_t k = begin; k < end; ++k)
      for (int v = 0; v < kVectors; ++v) part[v] += magnitudes(x + k * stride + offset[v]);
    for (int v = 0; v < kVectors; ++v) total[v] += part[v];
  }
  for (int v = 0; v < kVectors; ++v) std::memcpy(out + offset[v], &total[v], sizeof total[v]);
}

// Cells [begin, begin + 64) of a contiguous plane of at least 16 cells. The last vector overlaps the one
// before it rather than leave a tail.
template <class T>
SG_INLINE void sum_tile(
    const T* x, std::int64_t channels, std::int64_t stride, std::int64_t cells, std::int64_t begin,
    float* out) {
  std::int64_t offset[kTile] = {};
  int vectors = 0;
  for (std::int64_t cell = begin; cell < cells && vectors < kTile; cell += kLanes)
    offset[vectors++] = std::min(cell, cells - kLanes);
  switch (vectors) {
    case 1: return sum_planes<1>(x, channels, stride, offset, out);
    case 2: return sum_planes<2>(x, channels, stride, offset, out);
    case 3: return sum_planes<3>(x, channels, stride, offset, out);
    default: return sum_planes<4>(x, channels, stride, offset, out);
  }
}

// A contiguous slab of planes of fewer than 16 cells: 16 channels at a time are one long plane.
template <class T>
SG_INLINE void sum_small(const T* x, std::int64_t channels, std::int64_t cells, float* out) {
  float folded[kLanes * kLanes];
  const std::int64_t whole = channels / kLanes, row = kLanes * cells;
  for (std::int64_t begin = 0; begin < row; begin += kTile * kLanes)
    sum_tile(x, whole, row, row, begin, folded);
  for (std::int64_t cell = 0; cell < cells; ++cell) {
    F32 lanes;
    for (std::int64_t v = 0; v < kLanes; ++v) lanes[v] = folded[v * cells + cell];
    const std::int64_t done = whole * kLanes;
    lanes += some_magnitudes<T>(
        reinterpret_cast<const char*>(x + done * cells + cell), channels - done, cells * sizeof(T));
    out[cell] = sum(lanes);
  }
}

// One pixel whose channels are contiguous.
template <class T>
SG_INLINE float sum_channels(const T* x, std::int64_t channels) {
  F32 total[kTile] = {};
  std::int64_t k = 0;
  for (; k + kTile * kLanes <= channels; k += kTile * kLanes)
    for (int v = 0; v < kTile; ++v) total[v] += magnitudes(x + k + v * kLanes);
  for (; k + kLanes <= channels; k += kLanes) total[0] += magnitudes(x + k);
  total[1] += some_magnitudes<T>(reinterpret_cast<const char*>(x + k), channels - k, sizeof(T));
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <class T>
SG_INLINE float sum_strided(const char* x, std::int64_t channels, std::int64_t stride) {
  F32 total = {};
  for (std::int64_t k = 0; k < channels; k += kLanes)
    total += some_magnitudes<T>(x + k * stride, std::min(kLanes, channels - k), stride);
  return sum(total);
}

enum class Layout { kPlanes, kSmallPlanes, kChannelsLast, kStrided };

template <class T>
Layout layout_of(const Batch& features) {
  const std::int64_t size = sizeof(T), cells = features.height * features.width;
  const bool columns_dense = features.column_stride == size || features.width == 1;
  const bool rows_dense = features.row_stride == features.width * size || features.height == 1;
  const bool plane_dense = columns_dense && rows_dense;
  if (plane_dense && cells >= kLanes) return Layout::kPlanes;
  if (features.channel_stride == size || features.channels == 1) return Layout::kChannelsLast;
  if (plane_dense && features.channel_stride == cells * size) return Layout::kSmallPlanes;
  return Layout::kStrided;
}

std::int64_t items_per_sample(Layout layout, std::int64_t cells) {
  switch (layout) {
    case Layout::kPlanes: return (cells + kTile * kLanes - 1) / (kTile * kLanes);
    case Layout::kSmallPlanes: return 1;
    default: return cells;
  }
}

// Items are tiles of 64 cells, samples, or pixels, as the layout has it.
template <class T>
SG_INLINE void sum_items(
    const Batch& f, Layout layout, std::int64_t begin, std::int64_t end, float* map) {
  const std::int64_t cells = f.height * f.width, items = items_per_sample(layout, cells);
  for (std::int64_t i = begin; i < end; ++i) {
    const char* sample = f.data + i / items * f.batch_stride;
    const T* x = reinterpret_cast<const T*>(sample);
    float* out = map + i / items * cells;
    const std::int64_t item = i % items;
    const char* pixel = sample + item / f.width * f.row_stride + item % f.width * f.column_stride;
    const std::int64_t stride = f.channel_stride / static_cast<std::int64_t>(sizeof(T));
    switch (layout) {
      case Layout::kPlanes:
        sum_tile(x, f.channels, stride, cells, item * kTile * kLanes, out);
        break;
      case Layout::kSmallPlanes:
        sum_small(x, f.channels, cells, out);
        break;
      case Layout::kChannelsLast:
        out[item] = sum_channels(reinterpret_cast<const T*>(pixel), f.channels);
        break;
      case Layout::kStrided:
        out[item] = sum_strided<T>(pixel, f.channels, f.channel_stride);
        break;
    }
  }
}

SG_MULTIVERSION void sum_half(const Batch& f, Layout l, std::int64_t b, std::int64_t e, float* m) {
  sum_items<Half>(f, l, b, e, m);
}
SG_MULTIVERSION void sum_bfloat16(
    const Batch& f, Layout l, std::int64_t b, std::int64_t e, float* m) {
  sum_items<BFloat16>(f, l, b, e, m);
}
SG_MULTIVERSION void sum_float(const Batch& f, Layout l, std::int64_t b, std::int64_t e, float* m) {
  sum_items<float>(f, l, b, e, m);
}
SG_MULTIVERSION void sum_double(const Batch& f, Layout l, std::int64_t b, std::int64_t e, float* m) {
  sum_items<double>(f, l, b, e, m);
}

template <class Sum>
void run(const Batch& features, Layout layout, Sum sum_range, float* map) {
  const std::int64_t cells = features.height * features.width;
  const std::int64_t items = items_per_sample(layout, cells);
  parallel_for(
      features.batch * items, features.channels * cells / std::max<std::int64_t>(1, items),
      [&](std::int64_t begin, std::int64_t end) { sum_range(features, layout, begin, end, map); });
}

}  // namespace

void channel_saliency(const Batch& features, Float type, float* map) {
  switch (type) {
    case Float::kHalf: return run(features, layout_of<Half>(features), sum_half, map);
    case Float::kBFloat16: return run(features, layout_of<BFloat16>(features), sum_bfloat16, map);
    case Float::kFloat: return run(features, layout_of<float>(features), sum_float, map);
    case Float::kDouble: return run(features, layout_of<double>(features), sum_double, map);
  }
}

}  // namespace sg_kernels::cpu
