#include "plan.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <numeric>

namespace sg_kernels::cuda {
namespace {

// Most splits of the channels: every block of launch 2 reads the sums of all of them.
constexpr std::int64_t kMaxSplits = 16;
// Most partial sums of a sample, for the same reason: 8 per thread.
constexpr std::int64_t kMaxSums = 2048;
// Most bytes of a call's partial sums: extra memory stays below 1 MiB.
constexpr std::int64_t kPartialBytes = 1 << 20;
// Cells of a ready map that a block of launch 1 checks: 4 per thread.
constexpr std::int64_t kCellsOfATile = 1024;
// Most blocks per ready map: a batch of two already fills a device.
constexpr std::int64_t kMaxTiles = 64;

// Tiles shrink until there are this many per multiprocessor, to hide the latency of memory.
constexpr std::int64_t kTilesPerSm = 2;
// Blocks of launch 2 per multiprocessor: two rounds, so that the last to finish cost little. More
// would repeat more masks.
constexpr std::int64_t kPartsPerSm = 2 * kBlocksPerSm;

// Kernels count pixels, cells and bytes of a line in 32 bits, with room for a block that reaches
// past the end.
void check_extents(const char* name, std::initializer_list<std::int64_t> extents) {
  constexpr std::int64_t kMaxExtent = std::int64_t{1} << 30;
  STD_TORCH_CHECK(
      std::max(extents) <= kMaxExtent, name,
      ": the cuda backend takes lines, sides and maps of up to ", kMaxExtent, "; got ",
      std::max(extents));
}

std::int32_t next_power_of_2(std::int64_t n) {
  std::int32_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// Whether the address and all strides are multiples of kChunk.
template <class... Addresses>
bool aligned(const void* data, Addresses... strides) {
  return ((reinterpret_cast<std::uintptr_t>(data) | ... | static_cast<std::uintptr_t>(strides)) %
          kChunk) == 0;
}

// The stride of a dimension of size 1 means nothing.
std::int64_t stride_of(std::int64_t size, std::int64_t stride) { return size > 1 ? stride : 0; }

SaliencyPlan plan_channels_last(const Batch& features) {
  const std::int64_t element = features.element;
  const std::int32_t lanes = kChunk / static_cast<std::int32_t>(element);
  SaliencyPlan plan{};
  plan.layout = Layout::kChannelsLast;
  plan.splits = 1;
  plan.wide = features.channels % lanes == 0 &&
              aligned(
                  features.data, stride_of(features.batch, features.batch_stride),
                  stride_of(features.height, features.row_stride),
                  stride_of(features.width, features.column_stride));
  plan.chunks = static_cast<std::int32_t>(features.channels / (plan.wide ? lanes : 1));
  plan.lanes = std::min(kWarp, next_power_of_2(plan.chunks));
  plan.tiles =
      static_cast<std::int32_t>(ceil_div(features.height * features.width, kThreads / plan.lanes));
  return plan;
}

// Splits of the channels, a power of two: as many as the device runs at once.
std::int32_t splits_of(const SaliencyPlan& plan, const Batch& features, std::int64_t blocks) {
  const std::int64_t cells = features.height * features.width;
  const std::int64_t batch = std::max<std::int64_t>(1, features.batch);
  const std::int64_t rows_at_once = kThreads / plan.columns * kChunksInFlight;
  const std::int64_t most = std::min(
      {kMaxSplits, plan.rows / rows_at_once, kMaxSums / cells,
       kPartialBytes / static_cast<std::int64_t>(sizeof(float)) / (batch * cells),
       blocks / (batch * plan.tiles)});
  std::int32_t splits = 1;
  while (2 * splits <= most) splits *= 2;
  return splits;
}

SaliencyPlan plan_given(Grid map, Grid grid, std::int32_t lanes) {
  SaliencyPlan plan{};
  plan.layout = Layout::kGiven;
  plan.splits = 1;
  if (map.cells() == 0) return plan;  // nothing to check
  plan.tiles = static_cast<std::int32_t>(std::clamp<std::int64_t>(
      std::max(map.cells() / kCellsOfATile, grid.cells() * lanes / kThreads), 1, kMaxTiles));
  return plan;
}

// On one axis, the most positions of a map that a cell of the grid averages over.
std::int64_t longest_window(std::int64_t size, std::int64_t cells) {
  return cells >= size ? 1 : ceil_div(size, cells) + (size % cells != 0);
}

// The same on both axes.
std::int64_t values_of(Grid map, Grid grid) {
  return longest_window(map.height, grid.height) * longest_window(map.width, grid.width);
}

// The values, splits times window, that a thread of launch 2 adds up for all its cells.
std::int64_t terms_of(std::int64_t values, std::int64_t splits, Grid grid, std::int64_t lanes) {
  return splits * ceil_div(values, lanes) * ceil_div(grid.cells() * lanes, kThreads);
}

// Sets the width of a chunk, in bytes.
void set_chunk(
    Tile& tile, const Batch& images, const Batch& out, Grid grid, bool arithmetic,
    std::int64_t line) {
  std::int64_t addresses = line;
  for (const Batch* batch : {&images, &out}) {
    tile.dense &= batch->width <= 1 || batch->column_stride == tile.pixel;
    tile.dense &=
        !tile.channels_last || batch->channels == 1 || batch->channel_stride == batch->element;
    addresses |= static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(batch->data)) |
                 stride_of(batch->batch, batch->batch_stride) |
                 stride_of(batch->height, batch->row_stride);
    if (!tile.channels_last) addresses |= stride_of(batch->channels, batch->channel_stride);
  }
  std::int64_t ends = 0;
  for (std::int64_t cell = 1; cell < grid.width; ++cell)
    ends |= first_pixel(cell, images.width, grid.width) * tile.pixel;
  tile.chunk = static_cast<std::int32_t>(images.element);
  for (std::int32_t width = arithmetic ? kChunk : 2; width <= kChunk; width *= 2) {
    // A chunk that a cell ends in is read from both images: two chunks of half the width are
    // better.
    const bool cut =
        !arithmetic && width == kChunk && tile.chunk == kChunk / 2 && ends % kChunk == kChunk / 2;
    if (tile.dense && width > tile.chunk && addresses % width == 0 && !cut) tile.chunk = width;
  }
}

}  // namespace

SaliencyPlan plan_saliency(const Batch& features, std::int64_t blocks) {
  const std::int64_t cells = features.height * features.width, element = features.element;
  const std::int32_t lanes = kChunk / static_cast<std::int32_t>(element);
  check_extents("features", {cells, features.channels});
  if (features.channels > 1 && features.channel_stride == element)
    return plan_channels_last(features);
  SaliencyPlan plan{};
  plan.layout = Layout::kPlanes;
  plan.dense = (features.width == 1 || features.column_stride == element) &&
               (features.height == 1 || features.row_stride == features.width * element) &&
               (features.channels == 1 || features.channel_stride == cells * element);
  plan.planes = static_cast<std::int32_t>(lanes / std::gcd<std::int64_t>(lanes, cells));
  // A row of several planes must fit a block, which adds them up.
  plan.wide = plan.dense && features.channels % plan.planes == 0 &&
              (plan.planes == 1 || plan.planes * cells <= kThreads * lanes) &&
              aligned(features.data, stride_of(features.batch, features.batch_stride));
  if (!plan.wide) plan.planes = 1;
  plan.chunks = static_cast<std::int32_t>(plan.planes * cells / (plan.wide ? lanes : 1));
  plan.columns = std::min(plan.chunks, kThreads);
  plan.rows = static_cast<std::int32_t>(features.channels / plan.planes);
  plan.tiles = static_cast<std::int32_t>(ceil_div(plan.chunks, plan.columns));
  plan.splits = splits_of(plan, features, blocks);
  return plan;
}

Tile plan_tile(
    const Batch& images, const Batch& out, Grid grid, std::int64_t depth, bool arithmetic,
    int multiprocessors) {
  const std::int64_t channels = images.channels, element = images.element;
  Tile tile{};
  tile.channels_last = 0 < out.channel_stride && out.channel_stride < out.column_stride;
  const std::int64_t pixel = tile.channels_last ? channels * element : element;
  const std::int64_t line = images.width * pixel;
  const std::int64_t lines = tile.channels_last ? images.height : channels * images.height;
  check_extents(
      "images", {line, lines, (images.height + 1) * grid.height, (images.width + 1) * grid.width});
  // Sides of 0 count as 1: an empty image has a plan, too.
  const auto divisor = [](std::int64_t size) {
    return Divisor(static_cast<std::int32_t>(std::max<std::int64_t>(1, size)));
  };
  tile.height = divisor(images.height);
  tile.plane = divisor(images.height / depth);
  tile.width = divisor(images.width);
  tile.pixel = divisor(pixel);
  tile.channels = divisor(channels);
  tile.lines = static_cast<std::int32_t>(lines);
  tile.grid_height = static_cast<std::int32_t>(grid.height);
  tile.grid_width = divisor(grid.width);
  tile.dense = true;
  set_chunk(tile, images, out, grid, arithmetic, line);
  tile.chunks = static_cast<std::int32_t>(line / tile.chunk);
  const std::int32_t columns = std::clamp(tile.chunks, 1, kThreads);
  const std::int64_t across = ceil_div(tile.chunks, columns);
  tile.columns = Divisor(columns);
  tile.across = divisor(across);
  tile.step = kThreads / columns;
  tile.lines_of_tile = tile.step * kLinesInFlight;
  while (tile.lines_of_tile > tile.step &&
         out.batch * across * ceil_div(lines, tile.lines_of_tile) < kTilesPerSm * multiprocessors)
    tile.lines_of_tile -= tile.step;
  tile.tiles = static_cast<std::int32_t>(across * ceil_div(lines, tile.lines_of_tile));
  return tile;
}

// A batch as if its elements had `element` bytes.
Batch narrowed(Batch batch, std::int64_t element) {
  const std::int64_t ratio = batch.element / element;
  batch.data = reinterpret_cast<char*>(
      reinterpret_cast<std::uintptr_t>(batch.data) / static_cast<std::uintptr_t>(ratio));
  for (std::int64_t* stride :
       {&batch.batch_stride, &batch.channel_stride, &batch.row_stride, &batch.column_stride})
    *stride /= ratio;
  batch.element = element;
  return batch;
}

// The tiles of a call's images; see standardize.cuh.
Tile plan_images(const Call& call, const Batch& out, int multiprocessors) {
  const bool arithmetic = call.standardize.wanted();
  const std::int64_t element = std::min(call.images.element, out.element);
  return plan_tile(
      narrowed(call.images, element), narrowed(out, element), call.grid, call.depth, arithmetic,
      multiprocessors);
}

Plan plan_call(const Call& call, const Batch& out, int multiprocessors) {
  const Grid map = call.map, grid = call.grid;
  check_extents(
      "grid_size",
      {map.cells(), grid.cells(), (map.height + 1) * grid.height, (map.width + 1) * grid.width});
  Plan plan{};
  plan.tile = plan_images(call, out, multiprocessors);
  const std::int64_t values = values_of(map, grid);
  plan.lanes = std::min(kWarp, next_power_of_2(values));
  std::int64_t terms;
  if (call.ready) {
    plan.saliency = plan_given(map, grid, plan.lanes);
    plan.gridded = map.cells() > 0 && (map.height != grid.height || map.width != grid.width);
    terms = terms_of(1, 1, grid, 1);
  } else {
    // If the copy is too large for a single launch, launch 1 has the device for itself.
    const std::int64_t single = std::int64_t{kLargeBlocksPerSm} * multiprocessors;
    // By bytes, not by tiles: whatever the layout of out, the same features give the same map.
    constexpr std::int64_t kTileBytes = kThreads * kChunk * kLinesInFlight;
    const Batch& images = call.images;
    const std::int64_t bytes = images.channels * images.height * images.width * images.element;
    const bool alone = call.rows() * ceil_div(bytes, kTileBytes) > single;
    plan.saliency =
        plan_saliency(call.features, alone ? std::int64_t{kBlocksPerSm} * multiprocessors : single);
    terms = terms_of(values, plan.saliency.splits, grid, plan.lanes);
  }
  plan.at_once = grid.cells() <= kMaxCells && terms <= kMaxTerms;
  plan.parts = 1;
  if (plan.at_once && call.rows() > 0)
    plan.parts = static_cast<std::int32_t>(std::clamp<std::int64_t>(
        kPartsPerSm * multiprocessors / call.rows(), 1, std::max(1, plan.tile.tiles)));
  return plan;
}

}  // namespace sg_kernels::cuda
