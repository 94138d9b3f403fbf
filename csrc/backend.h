// What a backend implements, in plain pointers, sizes and strides. csrc/cpu and csrc/cuda define
// the functions below; operators.cpp calls them with what it reads from tensors.
#pragma once

#include <cstdint>
#include <functional>

#include "cells.h"
#include "dtype.h"
#include "philox.h"
#include "standardize.h"

namespace sg_kernels {

// A strided (batch, channels, height, width) array; strides and the element in bytes.
struct Batch {
  char* data;
  std::int64_t batch, channels, height, width;
  std::int64_t batch_stride, channel_stride, row_stride, column_stride;
  std::int64_t element;

  std::int64_t pixels() const { return batch * channels * height * width; }
};

// The source of a call's randomness.
struct Seed {
  const std::int64_t* device;  // where the seed lies on the GPU; nullptr: it is `value`
  std::uint64_t value;
  std::int64_t* step;  // the number of this call, which the call advances; nullptr: none
  std::uint32_t rank;
};

// Stages 3 and 4.
struct Selection {
  float temperature;
  Normalize normalize;
  float threshold;
  std::int64_t k;  // 0: by threshold
};

// What the rows of a draw share in stage 5: p as a threshold of words, and whether they are grafted
// at all.
struct KeepProb {
  std::int64_t p;
  bool grafts;
};

// Stage 5 and the pairing.
struct Draws {
  const std::int64_t* quantiles;  // of p; nullptr: p is keep_prob
  double keep_prob, prob;
  bool no_fixed_points;

  SG_HOST_DEVICE KeepProb draw_keep_prob(std::int64_t draw, std::uint64_t seed) const {
    const Words words = philox(0, 0, draw, kKeepProb, seed);
    const std::int64_t p =
        quantiles == nullptr ? threshold_of(keep_prob) : keep_threshold(words.word[0], quantiles);
    return {p, words.word[1] < threshold_of(prob)};
  }
};

// Stage 8: class ids or dense rows; without targets neither, and no classes.
struct Targets {
  const std::int64_t* ids;
  const float* rows;
  std::int64_t classes;
  float smoothing;
};

// The operator's arguments; see sg_kernels/call.py.
struct Call {
  Batch images;
  std::int64_t augmentations;
  bool ready;  // stage 1 takes the map `saliency`, otherwise `features`
  Batch features;
  Float features_type;
  const float* saliency;
  Grid map, grid;             // the map has no cells if the call needs none
  const bool* mask;           // (rows, grid), in place of stages 3 to 5; nullptr: they choose it
  const std::int64_t* index;  // nullptr: the pairing is drawn
  Seed seed;
  Selection selection;
  Draws draws;
  Norm norm;
  Targets targets;
  std::int64_t depth;  // planes of an image, each with a mask, one above the other
  Standardize standardize;

  SG_HOST_DEVICE std::int64_t rows() const { return augmentations * images.batch; }
};

// images has a row per output; lam and index (rows,), mask (rows, grid), targets (rows, classes);
// saliency (batch, map).
struct Outputs {
  Batch images;
  float* lam;
  std::int64_t* index;
  bool* mask;
  float* saliency;
  float* targets;
};

// Where a call runs; only the GPU needs it.
struct Context {
  void* stream;
  std::function<void*(std::int64_t bytes)> scratch;  // memory that lasts until the call returns
};

// map: (batch, height, width), contiguous.
void channel_saliency(const Batch& features, Float type, float* map, const Context& context);

// out has an image for each row of mask, (rows, grid).
void graft(
    const Batch& images, const bool* mask, Grid grid, const std::int64_t* index, const Batch& out,
    const Context& context);

// grad has an image for each row of mask; out, the gradient of the images, has one for each of
// them. A complex element is two numbers of `type`.
void graft_backward(
    const Batch& grad, Float type, const bool* mask, Grid grid, const std::int64_t* index,
    const Batch& out, const Context& context);

// lam and index: (rows,); mixed: (rows, classes).
void mix_targets(
    const Targets& targets, std::int64_t batch, const float* lam, const std::int64_t* index,
    std::int64_t rows, float* mixed, const Context& context);

void saliency_graft(const Call& call, const Outputs& outputs, const Context& context);

}  // namespace sg_kernels
