// Stages 2 to 8 on the CPU.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace sg_kernels::cpu {
namespace {

// Neighbouring pixels of a line that come from one image.
struct Run {
  std::int64_t begin, end;
  bool own;
};

// The runs of every line in one row of cells.
void find_runs(const bool* cells, std::int64_t count, std::int64_t width, std::vector<Run>& runs) {
  runs.clear();
  for (std::int64_t cell = 0; cell < count; ++cell) {
    const std::int64_t end = first_pixel(cell + 1, width, count);
    if (!runs.empty() && runs.back().own == cells[cell])
      runs.back().end = end;
    else
      runs.push_back({first_pixel(cell, width, count), end, cells[cell]});
  }
}

// A batch seen as lines of pixels. Where the channels of a pixel lie together in every batch concerned,
// they are one pixel of one channel.
struct Lines {
  std::int64_t channels, height, width, pixel;  // pixel in bytes
  bool dense;                                   // pixels of a line lie side by side
};

Lines lines_of(std::int64_t element_size, const Batch& from, const Batch& to) {
  const auto side_by_side = [&](std::int64_t pixel) {
    return from.width == 1 || (from.column_stride == pixel && to.column_stride == pixel);
  };
  const std::int64_t whole = from.channels * element_size;
  const bool together = from.channel_stride == element_size && to.channel_stride == element_size;
  if (together && side_by_side(whole)) return {1, from.height, from.width, whole, true};
  return {from.channels, from.height, from.width, element_size, side_by_side(element_size)};
}

constexpr std::int64_t kStreamWidth = 16;

// Whether an output is written past the caches: from a size on they could not hold it until it is read,
// and memory that is overwritten whole need not be fetched first. That holds only while no ordinary
// store touches the same cache line, so every run must begin and end on a streamed store's boundary.
bool is_streamed(
    const Lines& lines, const Batch& out, Grid grid, [[maybe_unused]] std::int64_t element_size) {
#ifdef __SSE2__
  constexpr std::int64_t kStreamedBytes = 16 << 20;
  const std::int64_t bytes = out.batch * out.channels * out.height * out.width * element_size;
  if (!lines.dense || bytes < kStreamedBytes) return false;
  std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(out.data);
  bits |= static_cast<std::uintptr_t>(out.batch_stride | out.row_stride);
  if (lines.channels > 1) bits |= static_cast<std::uintptr_t>(out.channel_stride);
  for (std::int64_t cell = 1; cell <= grid.width; ++cell)
    bits |= static_cast<std::uintptr_t>(first_pixel(cell, lines.width, grid.width) * lines.pixel);
  return bits % kStreamWidth == 0;
#else
  return false;
#endif
}

void copy_bytes(char* to, const char* from, std::int64_t bytes, [[maybe_unused]] bool stream) {
#ifdef __SSE2__
  if (stream) {
    for (std::int64_t i = 0; i < bytes; i += kStreamWidth)
      _mm_stream_si128(
          reinterpret_cast<__m128i*>(to + i),
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

void finish_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

template <std::int64_t kPixel>
void copy_strided(
    char* to, std::int64_t to_stride, const char* from, std::int64_t from_stride, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i)
    std::memcpy(to + i * to_stride, from + i * from_stride, kPixel);
}

void copy_pixels(
    std::int64_t pixel, char* to, std::int64_t to_stride, const char* from,
    std::int64_t from_stride, std::int64_t count) {
  switch (pixel) {
    case 1: return copy_strided<1>(to, to_stride, from, from_stride, count);
    case 2: return copy_strided<2>(to, to_stride, from, from_stride, count);
    case 4: return copy_strided<4>(to, to_stride, from, from_stride, count);
    case 8: return copy_strided<8>(to, to_stride, from, from_stride, count);
    default: return copy_strided<16>(to, to_stride, from, from_stride, count);
  }
}

// One row of cells of one image: every line in it has the same runs.
void graft_band(
    const Lines& lines, bool stream, const Batch& out, char* to, const Batch& images,
    const char* own, const char* other, std::int64_t begin, std::int64_t end,
    const std::vector<Run>& runs) {
  const std::int64_t line = lines.width * lines.pixel;
  const bool one_block = runs.size() == 1 && lines.dense && out.row_stride == line &&
      images.row_stride == line;
  for (std::int64_t c = 0; c < lines.channels; ++c) {
    const std::int64_t from_plane = c * images.channel_stride;
    char* to_plane = to + c * out.channel_stride;
    if (one_block) {
      const char* from = (runs[0].own ? own : other) + from_plane + begin * line;
      copy_bytes(to_plane + begin * line, from, (end - begin) * line, stream);
      continue;
    }
    for (std::int64_t y = begin; y < end; ++y) {
      const std::int64_t from_line = from_plane + y * images.row_stride;
      char* to_line = to_plane + y * out.row_stride;
      for (const Run& run : runs) {
        const char* from = (run.own ? own : other) + from_line + run.begin * images.column_stride;
        char* target = to_line + run.begin * out.column_stride;
        const std::int64_t count = run.end - run.begin;
        if (lines.dense)
          copy_bytes(target, from, count * lines.pixel, stream);
        else
          copy_pixels(
              lines.pixel, target, out.column_stride, from, images.column_stride, count);
      }
    }
  }
}

// The rows in an order in which a row's destination is the next row's source: the processor has then
// fetched half of that image, and prefetched much of the rest.
std::vector<std::int64_t> along_cycles(
    const std::int64_t* index, std::int64_t batch, std::int64_t rows) {
  std::vector<std::int64_t> order;
  order.reserve(rows);
  std::vector<bool> seen(rows);
  for (std::int64_t start = 0; start < rows; ++start)
    for (std::int64_t r = start; !seen[r]; r = r / batch * batch + index[r]) {
      seen[r] = true;
      order.push_back(r);
      if (!in_range(index[r], batch)) break;
    }
  return order;
}

struct Contribution {
  std::int64_t row;
  bool own;
};

// For each image, the rows whose gradient it receives: its own, then those it is the destination of.
std::vector<std::vector<Contribution>> contributions(
    const std::int64_t* index, std::int64_t batch, std::int64_t rows) {
  std::vector<std::vector<Contribution>> lists(batch);
  for (std::int64_t r = 0; r < rows; ++r) lists[r % batch].push_back({r, true});
  for (std::int64_t r = 0; r < rows; ++r)
    lists[in_range(index[r], batch) ? index[r] : r % batch].push_back({r, false});
  return lists;
}

// Sums in Sum, in the order of the list, and rounds once.
template <class T, class Sum>
void sum_contributions(
    const Batch& grad, const bool* mask, Grid grid, const std::int64_t* index, const Batch& out) {
  const auto lists = contributions(index, out.batch, grad.batch);
  const Lines lines = lines_of(sizeof(T), grad, out);
  const std::int64_t per_pixel = lines.pixel / sizeof(T);
  const std::int64_t from_stride = lines.dense ? lines.pixel : grad.column_stride;
  const std::int64_t to_stride = lines.dense ? lines.pixel : out.column_stride;
  const auto element = [](auto* line, std::int64_t stride, std::int64_t x, std::int64_t i) {
    return line + x * stride + i * static_cast<std::int64_t>(sizeof(T));
  };
  const auto sum_bands = [&](std::int64_t first, std::int64_t last) {
    std::vector<Sum> sums(lines.width * per_pixel);
    std::vector<std::vector<Run>> runs;
    for (std::int64_t unit = first; unit < last; ++unit) {
      const std::int64_t b = unit / grid.height, band = unit % grid.height;
      const auto& list = lists[b];
      runs.resize(std::max(runs.size(), list.size()));
      for (std::size_t i = 0; i < list.size(); ++i)
        find_runs(
            mask + list[i].row * grid.cells() + band * grid.width, grid.width, lines.width, runs[i]);
      const std::int64_t begin = first_pixel(band, lines.height, grid.height);
      const std::int64_t end = first_pixel(band + 1, lines.height, grid.height);
      for (std::int64_t c = 0; c < lines.channels; ++c)
        for (std::int64_t y = begin; y < end; ++y) {
          std::fill(sums.begin(), sums.end(), Sum{0});
          for (std::size_t i = 0; i < list.size(); ++i) {
            const char* from = grad.data + list[i].row * grad.batch_stride +
                c * grad.channel_stride + y * grad.row_stride;
            for (const Run& run : runs[i]) {
              if (run.own != list[i].own) continue;
              for (std::int64_t x = run.begin; x < run.end; ++x)
                for (std::int64_t e = 0; e < per_pixel; ++e) {
                  T value;
                  std::memcpy(&value, element(from, from_stride, x, e), sizeof value);
                  sums[x * per_pixel + e] += static_cast<Sum>(value);
                }
            }
          }
          char* to = out.data + b * out.batch_stride + c * out.channel_stride + y * out.row_stride;
          for (std::int64_t x = 0; x < lines.width; ++x)
            for (std::int64_t e = 0; e < per_pixel; ++e) {
              const T value = static_cast<T>(sums[x * per_pixel + e]);
              std::memcpy(element(to, to_stride, x, e), &value, sizeof value);
            }
        }
    }
  };
  const std::int64_t pixels = out.channels * out.height * out.width;
  parallel_for(out.batch * grid.height, 4 * pixels / grid.height, sum_bands);
}

}  // namespace

void pairing(
    std::uint64_t seed, std::int64_t draw, std::int64_t batch, bool no_fixed_points,
    std::int64_t* index) {
  std::vector<std::uint64_t> tickets(batch);  // the sample's number breaks ties
  for (std::int64_t block = 0; block * 4 < batch; ++block) {
    const Words words = philox(block, 0, draw, kPairing, seed);
    for (std::int64_t b = block * 4; b < std::min(block * 4 + 4, batch); ++b)
      tickets[b] = std::uint64_t{words.word[b % 4]} << 32 | static_cast<std::uint64_t>(b);
  }
  std::sort(tickets.begin(), tickets.end());
  const auto holder = [&](std::int64_t rank) {
    return static_cast<std::int64_t>(tickets[rank % batch] & 0xFFFFFFFFu);
  };
  for (std::int64_t rank = 0; rank < batch; ++rank)
    index[holder(rank)] = no_fixed_points ? holder(rank + 1) : rank;
}

void resample(const float* map, Grid from, float* grid, Grid to) {
  for (std::int64_t y = 0; y < to.height; ++y)
    for (std::int64_t x = 0; x < to.width; ++x)
      grid[y * to.width + x] = sg_kernels::resample(
          map, from.width, window(y, from.height, to.height), window(x, from.width, to.width));
}

namespace {

void select_by_threshold(
    const float* grid, std::int64_t cells, const Selection& selection, bool* keep) {
  const float peak = *std::max_element(grid, grid + cells);
  float scale = 1.0f;
  if (selection.normalize == Normalize::kMax) scale = peak;
  if (selection.normalize == Normalize::kMean)
    scale = static_cast<float>(std::accumulate(grid, grid + cells, 0.0) / cells);
  thread_local std::vector<float> numerators;
  numerators.resize(cells);
  double sum = 0.0;
  for (std::int64_t c = 0; c < cells; ++c) {
    numerators[c] = softmax_numerator(grid[c], peak, scale, selection.temperature);
    sum += numerators[c];
  }
  const float bar = selection.threshold * static_cast<float>(sum);
  for (std::int64_t c = 0; c < cells; ++c) keep[c] = numerators[c] > bar;
}

void select_by_rank(const float* grid, std::int64_t cells, std::int64_t k, bool* keep) {
  thread_local std::vector<std::int64_t> order;
  order.resize(cells);
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::nth_element(
      order.begin(), order.begin() + (k - 1), order.end(),
      [grid](std::int64_t a, std::int64_t b) {
        return grid[a] != grid[b] ? grid[a] > grid[b] : a < b;
      });
  std::fill(keep, keep + cells, false);
  for (std::int64_t i = 0; i < k; ++i) keep[order[i]] = true;
}

}  // namespace

void select(const float* grid, std::int64_t cells, const Selection& selection, bool* keep) {
  bool finite = true, constant = true;
  for (std::int64_t c = 0; c < cells; ++c) {
    finite &= std::isfinite(grid[c]);
    constant &= grid[c] == grid[0];
  }
  const bool by_threshold = selection.k == 0;
  if (!finite || (by_threshold && constant))
    std::fill(keep, keep + cells, false);
  else if (by_threshold)
    select_by_threshold(grid, cells, selection, keep);
  else
    select_by_rank(grid, cells, selection.k, keep);
}

void sample(
    const bool* keep, std::int64_t own, std::int64_t draw, std::int64_t cells,
    const Sampling& sampling, bool* mask) {
  const Words shared = philox(0, 0, draw, kKeepProb, sampling.seed);
  if (shared.word[1] >= threshold_of(sampling.prob)) {
    std::fill(mask, mask + cells, true);
    return;
  }
  if (!sampling.sampled) {
    std::copy(keep, keep + cells, mask);
    return;
  }
  const std::int64_t p = keep_threshold(shared.word[0], sampling.quantiles, sampling.bins);
  for (std::int64_t block = 0; block * 4 < cells; ++block) {
    const Words words = philox(block, own, draw, kSampling, sampling.seed);
    for (std::int64_t c = block * 4; c < std::min(block * 4 + 4, cells); ++c)
      mask[c] = keep[c] && words.word[c % 4] < p;
  }
}

// In double, the square of no float overflows.
double total_weight(const float* grid, std::int64_t cells, Norm norm) {
  double total = 0.0;
  for (std::int64_t c = 0; c < cells; ++c) total += weight<double>(grid[c], norm);
  return total;
}

float label_ratio(
    const float* own, double own_total, const float* other, double other_total, const bool* mask,
    std::int64_t cells, Norm norm) {
  double kept = 0.0, left = 0.0;
  std::int64_t area = 0;
  for (std::int64_t c = 0; c < cells; ++c) {
    area += mask[c];
    kept += mask[c] ? weight<double>(own[c], norm) : 0.0;
    left += mask[c] ? 0.0 : weight<double>(other[c], norm);
  }
  return sg_kernels::label_ratio(
      static_cast<float>(kept / own_total), static_cast<float>(left / other_total),
      static_cast<float>(area) / static_cast<float>(cells), norm);
}

bool mix_targets(
    const Targets& targets, float lam, std::int64_t own, std::int64_t other, float* mixed) {
  const std::int64_t classes = targets.classes;
  const float width = static_cast<float>(classes);
  if (targets.ids != nullptr) {
    const std::int64_t own_id = targets.ids[own], other_id = targets.ids[other];
    const bool known = in_range(own_id, classes) && in_range(other_id, classes);
    for (std::int64_t n = 0; n < classes; ++n)
      mixed[n] = known
          ? mix_target(own_id == n, other_id == n, lam, targets.smoothing, width)
          : std::numeric_limits<float>::quiet_NaN();
    return known;
  }
  const float *own_row = targets.rows + own * classes, *other_row = targets.rows + other * classes;
  for (std::int64_t n = 0; n < classes; ++n)
    mixed[n] = mix_target(own_row[n], other_row[n], lam, targets.smoothing, width);
  return true;
}

void graft(
    const Batch& images, std::int64_t element_size, const bool* mask, Grid grid,
    const std::int64_t* index, const Batch& out) {
  const Lines lines = lines_of(element_size, images, out);
  const bool stream = is_streamed(lines, out, grid, element_size);
  const std::vector<std::int64_t> order = along_cycles(index, images.batch, out.batch);
  const auto graft_bands = [&](std::int64_t first, std::int64_t last) {
    std::vector<Run> runs;
    for (std::int64_t unit = first; unit < last; ++unit) {
      const std::int64_t r = order[unit / grid.height], band = unit % grid.height;
      const std::int64_t own = r % images.batch;
      const std::int64_t other = in_range(index[r], images.batch) ? index[r] : own;
      find_runs(mask + r * grid.cells() + band * grid.width, grid.width, lines.width, runs);
      graft_band(
          lines, stream, out, out.data + r * out.batch_stride, images,
          images.data + own * images.batch_stride, images.data + other * images.batch_stride,
          first_pixel(band, lines.height, grid.height),
          first_pixel(band + 1, lines.height, grid.height), runs);
    }
    finish_streams();
  };
  const std::int64_t bytes = images.channels * images.height * images.width * element_size;
  parallel_for(out.batch * grid.height, bytes / (4 * grid.height), graft_bands);
}

void graft_backward(
    const Batch& grad, Float type, const bool* mask, Grid grid, const std::int64_t* index,
    const Batch& out) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  switch (type) {
    case Float::kHalf: return sum_contributions<Half, float>(grad, mask, grid, index, out);
    case Float::kBFloat16: return sum_contributions<BFloat16, float>(grad, mask, grid, index, out);
    case Float::kFloat: return sum_contributions<float, float>(grad, mask, grid, index, out);
    case Float::kDouble: return sum_contributions<double, double>(grad, mask, grid, index, out);
  }
}

}  // namespace sg_kernels::cpu
