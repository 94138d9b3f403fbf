// The stages of single cells on the CPU, cells.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../kernels.h"

namespace sg_kernels::cpu {

// What a seed decides of a row's cells.
struct Sampling {
  std::uint64_t seed;
  const Draws& draws;
};

// Runs body(begin, end) over [0, count) in threads that have enough to do each; `work` is an item's
// cost in elements.
template <class Body>
void parallel_for(std::int64_t count, std::int64_t work, const Body& body) {
  constexpr std::int64_t kWorkPerThread = 32768;
  if (count > 0)
    torch::stable::parallel_for(
        0, count, std::max<std::int64_t>(1, kWorkPerThread / std::max<std::int64_t>(1, work)),
        body);
}

// One draw of the pairing, (batch,):
void pairing(
    std::uint64_t seed, std::int64_t draw, std::int64_t batch, bool no_fixed_points,
    std::int64_t* index);

// Stage 2; which values make a cell is worked out once for all samples.
class Resampling {
 public:
  Resampling(Grid from, Grid to);
  void operator()(const float* map, float* grid) const;

 private:
  std::int64_t width_;
  std::vector<Window<std::int64_t>> rows_, columns_;
};

// One sample:
void select(const float* grid, std::int64_t cells, const Selection& selection, bool* keep);

// One row, image `own` onto image `other`, both in range:
void sample(
    const bool* keep, std::int64_t own, std::int64_t draw, std::int64_t cells,
    const Sampling& sampling, bool* mask);
float label_ratio(
    const float* own, const float* other, const bool* mask, std::int64_t cells, Norm norm);
// False where a class id is out of range, and the mixed row NaN.
bool mix_targets(
    const Targets& targets, float lam, std::int64_t own, std::int64_t other, float* mixed);

}  // namespace sg_kernels::cpu
