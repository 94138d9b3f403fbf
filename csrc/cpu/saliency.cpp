// Stage 1: one pass over the features, in the widest vectors that the processor has.
#include "saliency.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

#define SG_INLINE [[gnu::always_inline]] inline

namespace sg_kernels {
namespace cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Cells summed in one pass over the channels; their sums, 1 KiB, stay in the first-level cache.
constexpr std::int64_t kTile = 256;
// Channels summed before they join the total: two levels round less than one.
constexpr std::int64_t kBlock = 32;

template <class Element, int kLanes>
struct Lanes {
  static constexpr int kBytes = kLanes * sizeof(Element);
  using type [[gnu::vector_size(kBytes)]] = Element;
};

template <int kLanes>
struct Vector {
  using F32 = typename Lanes<float, kLanes>::type;
  using F64 = typename Lanes<double, kLanes>::type;
  using U32 = typename Lanes<std::uint32_t, kLanes>::type;
  using U16 = typename Lanes<std::uint16_t, kLanes>::type;

  F32 lanes;

  template <class To, class T>
  SG_INLINE static To load(const T* x) {
    To to;
    std::memcpy(&to, x, sizeof to);
    return to;
  }

  SG_INLINE static Vector from_bits(U32 bits) { return {reinterpret_cast<F32>(bits)}; }

  // |x| of kLanes contiguous elements.
  SG_INLINE static Vector magnitudes(const float* x) {
    return from_bits(load<U32>(x) & 0x7FFFFFFFu);
  }
  SG_INLINE static Vector magnitudes(const double* x) {
    const F32 rounded = __builtin_convertvector(load<F64>(x), F32);
    return from_bits(reinterpret_cast<U32>(rounded) & 0x7FFFFFFFu);
  }
  SG_INLINE static Vector magnitudes(const BFloat16* x) {
    return from_bits(__builtin_convertvector(load<U16>(x), U32) << 16 & 0x7FFFFFFFu);
  }
  SG_INLINE static Vector magnitudes(const Half* x) {
    const U32 bits = __builtin_convertvector(load<U16>(x), U32) << 13 & (0x7FFFu << 13);
    // The product corrects the exponent's bias and normalizes subnormals, but not infinity or NaN.
    const F32 finite = reinterpret_cast<F32>(bits) * 0x1p112f;
    const F32 special = reinterpret_cast<F32>(bits | 0x7F800000u);
    return {bits >= (0x7C00u << 13) ? special : finite};
  }

  // |x| of `count` <= kLanes elements, `stride` bytes apart, then zeros.
  template <class T>
  SG_INLINE static Vector some_magnitudes(const char* x, std::int64_t count, std::int64_t stride) {
    T buffer[kLanes];
    std::memset(buffer, 0, sizeof buffer);
    for (std::int64_t i = 0; i < count; ++i) std::memcpy(&buffer[i], x + i * stride, sizeof(T));
    return magnitudes(buffer);
  }

  SG_INLINE void operator+=(Vector other) { lanes += other.lanes; }
  SG_INLINE void store(float* to) const { std::memcpy(to, &lanes, sizeof lanes); }

  SG_INLINE float sum() const {
    F32 folded = lanes;
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) folded[i] += folded[i + half];
    return folded[0];
  }
};

// Adds the channels of a tile's vectors, which lie at the given offsets, to `total`. If `vectors`
// is a constant, the sums stay in registers.
template <int kLanes, class T>
SG_INLINE void add_vectors(
    const T* x, std::int64_t channels, std::int64_t stride, const std::int64_t* offset,
    std::int64_t vectors, Vector<kLanes>* total) {
  Vector<kLanes> part[kTile / kLanes];
  for (std::int64_t v = 0; v < vectors; ++v) part[v] = Vector<kLanes>{};
  for (std::int64_t k = 0; k < channels; ++k)
    for (std::int64_t v = 0; v < vectors; ++v)
      part[v] += Vector<kLanes>::magnitudes(x + k * stride + offset[v]);
  for (std::int64_t v = 0; v < vectors; ++v) total[v] += part[v];
}

// Sums up to kTile cells, from `begin`, of a contiguous plane of at least kLanes cells, in the
// order of memory. The plane's last vector overlaps the one before it, so there is no tail.
template <int kLanes, class T>
SG_INLINE void sum_tile(
    const T* x, std::int64_t channels, std::int64_t stride, std::int64_t cells, std::int64_t begin,
    float* out) {
  const std::int64_t vectors = (std::min(kTile, cells - begin) + kLanes - 1) / kLanes;
  std::int64_t offset[kTile / kLanes];
  Vector<kLanes> total[kTile / kLanes];
  for (std::int64_t v = 0; v < vectors; ++v) {
    offset[v] = std::min(begin + v * kLanes, cells - kLanes);
    total[v] = Vector<kLanes>{};
  }
  for (std::int64_t k = 0; k < channels; k += kBlock) {
    const std::int64_t count = std::min(kBlock, channels - k);
    const T* from = x + k * stride;
    switch (vectors) {
      case 1: add_vectors<kLanes>(from, count, stride, offset, 1, total); break;
      case 2: add_vectors<kLanes>(from, count, stride, offset, 2, total); break;
      case 3: add_vectors<kLanes>(from, count, stride, offset, 3, total); break;
      case 4: add_vectors<kLanes>(from, count, stride, offset, 4, total); break;
      case 5: add_vectors<kLanes>(from, count, stride, offset, 5, total); break;
      case 6: add_vectors<kLanes>(from, count, stride, offset, 6, total); break;
      case 7: add_vectors<kLanes>(from, count, stride, offset, 7, total); break;
      case 8: add_vectors<kLanes>(from, count, stride, offset, 8, total); break;
      default: add_vectors<kLanes>(from, count, stride, offset, vectors, total); break;
    }
  }
  for (std::int64_t v = 0; v < vectors; ++v) total[v].store(out + offset[v]);
}

// Sums contiguous planes of fewer than kLanes cells: it takes kLanes channels as one long plane.
template <int kLanes, class T>
SG_INLINE void sum_small(const T* x, std::int64_t channels, std::int64_t cells, float* out) {
  float folded[kLanes * kLanes];
  const std::int64_t slabs = channels / kLanes, done = slabs * kLanes, slab = kLanes * cells;
  for (std::int64_t begin = 0; begin < slab; begin += kTile)
    sum_tile<kLanes>(x, slabs, slab, slab, begin, folded);
  for (std::int64_t cell = 0; cell < cells; ++cell) {
    auto lanes = Vector<kLanes>::template some_magnitudes<T>(
        reinterpret_cast<const char*>(x + done * cells + cell), channels - done, cells * sizeof(T));
    lanes += Vector<kLanes>::template some_magnitudes<float>(
        reinterpret_cast<const char*>(folded + cell), kLanes, cells * sizeof(float));
    out[cell] = lanes.sum();
  }
}

// Sums one pixel whose channels are contiguous.
template <int kLanes, class T>
SG_INLINE float sum_channels(const T* x, std::int64_t channels) {
  constexpr int kChains = 4;  // independent sums, which hide the latency of an addition
  Vector<kLanes> total[kChains] = {};
  std::int64_t k = 0;
  for (; k + kChains * kLanes <= channels; k += kChains * kLanes)
    for (int v = 0; v < kChains; ++v) total[v] += Vector<kLanes>::magnitudes(x + k + v * kLanes);
  for (; k < channels; k += kLanes)
    total[0] += Vector<kLanes>::template some_magnitudes<T>(
        reinterpret_cast<const char*>(x + k), std::min<std::int64_t>(kLanes, channels - k),
        sizeof(T));
  for (int v = 1; v < kChains; ++v) total[0] += total[v];
  return total[0].sum();
}

template <int kLanes, class T>
SG_INLINE float sum_strided(const char* x, std::int64_t channels, std::int64_t stride) {
  Vector<kLanes> total = {};
  for (std::int64_t k = 0; k < channels; k += kLanes)
    total += Vector<kLanes>::template some_magnitudes<T>(
        x + k * stride, std::min<std::int64_t>(kLanes, channels - k), stride);
  return total.sum();
}

enum class Layout { kPlanes, kSmallPlanes, kChannelsLast, kStrided };

Layout layout_of(const Batch& f, std::int64_t element, std::int64_t lanes) {
  const std::int64_t cells = f.height * f.width;
  const bool dense_rows = f.column_stride == element || f.width == 1;
  const bool dense_plane = dense_rows && (f.row_stride == f.width * element || f.height == 1);
  if (dense_plane && cells >= lanes) return Layout::kPlanes;
  if (f.channel_stride == element || f.channels == 1) return Layout::kChannelsLast;
  if (dense_plane && f.channel_stride == cells * element) return Layout::kSmallPlanes;
  return Layout::kStrided;
}

// An item is what one call sums: a tile of a plane, a sample, or a pixel.
std::int64_t items_per_sample(Layout layout, std::int64_t cells) {
  switch (layout) {
    case Layout::kPlanes: return (cells + kTile - 1) / kTile;
    case Layout::kSmallPlanes: return 1;
    default: return cells;
  }
}

template <int kLanes, class T>
SG_INLINE void sum_items(
    const Batch& f, Layout layout, std::int64_t begin, std::int64_t end, float* map) {
  const std::int64_t cells = f.height * f.width, items = items_per_sample(layout, cells);
  const std::int64_t stride = f.channel_stride / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t item = i % items;
    const char* sample = f.data + i / items * f.batch_stride;
    const char* pixel = sample + item / f.width * f.row_stride + item % f.width * f.column_stride;
    const T* x = reinterpret_cast<const T*>(sample);
    float* out = map + i / items * cells;
    switch (layout) {
      case Layout::kPlanes:
        sum_tile<kLanes>(x, f.channels, stride, cells, item * kTile, out);
        break;
      case Layout::kSmallPlanes: sum_small<kLanes>(x, f.channels, cells, out); break;
      case Layout::kChannelsLast:
        out[item] = sum_channels<kLanes>(reinterpret_cast<const T*>(pixel), f.channels);
        break;
      case Layout::kStrided:
        out[item] = sum_strided<kLanes, T>(pixel, f.channels, f.channel_stride);
        break;
    }
  }
}

using Sum = void (*)(const Batch&, Layout, std::int64_t, std::int64_t, float*);

struct Version {
  Sum sum;
  std::int64_t lanes;
};

template <class T>
void sum_baseline(const Batch& f, Layout l, std::int64_t begin, std::int64_t end, float* map) {
  sum_items<4, T>(f, l, begin, end, map);
}

#if defined(__x86_64__) && defined(__GNUC__)
template <class T>
__attribute__((target("arch=x86-64-v3"))) void sum_avx2(
    const Batch& f, Layout l, std::int64_t begin, std::int64_t end, float* map) {
  sum_items<8, T>(f, l, begin, end, map);
}

template <class T>
__attribute__((target("arch=x86-64-v4"))) void sum_avx512(
    const Batch& f, Layout l, std::int64_t begin, std::int64_t end, float* map) {
  sum_items<16, T>(f, l, begin, end, map);
}

template <class T>
Version choose_version() {
  if (__builtin_cpu_supports("x86-64-v4")) return {sum_avx512<T>, 16};
  if (__builtin_cpu_supports("x86-64-v3")) return {sum_avx2<T>, 8};
  return {sum_baseline<T>, 4};
}
#else
template <class T>
Version choose_version() {
  return {sum_baseline<T>, 4};
}
#endif

template <class T>
void channel_saliency(const Batch& features, float* map) {
  static const Version version = choose_version<T>();
  const Layout layout = layout_of(features, sizeof(T), version.lanes);
  const std::int64_t cells = features.height * features.width;
  if (cells == 0) return;
  const std::int64_t items = items_per_sample(layout, cells);
  parallel_for(
      features.batch * items, features.channels * cells / items,
      [&](std::int64_t begin, std::int64_t end) {
        version.sum(features, layout, begin, end, map);
      });
}

}  // namespace

void saliency_map(const Call& call, float* map, const Context& context) {
  if (call.ready)
    std::transform(
        call.saliency, call.saliency + call.images.batch * call.map.cells(), map, checked_saliency);
  else
    sg_kernels::channel_saliency(call.features, call.features_type, map, context);
}

}  // namespace cpu

void channel_saliency(const Batch& features, Float type, float* map, const Context&) {
  dispatch(
      type, [&](auto tag) { cpu::channel_saliency<typename decltype(tag)::type>(features, map); });
}

}  // namespace sg_kernels
