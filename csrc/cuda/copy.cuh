// Stage 6 on the GPU: how a block copies a tile of an image. An image is lines of chunks: a line is
// a row of pixels of one channel, or in channels_last order of all; a chunk is the widest run of
// bytes that pointers, strides and lines are multiples of.
#pragma once

#include <algorithm>

#include "block.cuh"

namespace sg_kernels::cuda {

struct Tile {
  bool channels_last, dense;   // dense: the chunks of a line lie side by side
  Divisor height, width;       // of an image, in pixels
  Divisor pixel;               // in bytes, of one channel or of all
  Divisor channels;            // of a pixel of all
  std::int32_t chunk;          // in bytes
  std::int32_t chunks, lines;  // of an image
  Divisor columns;             // chunks of a line that a block copies side by side
  std::int32_t step;           // lines that a block copies at once
  std::int32_t lines_of_tile;
  Divisor across;  // tiles of a line
  std::int32_t tiles;
  std::int32_t grid_height;
  Divisor grid_width;
};

constexpr int kLinesInFlight = 4;  // that a thread has asked for at once
constexpr int kMixedInFlight = 2;  // of those, from both images: more would take registers
constexpr int kTilesPerSm = 2;     // tiles are made lower until there are so many

// How images are copied to out, in chunks as wide as they can be. For `arithmetic` they are of
// kChunk bytes or one element, and one that a cell ends in costs no more than others.
inline Tile plan_tile(const Batch& images, const Batch& out, Grid grid, bool arithmetic) {
  const auto stride = [](std::int64_t size, std::int64_t stride) { return size > 1 ? stride : 0; };
  const std::int64_t channels = images.channels, element = images.element;
  Tile tile{};
  tile.channels_last = 0 < out.channel_stride && out.channel_stride < out.column_stride;
  const std::int64_t pixel = tile.channels_last ? channels * element : element;
  const std::int64_t line = images.width * pixel;
  const std::int64_t lines = tile.channels_last ? images.height : channels * images.height;
  check_extents(
      "images", {line, lines, (images.height + 1) * grid.height, (images.width + 1) * grid.width});
  // At least 1: of an empty image too there is a plan.
  const auto divisor = [](std::int64_t size) {
    return Divisor(static_cast<std::int32_t>(std::max<std::int64_t>(1, size)));
  };
  tile.height = divisor(images.height);
  tile.width = divisor(images.width);
  tile.pixel = divisor(pixel);
  tile.channels = divisor(channels);
  tile.lines = static_cast<std::int32_t>(lines);
  tile.grid_height = static_cast<std::int32_t>(grid.height);
  tile.grid_width = divisor(grid.width);
  tile.dense = true;
  std::int64_t addresses = line;
  for (const Batch* batch : {&images, &out}) {
    tile.dense &= batch->width <= 1 || batch->column_stride == pixel;
    tile.dense &= !tile.channels_last || channels == 1 || batch->channel_stride == element;
    addresses |= static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(batch->data)) |
                 stride(batch->batch, batch->batch_stride) |
                 stride(batch->height, batch->row_stride);
    if (!tile.channels_last) addresses |= stride(channels, batch->channel_stride);
  }
  std::int64_t ends = 0;
  for (std::int64_t cell = 1; cell < grid.width; ++cell)
    ends |= first_pixel(cell, images.width, grid.width) * pixel;
  tile.chunk = static_cast<std::int32_t>(element);
  for (std::int32_t width = arithmetic ? kChunk : 2; width <= kChunk; width *= 2) {
    // A chunk that a cell ends in is read from both images: rather two of half the width.
    const bool cut =
        !arithmetic && width == kChunk && tile.chunk == kChunk / 2 && ends % kChunk == kChunk / 2;
    if (tile.dense && width > tile.chunk && addresses % width == 0 && !cut) tile.chunk = width;
  }
  tile.chunks = static_cast<std::int32_t>(line / tile.chunk);
  const std::int32_t columns = std::clamp(tile.chunks, 1, kThreads);
  const std::int64_t across = ceil_div(tile.chunks, columns);
  tile.columns = Divisor(columns);
  tile.across = divisor(across);
  tile.step = kThreads / columns;
  const std::int64_t wanted = kTilesPerSm * multiprocessors();
  tile.lines_of_tile = tile.step * kLinesInFlight;
  while (tile.lines_of_tile > tile.step &&
         out.batch * across * ceil_div(lines, tile.lines_of_tile) < wanted)
    tile.lines_of_tile -= tile.step;
  tile.tiles = static_cast<std::int32_t>(across * ceil_div(lines, tile.lines_of_tile));
  return tile;
}

// Of each byte of a chunk, a bit.
template <int kBytes>
constexpr std::uint32_t kAll = (std::uint32_t{1} << kBytes) - 1;

// The chunks of a tile that a thread works on: number `chunk` of the lines first, first + step, ...
// below last; and the cells that it lies in.
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

  // Where the chunk lies in a line of a batch, in bytes.
  __device__ std::int64_t offset(const Tile& tile, const Batch& batch) const {
    if (tile.dense) return chunk * std::int64_t{tile.chunk};
    if (!tile.channels_last) return chunk * batch.column_stride;
    return chunk / tile.channels * batch.column_stride +
           chunk % tile.channels * batch.channel_stride;
  }

  // Of each byte of the chunk in a row of cells, a bit: whether it comes from the source.
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
  return cell_of(line % tile.height, tile.height, tile.grid_height);
}

// Column::from_own of every line, kChunk bits each. One loop for all: what it takes to find a
// cell's end is then there once, not in each of the unrolled accesses.
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

// In channels_last order there are no more lines than an image is high. Unsigned, as a product with
// a sign takes more instructions.
__device__ inline std::int64_t line_offset(const Tile& tile, const Batch& batch, int line) {
  const std::uint32_t channel = line / tile.height, y = line % tile.height;
  return static_cast<std::int64_t>(
      channel * static_cast<std::uint64_t>(batch.channel_stride) +
      y * static_cast<std::uint64_t>(batch.row_stride));
}

// own where a byte's bit is set, other elsewhere.
template <class Word>
__device__ Word blend(Word own, Word other, std::uint32_t bits) {
  constexpr int kWords = (sizeof(Word) + 3) / 4;
  std::uint32_t chosen[kWords] = {}, left[kWords] = {};
  std::memcpy(chosen, &own, sizeof(Word));
  std::memcpy(left, &other, sizeof(Word));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    // Four bits spread to the lowest of a byte each, then over it.
    const std::uint32_t bytes = ((bits >> 4 * i & 0xFu) * 0x00204081u & 0x01010101u) * 0xFFu;
    chosen[i] = (chosen[i] & bytes) | (left[i] & ~bytes);
  }
  Word blended;
  std::memcpy(&blended, chosen, sizeof(Word));
  return blended;
}

// A row of the graft: where its images and the row itself begin, and a mask that the block sees.
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

// Copies tile `number` of a row, each chunk from the image it belongs to; from both only where a
// cell ends within it.
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

}  // namespace sg_kernels::cuda
