// Launch 2: from the saliency to a row's image, lam and target. If all blocks of both launches fit
// the device at once, one launch does both. Also stage 8 alone.
#include <cooperative_groups.h>

#include <algorithm>

#include "cells.cuh"
#include "copy.cuh"
#include "saliency.cuh"
#include "standardize.cuh"

namespace sg_kernels {
namespace cuda {
namespace {

// The arguments of launch 2.
struct RowsWork {
  Call call;
  Outputs outputs;
  Maps maps;
  Tile tile;
  bool at_once;        // mask and copy in one launch, else two
  std::int32_t parts;  // blocks that share a row's tiles
  const std::uint64_t* call_seed;
  float* grids;  // (rows, 2, cells), of own and other, for maps that no block can hold

  SG_HOST_DEVICE std::int64_t tasks() const { return outputs.images.batch * parts; }
};

// Per-row outputs: mask, lam, target and, if split, the full map.
__device__ void finish_row(
    const RowsWork& work, std::int64_t row, std::int64_t own, std::int64_t other, bool valid,
    const float* own_grid, const float* other_grid, const bool* mask) {
  const Call& call = work.call;
  const Outputs& outputs = work.outputs;
  const int cells = static_cast<int>(call.grid.cells());
  for (int c = threadIdx.x; c < cells; c += kThreads) outputs.mask[row * cells + c] = mask[c];
  float lam = label_ratio(own_grid, other_grid, mask, cells, call.norm);
  if (!valid) lam = NAN;
  const std::int64_t classes = call.targets.classes;
  const bool known = mix_targets(call.targets, lam, own, other, outputs.targets + row * classes);
  if (threadIdx.x == 0) outputs.lam[row] = known ? lam : NAN;
  if (work.maps.splits == 1 || row >= call.images.batch) return;
  const std::int64_t places = call.map.cells();
  for (std::int64_t i = own * places + threadIdx.x; i < (own + 1) * places; i += kThreads) {
    float sum = work.maps.partials[i];
    for (int split = 1; split < work.maps.splits; ++split)
      sum += work.maps.partials[split * call.images.batch * places + i];
    outputs.saliency[i] = sum;
  }
}

// One task of launch 2: computes a row's mask and copies a part of its tiles.
template <bool kStandardized>
__device__ void rows_task(const RowsWork& work, int task) {
  __shared__ float held[2 * kMaxCells];
  __shared__ bool mask[kMaxCells];
  const Call& call = work.call;
  const int cells = static_cast<int>(call.grid.cells());
  if (task == 0 && threadIdx.x == 0 && call.seed.step != nullptr) ++*call.seed.step;
  if (task >= work.tasks()) return;
  const int batch = static_cast<int>(call.images.batch);
  const int row = task / work.parts, part = task % work.parts;
  const int own = row % batch, draw = row / batch;
  const std::int64_t index = work.outputs.index[row];
  const bool valid = in_range(index, batch);
  const int other = valid ? static_cast<int>(index) : own;
  float* grids = work.at_once ? held : work.grids + 2 * std::int64_t{row} * cells;
  bool* kept = work.at_once ? mask : work.outputs.mask + std::int64_t{row} * cells;

  const float* own_grid = on_grid(work.maps, own, grids);
  const KeepProb drawn = call.draws.draw_keep_prob(draw, *work.call_seed);
  if (call.mask == nullptr) {
    select(own_grid, cells, call.selection, kept);
    sample(kept, own, draw, cells, drawn.p, *work.call_seed);
  } else {
    const bool* given = call.mask + std::int64_t{row} * cells;
    for (int c = threadIdx.x; c < cells; c += kThreads) kept[c] = given[c];
  }
  gate(kept, cells, drawn.grafts);
  if (part == 0) {
    const float* other_grid = on_grid(work.maps, other, grids + cells);
    finish_row(work, row, own, other, valid, own_grid, other_grid, kept);
  }
  // Last, when the registers of the stages before are free.
  if (work.at_once)
    graft_tiles<kStandardized>(
        work.tile, part, work.parts, call.standardize, call.images, work.outputs.images,
        {call.images, work.outputs.images, row, own, other, kept});
}

template <bool kStandardized>
__global__ void __launch_bounds__(kThreads, kCopyBlocksPerSm<kStandardized>)
    graft_rows_kernel(RowsWork work) {
  rows_task<kStandardized>(work, static_cast<int>(blockIdx.x));
}

// Both launches in one: the blocks wait for each other in between.
template <bool kStandardized>
__global__ void __launch_bounds__(
    kThreads, kStandardized ? kStandardizedBlocksPerSm : kLargeBlocksPerSm)
    saliency_graft_kernel(SaliencyWork saliency, RowsWork rows) {
  if (blockIdx.x < saliency.tasks()) saliency_task(saliency, blockIdx.x);
  cooperative_groups::this_grid().sync();
  rows_task<kStandardized>(rows, static_cast<int>(blockIdx.x));
}

// The arguments of stage 8 alone.
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

// Whether the device runs all these blocks of a kernel at once.
template <class Kernel>
bool fits(Kernel kernel, std::int64_t blocks, int multiprocessors) {
  if (blocks > std::int64_t{kLargeBlocksPerSm} * multiprocessors) return false;
  int per_sm = 0;
  check(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, 0),
      "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks <= std::int64_t{per_sm} * multiprocessors;
}

Maps maps_of(
    const float* partials, std::int64_t batch, Grid map, Grid grid, std::int32_t splits,
    std::int32_t lanes) {
  const auto divisor = [](std::int64_t size) { return Divisor(static_cast<std::int32_t>(size)); };
  return {partials, batch, map, divisor(grid.height), divisor(grid.width), splits, lanes};
}

// The arguments of launch 1, and its memory.
SaliencyWork saliency_work(
    const Call& call, const Outputs& outputs, const Plan& plan, const Context& context) {
  const std::int64_t batch = call.images.batch;
  SaliencyWork work{};
  work.features = call.features;
  work.features.batch = batch;
  work.type = call.features_type;
  work.plan = plan.saliency;
  work.partials = outputs.saliency;
  if (plan.saliency.splits > 1)
    work.partials = scratch<float>(context, plan.saliency.splits * batch * call.map.cells());
  if (call.ready) work.given = maps_of(call.saliency, batch, call.map, call.grid, 1, plan.lanes);
  if (plan.gridded) work.grid = scratch<float>(context, batch * call.grid.cells());
  work.pairing = {call.seed,  call.augmentations, call.draws.no_fixed_points,
                  call.index, outputs.index,      scratch<std::uint64_t>(context, 1)};
  work.pairing_tasks = work.pairing.tasks(batch);
  return work;
}

// The arguments of launch 2, and its memory.
RowsWork rows_work(
    const Call& call, const Outputs& outputs, const Plan& plan, const SaliencyWork& saliency,
    const Context& context) {
  const std::int64_t batch = call.images.batch;
  RowsWork work{};
  work.call = call;
  work.outputs = outputs;
  work.maps = plan.gridded ? maps_of(saliency.grid, batch, call.grid, call.grid, 1, 1)
                           : maps_of(
                                 saliency.partials, batch, call.map, call.grid,
                                 plan.saliency.splits, plan.lanes);
  work.tile = plan.tile;
  work.at_once = plan.at_once;
  work.parts = plan.parts;
  work.call_seed = saliency.pairing.call_seed;
  if (!plan.at_once && !work.maps.on_grid())
    work.grids = scratch<float>(context, 2 * call.rows() * call.grid.cells());
  return work;
}

}  // namespace
}  // namespace cuda

void saliency_graft(const Call& call, const Outputs& outputs, const Context& context) {
  using namespace cuda;
  const int sms = multiprocessors();
  const Plan plan = plan_call(call, outputs.images, sms);
  const SaliencyWork saliency = saliency_work(call, outputs, plan, context);
  const RowsWork rows = rows_work(call, outputs, plan, saliency, context);
  // One block at least, so that the step advances for an empty batch, too.
  const std::int64_t blocks = std::max<std::int64_t>(1, rows.tasks());
  const std::int64_t all = std::max(blocks, saliency.tasks());
  const bool standardized = call.standardize.wanted();
  const auto single = standardized ? saliency_graft_kernel<true> : saliency_graft_kernel<false>;
  if (plan.at_once && fits(single, all, sms)) {
    launch(single, all, true, context, saliency, rows);
    return;
  }
  if (saliency.tasks() > 0) launch_saliency(saliency, context);
  const auto second = standardized ? graft_rows_kernel<true> : graft_rows_kernel<false>;
  launch(second, blocks, false, context, rows);
  if (!plan.at_once)
    launch_copy(
        plan.tile, call.standardize, call.images, outputs.mask, call.grid, outputs.index,
        outputs.images, context);
}

void mix_targets(
    const Targets& targets, std::int64_t batch, const float* lam, const std::int64_t* index,
    std::int64_t rows, float* mixed, const Context& context) {
  using namespace cuda;
  if (rows == 0 || targets.classes == 0) return;
  launch(mix_targets_kernel, rows, false, context, MixTargets{targets, batch, lam, index, mixed});
}

}  // namespace sg_kernels
