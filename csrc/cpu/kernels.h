// What the CPU kernels take: plain pointers, sizes and strides. library.cpp fills them from
// tensors.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "../graft.h"

namespace sg_kernels::cpu {

enum class Float { kHalf, kBFloat16, kFloat, kDouble };

// A strided (batch, channels, height, width) array; strides and the element in bytes.
struct Batch {
  char* data;
  std::int64_t batch, channels, height, width;
  std::int64_t batch_stride, channel_stride, row_stride, column_stride;
  std::int64_t element;
};

struct Grid {
  std::int64_t height, width;
  std::int64_t cells() const { return height * width; }
};

struct Selection {
  float temperature;
  Normalize normalize;
  float threshold;
  std::int64_t k;  // 0: by threshold
};

struct Sampling {
  std::uint64_t seed;
  const std::int64_t* quantiles;
  std::int64_t bins;
  double prob;
  bool sampled;
};

struct Targets {
  const std::int64_t* ids;  // one of ids and rows, or neither
  const float* rows;
  std::int64_t classes;
  float smoothing;
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

inline bool in_range(std::int64_t value, std::int64_t size) { return value >= 0 && value < size; }

// Pass 1, saliency.cpp. map: (batch, height, width), contiguous.
void channel_saliency(const Batch& features, Float type, float* map);

// The stages of single cells, cells.cpp. One draw of the pairing, (batch,):
void pairing(
    std::uint64_t seed, std::int64_t draw, std::int64_t batch, bool no_fixed_points,
    std::int64_t* index);

// One sample:
void resample(const float* map, Grid from, float* grid, Grid to);
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

// Pass 2, graft.cpp: everything but the saliency.
struct Inputs {
  Batch images;
  const float* maps;  // (batch, map)
  Grid map, grid;
  const std::int64_t* index;
  Selection selection;
  Sampling sampling;
  Norm norm;
  Targets targets;
};

// One image a row; lam (rows,), mask (rows, grid), targets (rows, classes).
struct Outputs {
  Batch images;
  float* lam;
  bool* mask;
  float* targets;
};

void saliency_graft(const Inputs& inputs, const Outputs& outputs);

// out has one image a row of mask, (rows, grid).
void graft(
    const Batch& images, const bool* mask, Grid grid, const std::int64_t* index, const Batch& out);

// grad has one image a row of mask; out, their gradient, has as many as there were images. An
// element holds several numbers of `type` where it is complex.
void graft_backward(
    const Batch& grad, Float type, const bool* mask, Grid grid, const std::int64_t* index,
    const Batch& out);

}  // namespace sg_kernels::cpu
