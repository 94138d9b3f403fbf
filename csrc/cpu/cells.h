// The pairing and the stages that work on the cells of one sample: 2 to 5, 7 and 8.
#pragma once

#include <vector>

#include "../backend.h"

namespace sg_kernels::cpu {

// The pairing of one draw, (batch,).
void pairing(
    std::uint64_t seed, std::int64_t draw, std::int64_t batch, bool no_fixed_points,
    std::int64_t* index);

// Stage 2; finds the window of each cell once for all samples.
class Resampling {
 public:
  Resampling(Grid from, Grid to);
  void operator()(const float* map, float* grid) const;

 private:
  std::int64_t width_;
  std::vector<Window<std::int64_t>> rows_, columns_;
};

// Stages 3 and 4 of one sample.
void select(const float* grid, std::int64_t cells, const Selection& selection, bool* keep);

// Stage 5 of image `own` in one draw: the salient cells that are kept.
void sample(
    const bool* keep, std::int64_t own, std::int64_t draw, std::int64_t cells, std::int64_t p,
    std::uint64_t seed, bool* mask);

// Stage 5: a draw that does not graft keeps all cells.
void gate(bool* mask, std::int64_t cells, bool grafts);

// Stage 7 of a row, from the maps of image `own` and image `other`.
float label_ratio(
    const float* own, const float* other, const bool* mask, std::int64_t cells, Norm norm);

// Stage 8 of a row. With a class id out of range it returns false, and the mixed row is NaN.
bool mix_targets(
    const Targets& targets, float lam, std::int64_t own, std::int64_t other, float* mixed);

}  // namespace sg_kernels::cpu
