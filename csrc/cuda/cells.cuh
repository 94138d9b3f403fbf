// The stages that a block computes on the cells of a row: 2 to 5, 7 and 8; the functions are named
// as in sg_kernels/backends/reference.py.
#pragma once

#include "block.cuh"

namespace sg_kernels::cuda {

// The maps of a batch as `splits` partial sums, (splits, batch, map), and the grid that they are
// resampled to.
struct Maps {
  const float* partials;
  std::int64_t batch;
  Grid map;
  Divisor grid_height, grid_width;
  std::int32_t splits;
  std::int32_t lanes;  // neighbouring threads that share the values of a cell, a power of two

  SG_HOST_DEVICE int cells() const { return grid_height * grid_width; }
  SG_HOST_DEVICE bool on_grid() const {
    return map.cells() == 0 ||
           (splits == 1 && map.height == grid_height && map.width == grid_width);
  }
};

// Stage 2: the value of a cell, the average of taken(value) over its window. All lanes of a group
// must call.
template <class Taken>
__device__ float resample(
    const Maps& maps, std::int64_t sample, int cell, int lane, const Taken& taken) {
  const int width = static_cast<int>(maps.map.width), height = static_cast<int>(maps.map.height);
  float sum = 0.0f, count = 1.0f;
  if (cell < maps.cells()) {
    const Window<int> rows = window(cell / maps.grid_width, height, maps.grid_height);
    const Window<int> columns = window(cell % maps.grid_width, width, maps.grid_width);
    const float* map = maps.partials + sample * maps.map.cells();
    int y = rows.begin;
    for (int x = columns.begin + lane;; x += maps.lanes) {
      for (; x >= columns.end; x -= columns.end - columns.begin) ++y;
      if (y >= rows.end) break;
      const float* value = map + y * width + x;
      float whole = *value;
      for (int split = 1; split < maps.splits; ++split)
        whole += value[split * maps.batch * maps.map.cells()];
      sum += taken(whole) * kHeadroom;
    }
    count = static_cast<float>((rows.end - rows.begin) * (columns.end - columns.begin));
  }
  count *= kHeadroom;
  return reduce_lanes(sum, maps.lanes, [](float a, float b) { return a + b; }) / count;
}

// Calls body(cell, lane) for part `part` of `parts` of the cells, and for some cells past the last,
// so that the lanes of a group stay together.
template <class Body>
__device__ void for_each_cell(const Maps& maps, int part, int parts, const Body& body) {
  const int groups = kThreads / maps.lanes;
  const int group = threadIdx.x / maps.lanes, lane = threadIdx.x % maps.lanes;
  for (int first = part * groups; first < maps.cells(); first += parts * groups)
    body(first + group, lane);
}

// A sample's map on the grid: the map itself, or resampled into `storage`, which the whole block
// shares.
__device__ inline const float* on_grid(const Maps& maps, std::int64_t sample, float* storage) {
  if (maps.on_grid()) return maps.partials + sample * maps.map.cells();
  for_each_cell(maps, 0, 1, [&](int cell, int lane) {
    const float value = resample(maps, sample, cell, lane, [](float whole) { return whole; });
    if (cell < maps.cells() && lane == 0) storage[cell] = value;
  });
  __syncthreads();
  return storage;
}

__device__ inline float normalize_scale(
    const float* grid, int cells, float peak, Normalize normalize) {
  if (normalize == Normalize::kMax) return peak;
  if (normalize == Normalize::kNone) return 1.0f;
  double sum = 0.0;
  for (int c = threadIdx.x; c < cells; c += kThreads) sum += grid[c];
  return static_cast<float>(sum_block(sum) / cells);
}

__device__ inline void select_by_threshold(
    const float* grid, int cells, float peak, const Selection& selection, bool* keep) {
  const float scale = normalize_scale(grid, cells, peak, selection.normalize);
  double sum = 0.0;
  for (int c = threadIdx.x; c < cells; c += kThreads)
    sum += softmax_numerator(grid[c], peak, scale, selection.temperature);
  const float bar = selection.threshold * static_cast<float>(sum_block(sum));
  for (int c = threadIdx.x; c < cells; c += kThreads)
    keep[c] = softmax_numerator(grid[c], peak, scale, selection.temperature) > bar;
}

// Keeps the k largest, of equal ones the first. Each cell's value and number form one integer; a
// search bit by bit finds the k-th largest of these.
__device__ inline void select_by_rank(const float* grid, int cells, std::int64_t k, bool* keep) {
  int shift = 0;
  while (1 << shift < cells) ++shift;
  const auto key = [&](int c) {
    // The bits of floats >= 0 are ordered as the floats are; -0 becomes 0.
    const std::uint64_t value = __float_as_uint(grid[c] + 0.0f);
    return value << shift | static_cast<std::uint64_t>((1 << shift) - 1 - c);
  };
  std::uint64_t bar = 0;
  for (int bit = 30 + shift; bit >= 0; --bit) {
    const std::uint64_t raised = bar | std::uint64_t{1} << bit;
    int count = 0;
    for (int c = threadIdx.x; c < cells; c += kThreads) count += key(c) >= raised;
    if (sum_block(count) >= k) bar = raised;
  }
  for (int c = threadIdx.x; c < cells; c += kThreads) keep[c] = key(c) >= bar;
}

// Stages 3 and 4.
__device__ inline void select(
    const float* grid, int cells, const Selection& selection, bool* keep) {
  // fmaxf ignores NaN, so a value that is not finite counts as an infinite peak. The minimum is
  // negated, so that both are maxima.
  float extremes[2] = {-INFINITY, -INFINITY};
  for (int c = threadIdx.x; c < cells; c += kThreads) {
    const bool finite = grid[c] - grid[c] == 0.0f;
    extremes[0] = fmaxf(extremes[0], finite ? grid[c] : INFINITY);
    extremes[1] = fmaxf(extremes[1], -grid[c]);
  }
  reduce_block(extremes, [](float a, float b) { return fmaxf(a, b); });
  const float peak = extremes[0], low = -extremes[1];
  const bool by_threshold = selection.k == 0;
  if (peak == INFINITY || (by_threshold && low >= peak * kFlat))
    for (int c = threadIdx.x; c < cells; c += kThreads) keep[c] = false;
  else if (by_threshold)
    select_by_threshold(grid, cells, peak, selection, keep);
  else
    select_by_rank(grid, cells, selection.k, keep);
}

// Stage 5, in place: the salient cells that are kept. A thread samples the cells that it selected,
// so no barrier is needed before.
__device__ inline void sample(
    bool* mask, std::int64_t own, std::int64_t draw, int cells, std::int64_t p,
    std::uint64_t seed) {
  for (int c = threadIdx.x; c < cells; c += kThreads)
    if (mask[c]) mask[c] = stream_word(c, own, draw, kSampling, seed) < p;
}

// Stage 5, in place: a draw that does not graft keeps all cells.
__device__ inline void gate(bool* mask, int cells, bool grafts) {
  for (int c = threadIdx.x; c < cells && !grafts; c += kThreads) mask[c] = true;
  __syncthreads();
}

// Stage 7.
__device__ inline float label_ratio(
    const float* own, const float* other, const bool* mask, int cells, Norm norm) {
  // In double no square of a float overflows. The total and kept weight of own, the total and left
  // weight of other, and the area.
  double sums[5] = {};
  for (int c = threadIdx.x; c < cells; c += kThreads) {
    sums[4] += mask[c];
    if (norm == Norm::kArea) continue;  // then there may be no maps
    const double own_weight = weight<double>(own[c], norm);
    const double other_weight = weight<double>(other[c], norm);
    sums[0] += own_weight;
    sums[1] += mask[c] ? own_weight : 0.0;
    sums[2] += other_weight;
    sums[3] += mask[c] ? 0.0 : other_weight;
  }
  sum_block(sums);
  return sg_kernels::label_ratio(
      share(sums[1], sums[0]), share(sums[3], sums[2]),
      static_cast<float>(sums[4]) / static_cast<float>(cells), norm);
}

// Stage 8. With a class id out of range it returns false, and the mixed row is NaN.
__device__ inline bool mix_targets(
    const Targets& targets, float lam, std::int64_t own, std::int64_t other, float* mixed) {
  const std::int64_t classes = targets.classes;
  const float width = static_cast<float>(classes);
  if (targets.ids != nullptr) {
    const std::int64_t own_id = targets.ids[own], other_id = targets.ids[other];
    const bool known = in_range(own_id, classes) && in_range(other_id, classes);
    for (std::int64_t n = threadIdx.x; n < classes; n += kThreads)
      mixed[n] =
          known ? mix_target(own_id == n, other_id == n, lam, targets.smoothing, width) : NAN;
    return known;
  }
  if (targets.rows == nullptr) return true;
  const float *own_row = targets.rows + own * classes, *other_row = targets.rows + other * classes;
  for (std::int64_t n = threadIdx.x; n < classes; n += kThreads)
    mixed[n] = mix_target(own_row[n], other_row[n], lam, targets.smoothing, width);
  return true;
}

}  // namespace sg_kernels::cuda
