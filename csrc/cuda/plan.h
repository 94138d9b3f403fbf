// What a launch looks like, decided from sizes, strides and the number of multiprocessors alone.
// sg_kernels/backends/triton/plan.py describes the policy, which both backends share.
#pragma once

#include <cstdint>

#include "../backend.h"
#include "../divisor.h"

namespace sg_kernels::cuda {

constexpr int kThreads = 256;  // per block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kChunk = 16;  // bytes of the widest access

// Target occupancy, in blocks per multiprocessor; it leaves a thread 64 registers.
constexpr int kBlocksPerSm = 4;
// Lower for the gradient and the single-launch kernel, which take up to 80.
constexpr int kLargeBlocksPerSm = 3;
// Lower still where images come out standardised: sm_100 and sm_120 take more than 80 for that.
constexpr int kStandardizedBlocksPerSm = 2;

// Loads in flight per thread, of features and of images: as many as 64 registers hold.
constexpr int kChunksInFlight = 4;
constexpr int kLinesInFlight = 4;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

enum class Layout { kPlanes, kChannelsLast, kGiven };

// How launch 1 sums channels. kPlanes: it reads rows of `planes` channels, which make a row a whole
// number of chunks, and a thread adds up one chunk of many rows. kChannelsLast: `lanes`
// neighbouring threads add up the channels of a cell. kGiven: the map is ready.
struct SaliencyPlan {
  Layout layout;
  bool wide;             // a chunk is kChunk bytes, not one element
  bool dense;            // cells lie side by side
  std::int32_t planes;   // of a row
  std::int32_t chunks;   // of a row, or of a cell's channels
  std::int32_t columns;  // chunks of a row that a block reads
  std::int32_t lanes;
  std::int32_t rows;
  std::int32_t tiles, splits;  // of a sample; each split writes its own partial sums
};

// `blocks`: how many the device runs at once.
SaliencyPlan plan_saliency(const Batch& features, std::int64_t blocks);

// How images are copied. An image is lines of chunks: a line is a row of pixels of one channel, or
// in channels_last order of all channels; a chunk is the widest run of bytes of which pointers,
// strides and lines are multiples.
struct Tile {
  bool channels_last, dense;   // dense: the chunks of a line lie side by side
  Divisor height, width;       // of an image, in pixels
  Divisor plane;               // height of a plane, which the mask covers
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
    const Batch& images, const Batch& out, Grid grid, std::int64_t depth, bool arithmetic,
    int multiprocessors);

// Largest grid whose mask every block of launch 2 works out before it copies: four cells a thread,
// and 9 KiB of shared memory. Beyond this limit or the next, one block a row works out the mask,
// and a third launch copies.
constexpr std::int64_t kMaxCells = 1024;
// Most values, splits times window, that a thread of launch 2 adds up for all its cells. Triton's
// programs have half the threads, and twice the limit.
constexpr std::int64_t kMaxTerms = 64;

// Both launches of a call.
struct Plan {
  SaliencyPlan saliency;
  std::int32_t lanes;  // neighbouring threads that share the values of a cell in stage 2
  bool gridded;        // launch 1 resamples a ready map to the grid
  Tile tile;
  bool at_once;        // mask and copy in one launch, else two
  std::int32_t parts;  // blocks of launch 2 that share a row's tiles
};

Plan plan_call(const Call& call, const Batch& out, int multiprocessors);

}  // namespace sg_kernels::cuda
