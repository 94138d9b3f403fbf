// The whole method: launch 1 the saliency and the pairing, launch 2 all the rest; or both in one,
// where all their blocks run at once.
#include <cooperative_groups.h>

#include "cells.cuh"
#include "graft.cuh"
#include "saliency.cuh"

namespace sg_kernels {
namespace cuda {
namespace {

// Up to so many cells each block of launch 2 works out its row's mask on the way; finer grids, and
// those for which a thread adds more values than kMaxTerms, are worked out once a row in a launch
// before the graft.
constexpr std::int64_t kMaxCells = 1024;
constexpr std::int64_t kMaxTerms = 64;

struct GraftWork {
  Inputs inputs;
  Outputs outputs;
  Maps maps;
  Tile tile;
  bool at_once;        // with the mask; or the tiles are a launch of their own
  std::int32_t parts;  // blocks that share a row's tiles
  const std::uint64_t* call_seed;
  float* grids;  // (rows, 2, cells), the row's own and the other's, where no block can hold them

  SG_HOST_DEVICE std::int64_t tasks() const { return outputs.images.batch * parts; }
};

// What is a row's, not a part's: its mask, lam, target, and of a split map the whole.
__device__ void finish_row(
    const GraftWork& work, std::int64_t row, std::int64_t own, std::int64_t other, bool valid,
    const float* own_grid, const float* other_grid, const bool* mask) {
  const Inputs& inputs = work.inputs;
  const Outputs& outputs = work.outputs;
  const int cells = static_cast<int>(inputs.grid.cells());
  for (int c = threadIdx.x; c < cells; c += kThreads) outputs.mask[row * cells + c] = mask[c];
  float lam = label_ratio(own_grid, other_grid, mask, cells, inputs.norm);
  if (!valid) lam = NAN;
  const std::int64_t classes = inputs.targets.classes;
  const bool known = mix_targets(inputs.targets, lam, own, other, outputs.targets + row * classes);
  if (threadIdx.x == 0) outputs.lam[row] = known ? lam : NAN;
  if (work.maps.splits == 1 || row >= inputs.images.batch) return;
  const std::int64_t places = inputs.map.cells();
  for (std::int64_t i = own * places + threadIdx.x; i < (own + 1) * places; i += kThreads) {
    float sum = work.maps.partials[i];
    for (int split = 1; split < work.maps.splits; ++split)
      sum += work.maps.partials[split * inputs.images.batch * places + i];
    outputs.saliency[i] = sum;
  }
}

// One task of launch 2: a row's mask, and the tiles of a part of it.
__device__ void graft_task(const GraftWork& work, int task) {
  __shared__ float held[2 * kMaxCells];
  __shared__ bool mask[kMaxCells];
  const Inputs& inputs = work.inputs;
  const int cells = static_cast<int>(inputs.grid.cells());
  if (task == 0 && threadIdx.x == 0 && inputs.seed.step != nullptr) ++*inputs.seed.step;
  if (task >= work.tasks()) return;
  const int batch = static_cast<int>(inputs.images.batch);
  const int row = task / work.parts, part = task % work.parts;
  const int own = row % batch, draw = row / batch;
  const std::int64_t index = work.outputs.index[row];
  const bool valid = in_range(index, batch);
  const int other = valid ? static_cast<int>(index) : own;
  float* grids = work.at_once ? held : work.grids + 2 * std::int64_t{row} * cells;
  bool* kept = work.at_once ? mask : work.outputs.mask + std::int64_t{row} * cells;

  const float* own_grid = on_grid(work.maps, own, grids);
  select(own_grid, cells, inputs.selection, kept);
  sample(kept, own, draw, cells, inputs.draws, *work.call_seed);
  if (part == 0) {
    const float* other_grid = on_grid(work.maps, other, grids + cells);
    finish_row(work, row, own, other, valid, own_grid, other_grid, kept);
  }
  // Last, when what the stages before it hold in registers is done with.
  if (work.at_once)
    copy_tiles(
        work.tile, part, work.parts, inputs.images, work.outputs.images,
        {inputs.images, work.outputs.images, row, own, other, kept});
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm) graft_rows_kernel(GraftWork work) {
  graft_task(work, static_cast<int>(blockIdx.x));
}

// Both stages: the blocks wait for each other in between.
__global__ void __launch_bounds__(kThreads, kLargeBlocksPerSm)
    saliency_graft_kernel(SaliencyWork saliency, GraftWork graft) {
  if (blockIdx.x < saliency.tasks()) saliency_task(saliency, blockIdx.x);
  cooperative_groups::this_grid().sync();
  graft_task(graft, static_cast<int>(blockIdx.x));
}

// Whether so many blocks of a kernel run at once on the current device.
template <class Kernel>
bool fits(Kernel kernel, std::int64_t blocks) {
  const int all = multiprocessors();
  if (blocks > std::int64_t{kLargeBlocksPerSm} * all) return false;
  int per_sm = 0;
  check(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, 0),
      "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks <= std::int64_t{per_sm} * all;
}

}  // namespace
}  // namespace cuda

void saliency_graft(const Inputs& inputs, const Outputs& outputs, const Context& context) {
  using namespace cuda;
  const std::int64_t batch = inputs.images.batch, rows = outputs.images.batch;
  const Grid map = inputs.map, grid = inputs.grid;
  const auto lanes_of = [](Grid from, Grid to) {
    const auto longest = [](std::int64_t size, std::int64_t cells) {
      return cells >= size ? 1 : ceil_div(size, cells) + (size % cells != 0);
    };
    return std::min(
        kWarp, next_power_of_2(longest(from.height, to.height) * longest(from.width, to.width)));
  };

  check_extents(
      "grid_size",
      {map.cells(), grid.cells(), (map.height + 1) * grid.height, (map.width + 1) * grid.width});
  const Divisor grid_height(static_cast<std::int32_t>(grid.height));
  const Divisor grid_width(static_cast<std::int32_t>(grid.width));

  const Tile tile = plan_tile(inputs.images, outputs.images, grid, false);
  SaliencyWork saliency{};
  saliency.features = inputs.features;
  saliency.features.batch = batch;
  saliency.type = inputs.features_type;
  saliency.partials = outputs.saliency;
  Maps maps{outputs.saliency, batch, map, grid_height, grid_width, 1, lanes_of(map, grid)};
  if (inputs.ready) {
    saliency.plan = plan_given(map, grid, maps.lanes);
    saliency.given = maps;
    saliency.given.partials = inputs.ready_map;
    if (map.height != grid.height || map.width != grid.width) {
      saliency.grid = static_cast<float*>(context.scratch(batch * grid.cells() * 4));
      maps = {saliency.grid, batch, grid, grid_height, grid_width, 1, 1};
    }
  } else {
    // Where the graft is too large for one launch, the first has the device for itself.
    const bool large = rows * tile.tiles > std::int64_t{kLargeBlocksPerSm} * multiprocessors();
    saliency.plan = plan_saliency(inputs.features, large ? kBlocksPerSm : kLargeBlocksPerSm);
    maps.splits = saliency.plan.splits;
    if (maps.splits > 1)
      maps.partials = saliency.partials =
          static_cast<float*>(context.scratch(maps.splits * batch * map.cells() * 4));
  }
  auto* call_seed = static_cast<std::uint64_t*>(context.scratch(sizeof(std::uint64_t)));
  saliency.pairing = {inputs.seed,        rows,          inputs.draws.no_fixed_points,
                      inputs.given_index, outputs.index, call_seed};
  saliency.pairing_tasks = saliency.pairing.tasks(batch);

  const std::int64_t terms = maps.splits *
                             ceil_div(ceil_div(maps.map.cells(), grid.cells()), maps.lanes) *
                             ceil_div(grid.cells() * maps.lanes, kThreads);
  const bool at_once = grid.cells() <= kMaxCells && terms <= kMaxTerms;
  GraftWork graft{inputs, outputs, maps, tile, at_once, 1, call_seed, nullptr};
  if (!at_once && !maps.on_grid())
    graft.grids = static_cast<float*>(context.scratch(2 * rows * grid.cells() * 4));
  if (at_once && rows > 0)
    graft.parts = static_cast<std::int32_t>(std::clamp<std::int64_t>(
        2 * kBlocksPerSm * multiprocessors() / rows, 1, std::max(1, tile.tiles)));

  // One at least, so that the step advances for an empty batch too.
  const std::int64_t blocks = std::max<std::int64_t>(1, graft.tasks());
  const std::int64_t all = std::max(blocks, saliency.tasks());
  if (at_once && fits(saliency_graft_kernel, all)) {
    launch(saliency_graft_kernel, all, true, context, saliency, graft);
    return;
  }
  if (saliency.tasks() > 0) launch_saliency(saliency, context);
  launch(graft_rows_kernel, blocks, false, context, graft);
  if (!at_once)
    sg_kernels::graft(inputs.images, outputs.mask, grid, outputs.index, outputs.images, context);
}

}  // namespace sg_kernels
