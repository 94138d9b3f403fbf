// Stage 6 on the GPU: how a block copies a tile of an image. An image is lines of chunks: a line is
// a row of pixels of one channel, or in channels_last order of all; a chunk is the widest run of
// bytes that pointers, strides and lines are multiples of.
#pragma once

#include <algorithm>

#include "block.cuh"

namespace sg_kernels::cuda {

struct Tile {
  bool channels_last, dense;   // dense: the chunks of a line lie side by side
  std::int32_t height, width;  // of an image, in pixels
  std::int32_t pixel, chunk;   // in bytes; a pixel of one channel, or of all
  std::int32_t chunks, lines;  // of an image
  std::int32_t columns;        // chunks of a line that a block copies side by side
  std::int32_t lines_of_tile;
  std::int32_t across, tiles;  // tiles of a line, of an image
  std::int32_t grid_height, grid_width;
};

constexpr int kLinesInFlight = 4;  // that a thread has asked for at once
constexpr int kTilesPerSm = 2;     // tiles are made lower until there are so many

constexpr std::int32_t kWidths[] = {2, 4, 8, 16};
constexpr std::int32_t kWidest[] = {kChunk};

// How images are copied to out, in chunks of one of `widths`, ascending, or of an element.
template <class Widths>
Tile plan_tile(const Batch& images, const Batch& out, Grid grid, const Widths& widths) {
  const auto stride = [](std::int64_t size, std::int64_t stride) { return size > 1 ? stride : 0; };
  const std::int64_t channels = images.channels, element = images.element;
  Tile tile{};
  tile.channels_last = 0 < out.channel_stride && out.channel_stride < out.column_stride;
  const std::int64_t pixel = tile.channels_last ? channels * element : element;
  const std::int64_t line = images.width * pixel;
  const std::int64_t lines = tile.channels_last ? images.height : channels * images.height;
  for (const std::int64_t size :
       {line, lines, (images.height + 1) * grid.height, (images.width + 1) * grid.width})
    STD_TORCH_CHECK(
        size <= std::numeric_limits<std::int32_t>::max(),
        "images: too long a side for the backend cuda");
  tile.height = static_cast<std::int32_t>(images.height);
  tile.width = static_cast<std::int32_t>(images.width);
  tile.pixel = static_cast<std::int32_t>(pixel);
  tile.lines = static_cast<std::int32_t>(lines);
  tile.grid_height = static_cast<std::int32_t>(grid.height);
  tile.grid_width = static_cast<std::int32_t>(grid.width);
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
  tile.chunk = static_cast<std::int32_t>(element);
  for (const std::int32_t width : widths)
    if (tile.dense && width > tile.chunk && addresses % width == 0) tile.chunk = width;
  tile.chunks = static_cast<std::int32_t>(line / tile.chunk);
  tile.columns = std::clamp(tile.chunks, 1, kThreads);
  tile.across = static_cast<std::int32_t>(ceil_div(tile.chunks, tile.columns));
  const std::int32_t at_once = kThreads / tile.columns;
  const std::int64_t wanted = kTilesPerSm * multiprocessors();
  tile.lines_of_tile = at_once * kLinesInFlight;
  while (tile.lines_of_tile > at_once &&
         out.batch * tile.across * ceil_div(lines, tile.lines_of_tile) < wanted)
    tile.lines_of_tile -= at_once;
  tile.tiles = tile.across * static_cast<std::int32_t>(ceil_div(lines, tile.lines_of_tile));
  return tile;
}

// The chunks of a tile that a thread works on: number `chunk` of the lines first, first + step, ...
// below last; and the cells that it lies in.
struct Column {
  std::int32_t chunk, first, step, last;
  std::int32_t first_cell, last_cell;

  __device__ Column(const Tile& tile, int number) {
    const int thread = threadIdx.x, down = number / tile.across * tile.lines_of_tile;
    chunk = number % tile.across * tile.columns + thread % tile.columns;
    first = down + thread / tile.columns;
    step = kThreads / tile.columns;
    const bool inside = chunk < tile.chunks && thread / tile.columns < step;
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
    const int channels = static_cast<int>(batch.channels);
    return chunk / channels * batch.column_stride + chunk % channels * batch.channel_stride;
  }

  // Of each byte of the chunk in a row of cells, a bit: whether it comes from the source.
  __device__ std::uint32_t from_own(const Tile& tile, const bool* cells) const {
    const std::uint32_t all = (std::uint32_t{1} << tile.chunk) - 1;
    if (first_cell == last_cell) return cells[first_cell] ? all : 0;
    std::uint32_t bits = 0, before = 0;
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

// Column::from_own of every line, kChunk bits each. One loop for all: what it takes to find a
// cell's end is then there once, not in each of the unrolled accesses.
__device__ inline std::uint64_t from_own(const Tile& tile, const Column& column, const bool* mask) {
  static_assert(kLinesInFlight * kChunk <= 64);
  std::uint64_t bits = 0;
#pragma unroll 1
  for (int i = 0; column.has(i); ++i) {
    const int y = cell_of(column.line(i) % tile.height, tile.height, tile.grid_height);
    const std::uint64_t of_line = column.from_own(tile, mask + std::int64_t{y} * tile.grid_width);
    bits |= of_line << i * kChunk;
  }
  return bits;
}

__device__ inline std::int64_t line_offset(const Tile& tile, const Batch& batch, int line) {
  if (tile.channels_last) return line * batch.row_stride;
  return line / tile.height * batch.channel_stride + line % tile.height * batch.row_stride;
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

// A row of the graft: image `own` onto image `other`, by a mask that the block sees.
struct Row {
  std::int64_t row, own, other;
  const bool* mask;
};

// Copies tile `number` of a row, each chunk from the image it belongs to; from both only where a
// cell ends within it.
template <int kBytes>
__device__ void copy_tile(
    const Tile& tile, int number, const Batch& images, const Batch& out, const Row& row) {
  using Word = typename Access<kBytes>::type;
  const Column column(tile, number);
  const std::uint64_t bits = from_own(tile, column, row.mask);
  const char* from = images.data + column.offset(tile, images);
  const char* from_own = from + row.own * images.batch_stride;
  const char* from_other = from + row.other * images.batch_stride;
  char* to = out.data + row.row * out.batch_stride + column.offset(tile, out);
  Word value[kLinesInFlight];
#pragma unroll
  for (int i = 0; i < kLinesInFlight; ++i) {
    if (!column.has(i)) continue;
    constexpr std::uint32_t kAll = (std::uint32_t{1} << kBytes) - 1;
    const std::uint32_t of_line = bits >> i * kChunk & kAll;
    const std::int64_t offset = line_offset(tile, images, column.line(i));
    const auto load = [offset](const char* image) {
      return *reinterpret_cast<const Word*>(image + offset);
    };
    value[i] = load(of_line == 0 ? from_other : from_own);
    if (of_line != 0 && of_line != kAll) value[i] = blend(value[i], load(from_other), of_line);
  }
#pragma unroll
  for (int i = 0; i < kLinesInFlight; ++i)
    if (column.has(i))
      *reinterpret_cast<Word*>(to + line_offset(tile, out, column.line(i))) = value[i];
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
