// Pass 2 on the CPU: stage 6, with all that comes between it and the saliency; and its gradient.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cells.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace sg_kernels {
namespace cpu {
namespace {

// Neighbouring pixels of a line that come from one image.
struct Run {
  std::int64_t begin, end;
  bool own;
};

// The runs of every line in one row of cells.
void find_runs(const bool* cells, std::int64_t count, std::int64_t width, std::vector<Run>& runs) {
  runs.clear();
  std::int64_t begin = 0;
  for (std::int64_t cell = 0; cell < count; ++cell) {
    const std::int64_t end = first_pixel(cell + 1, width, count);
    if (!runs.empty() && runs.back().own == cells[cell])
      runs.back().end = end;
    else
      runs.push_back({begin, end, cells[cell]});
    begin = end;
  }
}

// Batches of one size seen as lines of pixels. Where the channels of a pixel lie together in both,
// they are one pixel of one channel.
struct Lines {
  std::int64_t channels, height, width, pixel;  // pixel in bytes
  bool dense;                                   // pixels of a line lie side by side
};

Lines lines_of(const Batch& from, const Batch& to) {
  const auto side_by_side = [&](std::int64_t pixel) {
    return from.width == 1 || (from.column_stride == pixel && to.column_stride == pixel);
  };
  const std::int64_t element = from.element, whole = from.channels * element;
  const bool together = from.channel_stride == element && to.channel_stride == element;
  if (together && side_by_side(whole)) return {1, from.height, from.width, whole, true};
  return {from.channels, from.height, from.width, element, side_by_side(element)};
}

constexpr std::int64_t kStep = 16;  // bytes of one vector move

// Whether an output is written past the caches: from a size on they could not hold it until it is
// read, and memory that is overwritten whole need not be fetched first. That holds only while no
// ordinary store touches the same cache line, so every run must begin and end on a vector's
// boundary.
bool is_streamed(
    [[maybe_unused]] const Lines& lines, [[maybe_unused]] const Batch& out,
    [[maybe_unused]] Grid grid) {
#ifdef __SSE2__
  constexpr std::int64_t kStreamedBytes = 16 << 20;
  const std::int64_t bytes = out.batch * out.channels * out.height * out.width * out.element;
  if (!lines.dense || bytes < kStreamedBytes) return false;
  std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(out.data);
  bits |= static_cast<std::uintptr_t>(out.batch_stride | out.row_stride);
  if (lines.channels > 1) bits |= static_cast<std::uintptr_t>(out.channel_stride);
  for (std::int64_t cell = 1; cell <= grid.width; ++cell)
    bits |= static_cast<std::uintptr_t>(first_pixel(cell, lines.width, grid.width) * lines.pixel);
  return bits % kStep == 0;
#else
  return false;
#endif
}

// The last step overlaps the one before.
template <std::int64_t kBytes>
inline void copy_steps(char* to, const char* from, std::int64_t bytes) {
  for (std::int64_t i = 0; i + kBytes < bytes; i += kBytes) std::memcpy(to + i, from + i, kBytes);
  std::memcpy(to + bytes - kBytes, from + bytes - kBytes, kBytes);
}

inline void copy_bytes(
    char* to, const char* from, std::int64_t bytes, [[maybe_unused]] bool stream) {
#ifdef __SSE2__
  if (stream) {
    for (std::int64_t i = 0; i < bytes; i += kStep)
      _mm_stream_si128(
          reinterpret_cast<__m128i*>(to + i),
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    return;
  }
#endif
  // A run of a small image is shorter than the call of memcpy.
  constexpr std::int64_t kShort = 128;
  if (bytes > kShort)
    std::memcpy(to, from, bytes);
  else if (bytes >= kStep)
    copy_steps<kStep>(to, from, bytes);
  else if (bytes >= 8)
    copy_steps<8>(to, from, bytes);
  else if (bytes >= 4)
    copy_steps<4>(to, from, bytes);
  else if (bytes > 0)
    copy_steps<1>(to, from, bytes);
}

// Fetches the destination whole, not only the runs that are copied from it: it is the next row's
// source, and memory is faster at whole lines than at pieces of them.
void prefetch(const char* from, std::int64_t bytes) {
#ifdef __GNUC__
  constexpr std::int64_t kCacheLine = 64;
  for (std::int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(from + i);
#endif
}

// Of every byte of a line, all bits: set where it comes from the source.
void spread_runs(const std::vector<Run>& runs, std::int64_t pixel, std::vector<char>& taken) {
  taken.resize(runs.back().end * pixel);
  for (const Run& run : runs)
    std::fill(
        taken.begin() + run.begin * pixel, taken.begin() + run.end * pixel,
        static_cast<char>(run.own ? -1 : 0));
}

void blend(
    char* __restrict to, const char* __restrict own, const char* __restrict other,
    const char* __restrict taken, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; ++i)
    to[i] = static_cast<char>((own[i] & taken[i]) | (other[i] & ~taken[i]));
}

void finish_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

template <std::int64_t kPixel>
void copy_strided(
    char* to, std::int64_t to_stride, const char* from, std::int64_t from_stride,
    std::int64_t count) {
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

// Stage 6 of one batch: what is common to all of its rows.
class Grafter {
 public:
  Grafter(const Batch& images, Grid grid, const Batch& out)
      : images_(images),
        out_(out),
        grid_(grid),
        lines_(lines_of(images, out)),
        stream_(is_streamed(lines_, out, grid)) {}

  // Rows of cells [first, last) of row `row`; mask is the whole row's.
  void graft(
      const bool* mask, std::int64_t row, std::int64_t own, std::int64_t other, std::int64_t first,
      std::int64_t last) {
    char* to = out_.data + row * out_.batch_stride;
    const char* from_own = images_.data + own * images_.batch_stride;
    const char* from_other = images_.data + other * images_.batch_stride;
    for (std::int64_t band = first; band < last; ++band) {
      find_runs(mask + band * grid_.width, grid_.width, lines_.width, runs_);
      graft_band(
          to, from_own, from_other, first_pixel(band, lines_.height, grid_.height),
          first_pixel(band + 1, lines_.height, grid_.height));
    }
  }

 private:
  // Lines [begin, end), which all have the same runs.
  void graft_band(
      char* to, const char* own, const char* other, std::int64_t begin, std::int64_t end) {
    const std::int64_t line = lines_.width * lines_.pixel;
    const bool one_block =
        runs_.size() == 1 && lines_.dense && out_.row_stride == line && images_.row_stride == line;
    // Where a run is so short, reading both images is faster than guessing how short.
    constexpr std::int64_t kBlended = 48;
    const bool blended =
        lines_.dense && !stream_ && line < kBlended * static_cast<std::int64_t>(runs_.size());
    if (blended) spread_runs(runs_, lines_.pixel, taken_);
    for (std::int64_t c = 0; c < lines_.channels; ++c) {
      const std::int64_t from_plane = c * images_.channel_stride;
      char* to_plane = to + c * out_.channel_stride;
      if (one_block) {
        const char* from = (runs_[0].own ? own : other) + from_plane + begin * line;
        copy_bytes(to_plane + begin * line, from, (end - begin) * line, stream_);
        continue;
      }
      for (std::int64_t y = begin; y < end; ++y) {
        const std::int64_t from_line = from_plane + y * images_.row_stride;
        if (stream_) prefetch(other + from_line + kLinesAhead * images_.row_stride, line);
        char* to_line = to_plane + y * out_.row_stride;
        if (blended) {
          blend(to_line, own + from_line, other + from_line, taken_.data(), line);
          continue;
        }
        for (const Run& run : runs_) {
          const char* from =
              (run.own ? own : other) + from_line + run.begin * images_.column_stride;
          char* target = to_line + run.begin * out_.column_stride;
          const std::int64_t count = run.end - run.begin;
          if (lines_.dense)
            copy_bytes(target, from, count * lines_.pixel, stream_);
          else
            copy_pixels(
                lines_.pixel, target, out_.column_stride, from, images_.column_stride, count);
        }
      }
    }
  }

  static constexpr std::int64_t kLinesAhead = 2;

  const Batch &images_, &out_;
  Grid grid_;
  Lines lines_;
  bool stream_;
  std::vector<Run> runs_;
  std::vector<char> taken_;
};

// The rows in an order in which a row's destination is the next row's source, which the caches then
// hold.
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

// How many strips a row is cut into: one, unless there is much to copy and too few rows for the
// threads.
std::int64_t strips_per_row(std::int64_t rows, std::int64_t bytes, Grid grid) {
  constexpr std::int64_t kWorthCutting = 256 << 10, kUnitsPerThread = 4;
  const std::int64_t units = kUnitsPerThread * torch::stable::get_num_threads();
  if (rows == 0 || rows >= units || rows * bytes < kWorthCutting) return 1;
  return std::min(grid.height, (units + rows - 1) / rows);
}

// Calls body(row, own, other, valid, first, last, state) for the rows of cells [first, last) of
// each strip; each thread makes itself a state.
template <class MakeState, class Body>
void for_each_strip(
    const Batch& images, Grid grid, const std::int64_t* index, const Batch& out,
    const MakeState& make_state, const Body& body) {
  const std::int64_t bytes = images.channels * images.height * images.width * images.element;
  const std::int64_t strips = strips_per_row(out.batch, bytes, grid);
  const std::vector<std::int64_t> order = along_cycles(index, images.batch, out.batch);
  parallel_for(
      out.batch * strips, 16 * grid.cells() + bytes / (4 * strips),
      [&](std::int64_t begin, std::int64_t end) {
        auto state = make_state();
        for (std::int64_t unit = begin; unit < end; ++unit) {
          const std::int64_t row = order[unit / strips], strip = unit % strips;
          const std::int64_t own = row % images.batch;
          const bool valid = in_range(index[row], images.batch);
          body(
              row, own, valid ? index[row] : own, valid, strip * grid.height / strips,
              (strip + 1) * grid.height / strips, state);
        }
        finish_streams();
      });
}

struct Contribution {
  std::int64_t row;
  bool own;
};

// For each image, the rows whose gradient it receives: its own, then those it is the destination
// of.
std::vector<std::vector<Contribution>> contributions(
    const std::int64_t* index, std::int64_t batch, std::int64_t rows) {
  std::vector<std::vector<Contribution>> lists(batch);
  for (std::int64_t r = 0; r < rows; ++r) lists[r % batch].push_back({r, true});
  for (std::int64_t r = 0; r < rows; ++r)
    lists[in_range(index[r], batch) ? index[r] : r % batch].push_back({r, false});
  return lists;
}

// Calls body(i, offset) for each number of the pixels [begin, end) of a line: its place among the
// line's numbers, and its bytes'.
template <class T, class Body>
void for_each_number(
    std::int64_t begin, std::int64_t end, std::int64_t numbers, std::int64_t stride,
    const Body& body) {
  constexpr std::int64_t kSize = sizeof(T);
  if (stride == numbers * kSize) {  // one loop, of which the compiler makes vectors
    for (std::int64_t i = begin * numbers; i < end * numbers; ++i) body(i, i * kSize);
    return;
  }
  for (std::int64_t x = begin; x < end; ++x)
    for (std::int64_t n = 0; n < numbers; ++n) body(x * numbers + n, x * stride + n * kSize);
}

// Pixels of `numbers` numbers each; the stride between pixels is in bytes.
template <class T, class Sum>
void add_pixels(
    Sum* __restrict sums, const char* __restrict line, std::int64_t stride, std::int64_t numbers,
    const Run& run) {
  for_each_number<T>(run.begin, run.end, numbers, stride, [=](std::int64_t i, std::int64_t offset) {
    T value;
    std::memcpy(&value, line + offset, sizeof(T));
    sums[i] += static_cast<Sum>(value);
  });
}

template <class T, class Sum>
void store_pixels(
    const Sum* __restrict sums, char* __restrict line, std::int64_t stride, std::int64_t numbers,
    std::int64_t width) {
  for_each_number<T>(0, width, numbers, stride, [=](std::int64_t i, std::int64_t offset) {
    const T value = static_cast<T>(sums[i]);
    std::memcpy(line + offset, &value, sizeof(T));
  });
}

// Adds in Sum, in the order of the list, and rounds once.
template <class T, class Sum>
void sum_contributions(
    const Batch& grad, const bool* mask, Grid grid, const std::int64_t* index, const Batch& out) {
  const auto lists = contributions(index, out.batch, grad.batch);
  const Lines lines = lines_of(grad, out);
  const std::int64_t numbers = lines.pixel / sizeof(T);
  const std::int64_t from_stride = lines.dense ? lines.pixel : grad.column_stride;
  const std::int64_t to_stride = lines.dense ? lines.pixel : out.column_stride;
  const auto sum_line = [&](const auto& list, const auto& runs, std::int64_t b, std::int64_t c,
                            std::int64_t y, std::vector<Sum>& sums) {
    std::fill(sums.begin(), sums.end(), Sum{0});
    for (std::size_t i = 0; i < list.size(); ++i) {
      const char* from = grad.data + list[i].row * grad.batch_stride + c * grad.channel_stride +
                         y * grad.row_stride;
      for (const Run& run : runs[i])
        if (run.own == list[i].own) add_pixels<T>(sums.data(), from, from_stride, numbers, run);
    }
    char* to = out.data + b * out.batch_stride + c * out.channel_stride + y * out.row_stride;
    store_pixels<T>(sums.data(), to, to_stride, numbers, lines.width);
  };
  const auto sum_bands = [&](std::int64_t first, std::int64_t last) {
    std::vector<Sum> sums(lines.width * numbers);
    std::vector<std::vector<Run>> runs;
    for (std::int64_t unit = first; unit < last; ++unit) {
      const std::int64_t b = unit / grid.height, band = unit % grid.height;
      const auto& list = lists[b];
      runs.resize(std::max(runs.size(), list.size()));
      for (std::size_t i = 0; i < list.size(); ++i)
        find_runs(
            mask + list[i].row * grid.cells() + band * grid.width, grid.width, lines.width,
            runs[i]);
      const std::int64_t end = first_pixel(band + 1, lines.height, grid.height);
      for (std::int64_t c = 0; c < lines.channels; ++c)
        for (std::int64_t y = first_pixel(band, lines.height, grid.height); y < end; ++y)
          sum_line(list, runs, b, c, y, sums);
    }
  };
  const std::int64_t bytes = out.channels * out.height * out.width * out.element;
  if (bytes == 0) return;  // then the mask may have no cells
  parallel_for(out.batch * grid.height, bytes / grid.height, sum_bands);
}

// What a thread of pass 2 keeps of the row at hand.
struct Row {
  Grafter grafter;
  std::vector<float> own_grid, other_grid;
  std::unique_ptr<bool[]> keep, mask;
};

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A ready map; what is not >= 0 in it counts as NaN.
void check_map(const float* ready, std::int64_t count, float* saliency) {
  std::transform(ready, ready + count, saliency, checked_saliency);
}

// The seed of this call; advances the step.
std::uint64_t advance(const Seed& seed) {
  if (seed.step == nullptr) return seed.value;
  return call_seed(seed.value, static_cast<std::uint64_t>((*seed.step)++), seed.rank);
}

// Pass 2: everything but the saliency and the index.
void graft_rows(const Inputs& inputs, const Sampling& sampling, const Outputs& outputs) {
  const Grid map = inputs.map, grid = inputs.grid;
  const std::int64_t cells = grid.cells(), classes = inputs.targets.classes;
  const bool resampled = map.height != grid.height || map.width != grid.width;
  const Resampling resample(map, grid);
  const auto make_row = [&] {
    return Row{
        Grafter(inputs.images, grid, outputs.images), std::vector<float>(resampled ? cells : 0),
        std::vector<float>(resampled ? cells : 0), std::make_unique<bool[]>(cells),
        std::make_unique<bool[]>(cells)};
  };
  const auto on_grid = [&](std::int64_t b, std::vector<float>& storage) {
    const float* own = outputs.saliency + b * map.cells();
    if (!resampled) return own;
    resample(own, storage.data());
    return static_cast<const float*>(storage.data());
  };
  const auto graft_strip = [&](std::int64_t r, std::int64_t own, std::int64_t other, bool valid,
                               std::int64_t first, std::int64_t last, Row& row) {
    const float* own_grid = on_grid(own, row.own_grid);
    bool* mask = row.mask.get();
    select(own_grid, cells, inputs.selection, row.keep.get());
    sample(row.keep.get(), own, r / inputs.images.batch, cells, sampling, mask);
    row.grafter.graft(mask, r, own, other, first, last);
    if (first > 0) return;  // what follows is the row's, not the strip's
    std::copy_n(mask, cells, outputs.mask + r * cells);
    float lam = label_ratio(own_grid, on_grid(other, row.other_grid), mask, cells, inputs.norm);
    if (!valid) lam = kNaN;
    const bool known = mix_targets(inputs.targets, lam, own, other, outputs.targets + r * classes);
    outputs.lam[r] = known ? lam : kNaN;
  };
  for_each_strip(inputs.images, grid, outputs.index, outputs.images, make_row, graft_strip);
}

}  // namespace
}  // namespace cpu

void graft(
    const Batch& images, const bool* mask, Grid grid, const std::int64_t* index, const Batch& out,
    const Context&) {
  cpu::for_each_strip(
      images, grid, index, out, [&] { return cpu::Grafter(images, grid, out); },
      [&](std::int64_t row, std::int64_t own, std::int64_t other, bool, std::int64_t first,
          std::int64_t last, cpu::Grafter& grafter) {
        grafter.graft(mask + row * grid.cells(), row, own, other, first, last);
      });
}

void graft_backward(
    const Batch& grad, Float type, const bool* mask, Grid grid, const std::int64_t* index,
    const Batch& out, const Context&) {
  using cpu::sum_contributions;
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  switch (type) {
    case Float::kHalf: return sum_contributions<Half, float>(grad, mask, grid, index, out);
    case Float::kBFloat16: return sum_contributions<BFloat16, float>(grad, mask, grid, index, out);
    case Float::kFloat: return sum_contributions<float, float>(grad, mask, grid, index, out);
    case Float::kDouble: return sum_contributions<double, double>(grad, mask, grid, index, out);
  }
}

void mix_targets(
    const Targets& targets, std::int64_t batch, const float* lam, const std::int64_t* index,
    std::int64_t rows, float* mixed, const Context&) {
  cpu::parallel_for(rows, 2 * targets.classes, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t own = r % batch, other = index[r];
      const bool valid = in_range(other, batch);
      cpu::mix_targets(
          targets, valid ? lam[r] : cpu::kNaN, own, valid ? other : own,
          mixed + r * targets.classes);
    }
  });
}

void saliency_graft(const Inputs& inputs, const Outputs& outputs, const Context& context) {
  const std::int64_t batch = inputs.images.batch, rows = outputs.images.batch;
  if (inputs.ready)
    cpu::check_map(inputs.ready_map, batch * inputs.map.cells(), outputs.saliency);
  else
    channel_saliency(inputs.features, inputs.features_type, outputs.saliency, context);
  const std::uint64_t seed = cpu::advance(inputs.seed);
  if (inputs.given_index != nullptr)
    std::copy_n(inputs.given_index, rows, outputs.index);
  else
    for (std::int64_t first = 0; first < rows; first += batch)
      cpu::pairing(seed, first / batch, batch, inputs.draws.no_fixed_points, outputs.index + first);
  cpu::graft_rows(inputs, {seed, inputs.draws}, outputs);
}

}  // namespace sg_kernels
