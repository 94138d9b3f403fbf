// Stage 6 alone, with its gradient; stage 8 alone.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "cells.cuh"
#include "graft.cuh"

namespace sg_kernels {
namespace cuda {
namespace {

// Which image a row is grafted onto; its own, where its index is out of range.
__device__ std::int64_t destination(std::int64_t other, std::int64_t own, std::int64_t batch) {
  return in_range(other, batch) ? other : own;
}

// A block for each tile of each row.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) graft_kernel(
    Tile tile, Batch images, const bool* mask, Grid grid, const std::int64_t* index, Batch out) {
  const std::int64_t row = blockIdx.x / tile.tiles, own = row % images.batch;
  const std::int64_t other = destination(index[row], own, images.batch);
  const int number = static_cast<int>(blockIdx.x % tile.tiles);
  copy_tiles(
      tile, number, tile.tiles, images, out,
      {images, out, row, own, other, mask + row * grid.cells()});
}

struct GraftBackward {
  Tile tile;
  Batch grad;
  const bool* mask;
  Grid grid;
  const std::int64_t* index;
  Batch out;
};

// A block for each tile of each image adds what every row took from it: its own rows, in order,
// then those grafted onto it, in order. Nothing is added atomically, so it gives the same every
// time.
template <class T, int kLanes>
__device__ void add_tile(const GraftBackward& work) {
  using Numbers = Chunk<T, kLanes>;
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  __shared__ unsigned found[kWarps];
  const Tile& tile = work.tile;
  const Batch &grad = work.grad, &out = work.out;
  const int number = static_cast<int>(blockIdx.x % tile.tiles), thread = threadIdx.x;
  const std::int64_t image = blockIdx.x / tile.tiles, batch = out.batch, rows = grad.batch;
  const Column column(tile, number);
  const char* from = grad.data + column.offset(tile, grad);
  Sum total[kLinesInFlight][kLanes] = {};

  const auto add = [&](std::int64_t row, bool own) {
    std::uint64_t bits = from_own(tile, column, work.mask + row * work.grid.cells());
    if (!own) bits = ~bits;
    const auto of_line = [bits](int i) -> std::uint32_t {
      return bits >> i * kChunk & kAll<Numbers::kBytes>;
    };
    const char* from_row = from + row * grad.batch_stride;
    Numbers value[kLinesInFlight] = {};
#pragma unroll
    for (int i = 0; i < kLinesInFlight; ++i)
      if (column.has(i) && of_line(i) != 0)
        value[i] = Numbers::load(from_row + line_offset(tile, grad, column.line(i)));
#pragma unroll
    for (int i = 0; i < kLinesInFlight; ++i) {
      // Cleared as one word: a lane chosen by itself would be loaded by itself.
      const Numbers taken{blend(value[i].word, typename Numbers::Word{}, of_line(i))};
#pragma unroll
      for (int l = 0; l < kLanes; ++l) total[i][l] += static_cast<Sum>(taken.lane(l));
    }
  };

  for (std::int64_t row = image; row < rows; row += batch) add(row, true);
  for (std::int64_t begin = 0; begin < rows; begin += kThreads) {
    const std::int64_t row = begin + thread;
    const bool onto = row < rows && destination(work.index[row], row % batch, batch) == image;
    const unsigned ballot = __ballot_sync(kAllLanes, onto);
    if (thread % kWarp == 0) found[thread / kWarp] = ballot;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp)
      for (unsigned left = found[warp]; left != 0; left &= left - 1)
        add(begin + warp * kWarp + __ffs(static_cast<int>(left)) - 1, false);
    __syncthreads();
  }

  char* to = out.data + image * out.batch_stride + column.offset(tile, out);
#pragma unroll
  for (int i = 0; i < kLinesInFlight; ++i)
    if (column.has(i)) Numbers::of(total[i]).store(to + line_offset(tile, out, column.line(i)));
}

// Chunks are as wide as they can be, or an element: one number or, where it is complex, two.
template <class T>
__global__ void __launch_bounds__(kThreads, kLargeBlocksPerSm)
    graft_backward_kernel(GraftBackward work) {
  constexpr int kSize = static_cast<int>(sizeof(T));
  if (work.tile.chunk == kChunk) return add_tile<T, kChunk / kSize>(work);
  if constexpr (kChunk > 2 * kSize)
    if (work.tile.chunk == 2 * kSize) return add_tile<T, 2>(work);
  add_tile<T, 1>(work);
}

struct MixTargets {
  Targets targets;
  std::int64_t batch;
  const float* lam;
  const std::int64_t* index;
  float* mixed;
};

// A block for each row.
__global__ void __launch_bounds__(kThreads) mix_targets_kernel(MixTargets work) {
  const std::int64_t row = blockIdx.x, own = row % work.batch, other = work.index[row];
  const float lam = in_range(other, work.batch) ? work.lam[row] : NAN;
  mix_targets(
      work.targets, lam, own, destination(other, own, work.batch),
      work.mixed + row * work.targets.classes);
}

std::int64_t pixels(const Batch& batch) {
  return batch.batch * batch.channels * batch.height * batch.width;
}

}  // namespace
}  // namespace cuda

void graft(
    const Batch& images, const bool* mask, Grid grid, const std::int64_t* index, const Batch& out,
    const Context& context) {
  using namespace cuda;
  if (pixels(out) == 0) return;
  const Tile tile = plan_tile(images, out, grid, false);
  launch(
      graft_kernel, out.batch * tile.tiles, false, context, tile, images, mask, grid, index, out);
}

void graft_backward(
    const Batch& grad, Float type, const bool* mask, Grid grid, const std::int64_t* index,
    const Batch& out, const Context& context) {
  using namespace cuda;
  if (pixels(out) == 0) return;
  const GraftBackward work{plan_tile(grad, out, grid, true), grad, mask, grid, index, out};
  const std::int64_t blocks = out.batch * work.tile.tiles;
  const auto start = [&](auto kernel) { launch(kernel, blocks, false, context, work); };
  switch (type) {
    case Float::kHalf: return start(graft_backward_kernel<torch::headeronly::Half>);
    case Float::kBFloat16: return start(graft_backward_kernel<torch::headeronly::BFloat16>);
    case Float::kFloat: return start(graft_backward_kernel<float>);
    case Float::kDouble: return start(graft_backward_kernel<double>);
  }
}

void mix_targets(
    const Targets& targets, std::int64_t batch, const float* lam, const std::int64_t* index,
    std::int64_t rows, float* mixed, const Context& context) {
  using namespace cuda;
  if (rows == 0 || targets.classes == 0) return;
  launch(mix_targets_kernel, rows, false, context, MixTargets{targets, batch, lam, index, mixed});
}

}  // namespace sg_kernels
