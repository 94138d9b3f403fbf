// Stage 6: how a block copies a tile of an image; Tile, in plan.h, says what lines and chunks are.
#pragma once

#include "block.cuh"

namespace sg_kernels::cuda {

// Chunks read from both images that a thread has in flight; more would take registers.
constexpr int kMixedInFlight = 2;

// A bit for each byte of a chunk, all set.
template <int kBytes>
constexpr std::uint32_t kAll = (std::uint32_t{1} << kBytes) - 1;

// The chunks of a tile that a thread works on: number `chunk` of every `step`-th line, from `first`
// to before `last`. They lie in cells first_cell to last_cell of a row of cells.
struct Column {
  std::int32_t chunk, first, step, last;
  std::int32_t first_cell, last_cell;

  __device__ Column(const Tile& tile, int number) {
    const int thread = threadIdx.x;
    const int down = number / tile.across * tile.lines_of_tile, row = thread / tile.columns;
    chunk = number % tile.across * tile.columns + thread % tile.columns;
    first = down + row;
    step = tile.step;
    const bool inside = chunk < tile.chunks && row < step;
    last = inside ? min(tile.lines, down + tile.lines_of_tile) : 0;
    first_cell = cell(tile, chunk * tile.chunk);
    last_cell = cell(tile, (chunk + 1) * tile.chunk - 1);
  }

  __device__ int line(int i) const { return first + i * step; }
  __device__ bool has(int i) const { return line(i) < last; }

  // The offset of the chunk in a line of a batch, in bytes.
  __device__ std::int64_t offset(const Tile& tile, const Batch& batch) const {
    if (tile.dense) return chunk * std::int64_t{tile.chunk};
    if (!tile.channels_last) return chunk * batch.column_stride;
    return chunk / tile.channels * batch.column_stride +
           chunk % tile.channels * batch.channel_stride;
  }

  // A bit for each byte of the chunk, set if it comes from the source.
  __device__ std::uint32_t from_own(const Tile& tile, const bool* cells) const {
    const std::uint32_t all = (std::uint32_t{1} << tile.chunk) - 1;
    if (first_cell == last_cell) return cells[first_cell] ? all : 0;
    std::uint32_t bits = 0, before = 0;
#pragma unroll 1
    for (int c = first_cell; c <= last_cell; ++c) {
      const int end = first_pixel(c + 1, tile.width, tile.grid_width) * tile.pixel;
      const std::uint32_t until =
          (std::uint32_t{1} << min(end - chunk * tile.chunk, tile.chunk)) - 1;
      if (cells[c]) bits |= until & ~before;
      before = until;
    }
    return bits;
  }

 private:
  __device__ static int cell(const Tile& tile, int byte) {
    return cell_of(min(byte / tile.pixel, tile.width - 1), tile.width, tile.grid_width);
  }
};

// The row of cells that a line lies in.
__device__ inline int band(const Tile& tile, int line) {
  return cell_of(line % tile.plane, tile.plane, tile.grid_height);
}

// Column::from_own of every line, kChunk bits each. This loop is separate from the accesses, which
// are unrolled, so that the search for the ends of cells is compiled once.
__device__ inline std::uint64_t from_own(const Tile& tile, const Column& column, const bool* mask) {
  static_assert(kLinesInFlight * kChunk <= 64);
  std::uint64_t bits = 0;
#pragma unroll 1
  for (int i = 0; column.has(i); ++i) {
    const bool* cells = mask + band(tile, column.line(i)) * tile.grid_width;
    const std::uint64_t of_line = column.from_own(tile, cells);
    bits |= of_line << i * kChunk;
  }
  return bits;
}

// The offset of a line in an image. In channels_last order an image has `height` lines, all of
// channel 0. Unsigned, as signed products take more instructions.
__device__ inline std::int64_t line_offset(const Tile& tile, const Batch& batch, int line) {
  const std::uint32_t channel = line / tile.height, y = line % tile.height;
  return static_cast<std::int64_t>(
      channel * static_cast<std::uint64_t>(batch.channel_stride) +
      y * static_cast<std::uint64_t>(batch.row_stride));
}

// The bytes of `own` whose bit is set, and those of `other` elsewhere.
template <class Word>
__device__ Word blend(Word own, Word other, std::uint32_t bits) {
  constexpr int kWords = (sizeof(Word) + 3) / 4;
  std::uint32_t chosen[kWords] = {}, left[kWords] = {};
  std::memcpy(chosen, &own, sizeof(Word));
  std::memcpy(left, &other, sizeof(Word));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    // Four bits, each spread to the lowest bit of a byte, then to all its bits.
    const std::uint32_t bytes = ((bits >> 4 * i & 0xFu) * 0x00204081u & 0x01010101u) * 0xFFu;
    chosen[i] = (chosen[i] & bytes) | (left[i] & ~bytes);
  }
  Word blended;
  std::memcpy(&blended, chosen, sizeof(Word));
  return blended;
}

// Where the images of a row and the row itself begin, and a mask that the block can read.
struct Row {
  const char *source, *destination;
  char* to;
  const bool* mask;

  __device__ Row(
      const Batch& images, const Batch& out, std::int64_t row, std::int64_t own, std::int64_t other,
      const bool* mask)
      : source(images.data + own * images.batch_stride),
        destination(images.data + other * images.batch_stride),
        to(out.data + row * out.batch_stride),
        mask(mask) {}
};

// Copies tile `number` of a row. A chunk is read from the image it belongs to, and from both only
// if a cell ends within it.
template <int kBytes>
__device__ void copy_tile(
    const Tile& tile, int number, const Batch& images, const Batch& out, const Row& row) {
  using Word = typename Access<kBytes>::type;
  const Column column(tile, number);
  const std::int64_t from = column.offset(tile, images);
  const std::uint64_t bits = from_own(tile, column, row.mask);
  const auto of_line = [bits](int i) -> std::uint32_t { return bits >> i * kChunk & kAll<kBytes>; };
  const auto is_mixed = [&](int i) { return of_line(i) != 0 && of_line(i) != kAll<kBytes>; };
  const auto load = [&](const char* image, int i) {
    return *reinterpret_cast<const Word*>(image + from + line_offset(tile, images, column.line(i)));
  };
  Word value[kLinesInFlight];
#pragma unroll
  for (int i = 0; i < kLinesInFlight; ++i)
    if (column.has(i)) value[i] = load(of_line(i) != 0 ? row.source : row.destination, i);
  const std::int64_t to = column.offset(tile, out);
#pragma unroll
  for (int begin = 0; begin < kLinesInFlight; begin += kMixedInFlight) {
    Word left[kMixedInFlight];
#pragma unroll
    for (int i = 0; i < kMixedInFlight; ++i)
      if (is_mixed(begin + i)) left[i] = load(row.destination, begin + i);
#pragma unroll
    for (int i = 0; i < kMixedInFlight; ++i) {
      const int line = begin + i;
      if (!column.has(line)) continue;
      if (is_mixed(line)) value[line] = blend(value[line], left[i], of_line(line));
      const std::int64_t offset = to + line_offset(tile, out, column.line(line));
      *reinterpret_cast<Word*>(row.to + offset) = value[line];
    }
  }
}

template <int kBytes>
__device__ void copy_tiles(
    const Tile& tile, int part, int parts, const Batch& images, const Batch& out, const Row& row) {
#pragma unroll 1
  for (int number = part; number < tile.tiles; number += parts)
    copy_tile<kBytes>(tile, number, images, out, row);
}

// Copies part `part` of `parts` of a row's tiles.
__device__ inline void copy_tiles(
    const Tile& tile, int part, int parts, const Batch& images, const Batch& out, const Row& row) {
  switch (tile.chunk) {
    case 16: return copy_tiles<16>(tile, part, parts, images, out, row);
    case 8: return copy_tiles<8>(tile, part, parts, images, out, row);
    case 4: return copy_tiles<4>(tile, part, parts, images, out, row);
    case 2: return copy_tiles<2>(tile, part, parts, images, out, row);
    default: return copy_tiles<1>(tile, part, parts, images, out, row);
  }
}

// The image that a row is grafted onto: its own, if its index is out of range.
__device__ inline std::int64_t destination(
    std::int64_t other, std::int64_t own, std::int64_t batch) {
  return in_range(other, batch) ? other : own;
}

// Copies whole rows, whose masks and index are given.
void launch_copy(
    const Tile& tile, const Standardize& standardize, const Batch& images, const bool* mask,
    Grid grid, const std::int64_t* index, const Batch& out, const Context& context);

}  // namespace sg_kernels::cuda
