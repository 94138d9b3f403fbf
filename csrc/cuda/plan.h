// What a call launches: pure functions of sizes, strides and the number of multiprocessors. The
// same policy as in sg_kernels/backends/triton/plan.py; no CUDA in here.
#pragma once

#include <cstdint>

#include "../backend.h"
#include "../divisor.h"

namespace sg_kernels::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kChunk = 16;  // bytes of the widest access

// Blocks that registers must leave room for on a multiprocessor, so that enough loads are in
// flight:
constexpr int kBlocksPerSm = 4;
// of the gradient and of the single launch, which would spill at four.
constexpr int kLargeBlocksPerSm = 3;

// Loads that a thread has in flight: chunks of the features, lines of an image.
constexpr int kChunksInFlight = 4;
constexpr int kLinesInFlight = 4;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

enum class Layout { kPlanes, kChannelsLast, kGiven };

// How launch 1 reads a map's channels. kPlanes: rows of `planes` channels each, so many that a row
// is a whole number of chunks; a thread adds up one chunk of many rows. kChannelsLast: `lanes`
// neighbouring threads add up the channels of a cell. kGiven: the map is ready.
struct SaliencyPlan {
  Layout layout;
  bool wide, dense;      // chunks of kChunk bytes, not of one element; cells lie side by side
  std::int32_t planes;   // of a row
  std::int32_t chunks;   // of a row, or of a cell's channels
  std::int32_t columns;  // chunks of a row that a block reads
  std::int32_t lanes;
  std::int32_t rows;
  std::int32_t tiles, splits;  // of a sample; each split writes its own partial sums
};

// `blocks`: how many run at once.
SaliencyPlan plan_saliency(const Batch& features, std::int64_t blocks);

// How images are copied. An image is lines of chunks: a line is a row of pixels of one channel, or
// in channels_last order of all channels; a chunk is the widest run of bytes of which pointers,
// strides and lines are multiples.
struct Tile {
  bool channels_last, dense;   // dense: the chunks of a line lie side by side
  Divisor height, width;       // of an image, in pixels
  Divisor pixel;               // bytes of a pixel, with one channel or with all
  Divisor channels;            // of a pixel with all
  std::int32_t chunk;          // in bytes
  std::int32_t chunks, lines;  // of a line; of an image
  Divisor columns;             // chunks of a line that a block copies side by side
  std::int32_t step;           // lines that a block copies at once
  std::int32_t lines_of_tile;
  Divisor across;      // tiles of a line
  std::int32_t tiles;  // of an image
  std::int32_t grid_height;
  Divisor grid_width;
};

// For `arithmetic` a chunk is kChunk bytes or one element, and a cell may end within it at no cost.
Tile plan_tile(
    const Batch& images, const Batch& out, Grid grid, bool arithmetic, int multiprocessors);

// Cells up to which every block of launch 2 works out its row's mask and copies: they take 9 KiB of
// shared memory, and at most four rounds of a block. The mask of a finer grid is worked out once a
// row, and a third launch copies.
constexpr std::int64_t kMaxCells = 1024;
// The same limit for the values, of all splits and windows, that a thread adds up for its cells.
constexpr std::int64_t kMaxTerms = 64;

// Both launches of a call.
struct Plan {
  SaliencyPlan saliency;
  std::int32_t lanes;  // neighbouring threads that share the values of a cell in stage 2
  bool resampled;      // launch 1 resamples a ready map, and launch 2 finds it on the grid
  Tile tile;
  bool at_once;        // launch 2 copies, too; otherwise a third launch does
  std::int32_t parts;  // blocks of launch 2 that share a row's tiles
};

Plan plan_call(const Call& call, const Batch& out, int multiprocessors);

}  // namespace sg_kernels::cuda
