// Stage 6, where images come out standardised: as copy.cuh, but number by number. Tiles are counted
// in bytes of the narrower type, of what is read and what is written.
#pragma once

#include "copy.cuh"

namespace sg_kernels::cuda {

// Target occupancy of a kernel that copies.
template <bool kStandardized>
constexpr int kCopyBlocksPerSm = kStandardized ? kStandardizedBlocksPerSm : kBlocksPerSm;

// Neighbouring numbers that are read or written in as few accesses as possible.
template <class T, int kLanes>
struct Numbers {
  static constexpr int kBytes = kLanes * static_cast<int>(sizeof(T));
  static constexpr int kAccess = kBytes < kChunk ? kBytes : kChunk;
  static constexpr int kAccesses = kBytes / kAccess, kPerAccess = kLanes / kAccesses;
  using Word = typename Access<kAccess>::type;

  __device__ static void load(const char* from, T* numbers) {
    Word words[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) words[i] = reinterpret_cast<const Word*>(from)[i];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i)
      std::memcpy(numbers + i * kPerAccess, &words[i], sizeof(Word));
  }
  __device__ static void store(char* to, const T* numbers) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      Word word;
      std::memcpy(&word, numbers + i * kPerAccess, sizeof(Word));
      reinterpret_cast<Word*>(to)[i] = word;
    }
  }
};

// The channel of each lane of a chunk of a line.
template <int kLanes>
__device__ int channel_of(const Tile& tile, const Column& column, int line, int lane) {
  if (!tile.channels_last) return line / tile.height;
  return (column.chunk * kLanes + lane) % tile.channels;
}

// Copies tile `number` of a row.
template <class From, class To, int kLanes>
__device__ void standardize_tile(
    const Tile& tile, int number, const Standardize& standardize, const Batch& images,
    const Batch& out, const Row& row) {
  using Read = Numbers<From, kLanes>;
  using Written = Numbers<To, kLanes>;
  constexpr int kNarrow = static_cast<int>(sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  constexpr std::uint32_t kOwn = kAll<kLanes * kNarrow>;
  const Column column(tile, number);
  const std::int64_t from =
      tile.dense ? column.chunk * std::int64_t{Read::kBytes} : column.offset(tile, images);
  const std::int64_t to =
      tile.dense ? column.chunk * std::int64_t{Written::kBytes} : column.offset(tile, out);
  const std::uint64_t bits = from_own(tile, column, row.mask);
  const auto load = [&](const char* image, int i, From* numbers) {
    Read::load(image + from + line_offset(tile, images, column.line(i)), numbers);
  };
  // One line at a time: the numbers of several would not fit the registers.
#pragma unroll 1
  for (int i = 0; column.has(i); ++i) {
    const std::uint32_t own = bits >> i * kChunk & kOwn;
    From numbers[kLanes];
    load(own != 0 ? row.source : row.destination, i, numbers);
    if (own != 0 && own != kOwn) {
      From left[kLanes];
      load(row.destination, i, left);
#pragma unroll
      for (int l = 0; l < kLanes; ++l)
        if ((own >> l * kNarrow & 1) == 0) numbers[l] = left[l];
    }
    char* const target = row.to + to + line_offset(tile, out, column.line(i));
    // Access by access: those of a store are done with before the next are loaded.
    constexpr int kAtOnce = kLanes / Written::kAccesses;
#pragma unroll
    for (int first = 0; first < kLanes; first += kAtOnce) {
      To rounded[kAtOnce];
#pragma unroll
      for (int l = first; l < first + kAtOnce; ++l) {
        const int channel = channel_of<kLanes>(tile, column, column.line(i), l);
        rounded[l - first] =
            standardized<To>(numbers[l], standardize.scale[channel], standardize.shift[channel]);
      }
      Numbers<To, kAtOnce>::store(target + first * static_cast<int>(sizeof(To)), rounded);
    }
  }
}

// Copies part `part` of `parts` of a row's tiles.
__device__ inline void standardize_tiles(
    const Tile& tile, int part, int parts, const Standardize& standardize, const Batch& images,
    const Batch& out, const Row& row) {
  dispatch(standardize, [&](auto from_tag, auto to_tag) {
    using From = typename decltype(from_tag)::type;
    using To = typename decltype(to_tag)::type;
    constexpr int kLanes =
        kChunk / static_cast<int>(sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
#pragma unroll 1
    for (int number = part; number < tile.tiles; number += parts) {
      if (tile.chunk == kChunk)
        standardize_tile<From, To, kLanes>(tile, number, standardize, images, out, row);
      else
        standardize_tile<From, To, 1>(tile, number, standardize, images, out, row);
    }
  });
}

// Copies part `part` of `parts` of a row's tiles, standardised or as they are.
template <bool kStandardized>
__device__ void graft_tiles(
    const Tile& tile, int part, int parts, const Standardize& standardize, const Batch& images,
    const Batch& out, const Row& row) {
  if constexpr (kStandardized)
    standardize_tiles(tile, part, parts, standardize, images, out, row);
  else
    copy_tiles(tile, part, parts, images, out, row);
}

}  // namespace sg_kernels::cuda
