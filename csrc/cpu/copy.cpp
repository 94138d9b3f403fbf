#include "copy.h"

#include <algorithm>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace sg_kernels {
namespace cpu {
namespace {

constexpr std::int64_t kStep = 16;  // bytes of an SSE register

// Whether to write an output past the caches. That saves reading what is overwritten, but only if
// no ordinary store touches the same cache line, so every run must begin and end on a multiple of
// kStep.
bool is_streamed(
    [[maybe_unused]] const Lines& lines, [[maybe_unused]] const Batch& out,
    [[maybe_unused]] Grid grid) {
#ifdef __SSE2__
  // A smaller output may still be in a cache when it is read.
  constexpr std::int64_t kStreamedBytes = 16 << 20;
  const std::int64_t bytes = out.pixels() * out.element;
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

// Copies at least kBytes; the last step overlaps the one before.
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
  // Up to here a call of memcpy takes longer than the copy.
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

// Fetches a whole line of the destination, not only its runs: it is the next row's source, and
// memory reads whole lines faster than pieces.
void prefetch(const char* from, std::int64_t bytes) {
#ifdef __GNUC__
  constexpr std::int64_t kCacheLine = 64;
  for (std::int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(from + i);
#endif
}

// For every byte of a line, all bits set if it comes from the source, else none.
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

}  // namespace

void find_runs(const bool* cells, std::int64_t count, std::int64_t width, std::vector<Run>& runs) {
  runs.clear();
  std::int64_t begin = 0;
  for (std::int64_t cell = 0; cell < count; ++cell) {
    const std::int64_t end = first_pixel(cell + 1, width, count);
    if (!runs.empty() && runs.back().own == cells[cell])
      runs.back().end = end;
    else
      runs.emplace_back() = {begin, end, cells[cell]};  // push_back copies a temporary: slower
    begin = end;
  }
}

Lines lines_of(const Batch& from, const Batch& to) {
  const auto side_by_side = [&](std::int64_t numbers) {
    return from.width == 1 || (from.column_stride == numbers * from.element &&
                               to.column_stride == numbers * to.element);
  };
  const bool together = from.channel_stride == from.element && to.channel_stride == to.element;
  if (together && side_by_side(from.channels))
    return {1, from.height, from.width, from.channels * from.element, true};
  return {from.channels, from.height, from.width, from.element, side_by_side(1)};
}

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

std::int64_t strips_per_row(std::int64_t rows, std::int64_t bytes, Grid grid) {
  // Every strip computes its row's mask again, which pays from this many bytes on.
  constexpr std::int64_t kWorthCutting = 256 << 10;
  constexpr std::int64_t kStripsPerThread = 4;  // so that threads finish at about the same time
  const std::int64_t wanted = kStripsPerThread * torch::stable::get_num_threads();
  if (rows == 0 || rows >= wanted || rows * bytes < kWorthCutting) return 1;
  return std::min(grid.height, (wanted + rows - 1) / rows);
}

void finish_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

Grafter::Grafter(
    const Batch& images, Grid grid, std::int64_t depth, const Standardize& standardize,
    const Batch& out)
    : images_(images),
      out_(out),
      grid_(grid),
      depth_(depth),
      lines_(lines_of(images, out)),
      standardizer_(standardize, lines_.width, lines_.pixel / images.element),
      line_(lines_.width * lines_.pixel),
      stream_(!standardize.wanted() && is_streamed(lines_, out, grid)) {}

void Grafter::graft(const bool* mask, const Strip& strip) {
  char* to = out_.data + strip.row * out_.batch_stride;
  const char* own = images_.data + strip.own * images_.batch_stride;
  const char* other = images_.data + strip.other * images_.batch_stride;
  const std::int64_t height = lines_.height / depth_;  // of a plane
  for (std::int64_t band = strip.first; band < strip.last; ++band) {
    find_runs(mask + band * grid_.width, grid_.width, lines_.width, runs_);
    const std::int64_t begin = first_pixel(band, height, grid_.height);
    const std::int64_t end = first_pixel(band + 1, height, grid_.height);
    for (std::int64_t top = 0; top < lines_.height; top += height)
      graft_band(to, own, other, top + begin, top + end);
  }
}

// Copies lines [begin, end), which all have the same runs.
void Grafter::graft_band(
    char* to, const char* own, const char* other, std::int64_t begin, std::int64_t end) {
  // Reading both images is faster than mispredicting the ends of runs shorter than this.
  constexpr std::int64_t kBlended = 48;
  const bool copied = lines_.dense && !standardizer_.wanted();
  blended_ = copied && !stream_ && line_ < kBlended * static_cast<std::int64_t>(runs_.size());
  if (blended_) spread_runs(runs_, lines_.pixel, taken_);
  const bool one_block =
      runs_.size() == 1 && copied && out_.row_stride == line_ && images_.row_stride == line_;
  for (std::int64_t c = 0; c < lines_.channels; ++c) {
    if (one_block)
      copy_bytes(
          to + begin * line_, (runs_[0].own ? own : other) + begin * line_, (end - begin) * line_,
          stream_);
    else
      graft_lines(to, own, other, begin, end, c);
    to += out_.channel_stride;
    own += images_.channel_stride;
    other += images_.channel_stride;
  }
}

// Copies lines [begin, end) of one channel.
void Grafter::graft_lines(
    char* to, const char* own, const char* other, std::int64_t begin, std::int64_t end,
    std::int64_t channel) {
  constexpr std::int64_t kLinesAhead = 2;  // far enough for memory, near enough for the caches
  for (std::int64_t y = begin; y < end; ++y) {
    const std::int64_t from = y * images_.row_stride;
    if (stream_) prefetch(other + from + kLinesAhead * images_.row_stride, line_);
    char* to_line = to + y * out_.row_stride;
    if (blended_)
      blend(to_line, own + from, other + from, taken_.data(), line_);
    else
      graft_line(to_line, own + from, other + from, channel);
  }
}

void Grafter::graft_line(char* to, const char* own, const char* other, std::int64_t channel) {
  for (const Run& run : runs_) {
    const char* from = (run.own ? own : other) + run.begin * images_.column_stride;
    char* target = to + run.begin * out_.column_stride;
    const std::int64_t count = run.end - run.begin;
    if (standardizer_.wanted())
      standardizer_.copy(target, out_.column_stride, from, images_.column_stride, count, channel);
    else if (lines_.dense)
      copy_bytes(target, from, count * lines_.pixel, stream_);
    else
      copy_pixels(lines_.pixel, target, out_.column_stride, from, images_.column_stride, count);
  }
}

}  // namespace cpu

void graft(
    const Batch& images, const bool* mask, Grid grid, const std::int64_t* index, const Batch& out,
    const Context&) {
  cpu::for_each_strip(
      images, grid, index, out, [&] { return cpu::Grafter(images, grid, 1, {}, out); },
      [&](const cpu::Strip& strip, cpu::Grafter& grafter) {
        grafter.graft(mask + strip.row * grid.cells(), strip);
      });
}

}  // namespace sg_kernels
