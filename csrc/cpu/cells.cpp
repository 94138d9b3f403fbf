#include "cells.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace sg_kernels::cpu {

void pairing(
    std::uint64_t seed, std::int64_t draw, std::int64_t batch, bool no_fixed_points,
    std::int64_t* index) {
  std::vector<std::uint64_t> tickets(batch);
  for (std::int64_t block = 0; block * 4 < batch; ++block) {
    const Words words = philox(block, 0, draw, kPairing, seed);
    for (std::int64_t b = block * 4; b < std::min(block * 4 + 4, batch); ++b)
      tickets[b] = ticket(words.word[b % 4], b);
  }
  std::sort(tickets.begin(), tickets.end());
  const auto holder = [&](std::int64_t rank) {
    return static_cast<std::int64_t>(tickets[rank % batch] & 0xFFFFFFFFu);
  };
  for (std::int64_t rank = 0; rank < batch; ++rank)
    index[holder(rank)] = no_fixed_points ? holder(rank + 1) : rank;
}

Resampling::Resampling(Grid from, Grid to) : width_(from.width) {
  for (std::int64_t y = 0; y < to.height; ++y) rows_.push_back(window(y, from.height, to.height));
  for (std::int64_t x = 0; x < to.width; ++x) columns_.push_back(window(x, from.width, to.width));
}

void Resampling::operator()(const float* map, float* grid) const {
  for (const Window<std::int64_t>& rows : rows_)
    for (const Window<std::int64_t>& columns : columns_) {
      const std::int64_t count = (rows.end - rows.begin) * (columns.end - columns.begin);
      if (count == 1) {
        *grid++ = map[rows.begin * width_ + columns.begin];
        continue;
      }
      float sum = 0.0f;
      for (std::int64_t y = rows.begin; y < rows.end; ++y)
        for (std::int64_t x = columns.begin; x < columns.end; ++x)
          sum += map[y * width_ + x] * kHeadroom;
      *grid++ = sum / (static_cast<float>(count) * kHeadroom);
    }
}

namespace {

float normalize_scale(const float* grid, std::int64_t cells, float peak, Normalize normalize) {
  switch (normalize) {
    case Normalize::kMax: return peak;
    case Normalize::kMean:
      return static_cast<float>(std::accumulate(grid, grid + cells, 0.0) / cells);
    default: return 1.0f;
  }
}

void select_by_threshold(
    const float* grid, std::int64_t cells, float peak, const Selection& selection, bool* keep) {
  const float scale = normalize_scale(grid, cells, peak, selection.normalize);
  thread_local std::vector<float> numerators;
  numerators.resize(cells);
  double sum = 0.0;
  for (std::int64_t c = 0; c < cells; ++c) {
    numerators[c] = softmax_numerator(grid[c], peak, scale, selection.temperature);
    sum += numerators[c];
  }
  const float bar = selection.threshold * static_cast<float>(sum);
  for (std::int64_t c = 0; c < cells; ++c) keep[c] = numerators[c] > bar;
}

void select_by_rank(const float* grid, std::int64_t cells, std::int64_t k, bool* keep) {
  thread_local std::vector<std::int64_t> order;
  order.resize(cells);
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::nth_element(
      order.begin(), order.begin() + (k - 1), order.end(), [grid](std::int64_t a, std::int64_t b) {
        return grid[a] != grid[b] ? grid[a] > grid[b] : a < b;
      });
  std::fill(keep, keep + cells, false);
  for (std::int64_t i = 0; i < k; ++i) keep[order[i]] = true;
}

}  // namespace

void select(const float* grid, std::int64_t cells, const Selection& selection, bool* keep) {
  bool finite = true;
  float low = grid[0], peak = grid[0];
  for (std::int64_t c = 0; c < cells; ++c) {
    finite &= std::isfinite(grid[c]);
    low = std::min(low, grid[c]);
    peak = std::max(peak, grid[c]);
  }
  const bool by_threshold = selection.k == 0, constant = low >= peak * kFlat;
  if (!finite || (by_threshold && constant))
    std::fill(keep, keep + cells, false);
  else if (by_threshold)
    select_by_threshold(grid, cells, peak, selection, keep);
  else
    select_by_rank(grid, cells, selection.k, keep);
}

void sample(
    const bool* keep, std::int64_t own, std::int64_t draw, std::int64_t cells, std::int64_t p,
    std::uint64_t seed, bool* mask) {
  for (std::int64_t block = 0; block * 4 < cells; ++block) {
    const Words words = philox(block, own, draw, kSampling, seed);
    for (std::int64_t c = block * 4; c < std::min(block * 4 + 4, cells); ++c)
      mask[c] = keep[c] && words.word[c % 4] < p;
  }
}

void gate(bool* mask, std::int64_t cells, bool grafts) {
  if (!grafts) std::fill(mask, mask + cells, true);
}

float label_ratio(
    const float* own, const float* other, const bool* mask, std::int64_t cells, Norm norm) {
  // In double no square of a float overflows.
  double own_total = 0.0, own_kept = 0.0, other_total = 0.0, other_left = 0.0;
  std::int64_t area = 0;
  for (std::int64_t c = 0; c < cells; ++c) {
    area += mask[c];
    if (norm == Norm::kArea) continue;  // then there may be no maps
    const double own_weight = weight<double>(own[c], norm);
    const double other_weight = weight<double>(other[c], norm);
    own_total += own_weight;
    other_total += other_weight;
    own_kept += mask[c] ? own_weight : 0.0;
    other_left += mask[c] ? 0.0 : other_weight;
  }
  return sg_kernels::label_ratio(
      share(own_kept, own_total), share(other_left, other_total),
      static_cast<float>(area) / static_cast<float>(cells), norm);
}

bool mix_targets(
    const Targets& targets, float lam, std::int64_t own, std::int64_t other, float* mixed) {
  const std::int64_t classes = targets.classes;
  const float width = static_cast<float>(classes);
  if (targets.ids != nullptr) {
    const std::int64_t own_id = targets.ids[own], other_id = targets.ids[other];
    const bool known = in_range(own_id, classes) && in_range(other_id, classes);
    for (std::int64_t n = 0; n < classes; ++n)
      mixed[n] = known ? mix_target(own_id == n, other_id == n, lam, targets.smoothing, width)
                       : std::numeric_limits<float>::quiet_NaN();
    return known;
  }
  if (targets.rows == nullptr) return true;
  const float *own_row = targets.rows + own * classes, *other_row = targets.rows + other * classes;
  for (std::int64_t n = 0; n < classes; ++n)
    mixed[n] = mix_target(own_row[n], other_row[n], lam, targets.smoothing, width);
  return true;
}

}  // namespace sg_kernels::cpu
