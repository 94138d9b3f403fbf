// What a backend implements, in plain pointers, sizes and strides: csrc/cpu and csrc/cuda, each
// linked with library.cpp, which fills them from tensors, to a library of its own.
#pragma once

#include <cstdint>
#include <functional>

#include "graft.h"

namespace sg_kernels {

enum class Float { kHalf, kBFloat16, kFloat, kDouble };

// A strided (batch, channels, height, width) array; strides and the element in bytes.
struct Batch {
  char* data;
  std::int64_t batch, channels, height, width;
  std::int64_t batch_stride, channel_stride, row_stride, column_stride;
  std::int64_t element;
};

struct Selection {
  float temperature;
  Normalize normalize;
  float threshold;
  std::int64_t k;  // 0: by threshold
};

// Where the seed of a call comes from.
struct Seed {
  const std::int64_t* device;  // nullptr: it is `value`
  std::uint64_t value;
  std::int64_t* step;  // nullptr, or the number of this call, which the call advances
  std::uint32_t rank;
};

struct Draws {
  const std::int64_t* quantiles;  // of p; nullptr: it is keep_prob
  double keep_prob, prob;
  bool no_fixed_points;

  // p as a threshold, from the word that is drawn for it.
  SG_HOST_DEVICE std::int64_t p(std::uint32_t word) const {
    return quantiles == nullptr ? threshold_of(keep_prob) : keep_threshold(word, quantiles);
  }
};

struct Targets {
  const std::int64_t* ids;  // one of ids and rows, or neither
  const float* rows;
  std::int64_t classes;
  float smoothing;
};

struct Inputs {
  Batch images;
  bool ready;  // the saliency is ready_map, not the sum of features
  Batch features;
  Float features_type;
  const float* ready_map;
  Grid map, grid;
  const std::int64_t* given_index;  // or nullptr
  Seed seed;
  Selection selection;
  Draws draws;
  Norm norm;
  Targets targets;
};

// One image a row; index and lam (rows,), mask (rows, grid), targets (rows, classes); saliency
// (batch, map).
struct Outputs {
  Batch images;
  float* lam;
  std::int64_t* index;
  bool* mask;
  float* saliency;
  float* targets;
};

// Where a call runs, which concerns the GPU alone.
struct Context {
  void* stream;
  std::function<void*(std::int64_t bytes)> scratch;  // memory until the call returns
};

// map: (batch, height, width), contiguous.
void channel_saliency(const Batch& features, Float type, float* map, const Context& context);

// out has one image a row of mask, (rows, grid).
void graft(
    const Batch& images, const bool* mask, Grid grid, const std::int64_t* index, const Batch& out,
    const Context& context);

// grad has one image a row of mask; out, their gradient, has as many as there were images. An
// element holds several numbers of `type` where it is complex.
void graft_backward(
    const Batch& grad, Float type, const bool* mask, Grid grid, const std::int64_t* index,
    const Batch& out, const Context& context);

// lam, index (rows,); mixed (rows, classes).
void mix_targets(
    const Targets& targets, std::int64_t batch, const float* lam, const std::int64_t* index,
    std::int64_t rows, float* mixed, const Context& context);

void saliency_graft(const Inputs& inputs, const Outputs& outputs, const Context& context);

}  // namespace sg_kernels
