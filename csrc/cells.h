// The arithmetic of single cells, for host and device; the functions are named as in
// sg_kernels/backends/reference.py.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace sg_kernels {

// In the order of sg_kernels/call.py, which passes positions.
enum class Normalize { kMax, kMean, kNone };
enum class Norm { kL1, kL2, kL2Squared, kArea };

// A map whose minimum is at least this share of its maximum counts as constant, because averages of
// equal values differ by rounding.
constexpr float kFlat = 1.0f - 1.0f / 65536.0f;

struct Grid {
  std::int64_t height, width;
  SG_HOST_DEVICE std::int64_t cells() const { return height * width; }
};

SG_HOST_DEVICE inline bool in_range(std::int64_t value, std::int64_t size) {
  return value >= 0 && value < size;
}

template <class Int>
struct Window {
  Int begin, end;
};

// Windows are summed at this scale, where the sum of finite values is finite: see
// reference.HEADROOM.
constexpr float kHeadroom = 1.0f / (1 << 24);

// On one axis, the cells of a map of `size` that cell `position` of a grid of `grid` averages over.
// Here and below, Int must hold size * grid, and sizes are of type Int or, on the GPU, Divisor.
template <class Int, class Size, class Cells>
SG_HOST_DEVICE inline Window<Int> window(Int position, Size size, Cells grid) {
  const Int begin = position * size / grid;
  const Int end = grid >= size ? begin + 1 : ((position + 1) * size + grid - 1) / grid;
  return {begin, end};
}

// The cell of `grid` that pixel `pixel` of `size` lies in.
template <class Int, class Size, class Cells>
SG_HOST_DEVICE inline Int cell_of(Int pixel, Size size, Cells grid) {
  return pixel * grid / size;
}

// The first pixel of `size` that lies in cell `cell` of `grid`.
template <class Int, class Size, class Cells>
SG_HOST_DEVICE inline Int first_pixel(Int cell, Size size, Cells grid) {
  return (cell * size + grid - 1) / grid;
}

// A value of a ready map: one that is not >= 0 counts as NaN, so its sample keeps nothing.
SG_HOST_DEVICE inline float checked_saliency(float value) { return value >= 0.0f ? value : NAN; }

// At least the smallest normal float: see reference.TINY.
SG_HOST_DEVICE inline float softmax_numerator(
    float value, float peak, float scale, float temperature) {
  return fmaxf(expf((value - peak) / scale / temperature), FLT_MIN);
}

// A cell's term of ||S||; label_ratio takes the square root of l2.
template <class T>
SG_HOST_DEVICE inline T weight(T value, Norm norm) {
  return norm == Norm::kL1 ? value : value * value;
}

// The surviving share of a map's total weight; NaN if the total is 0 or not finite.
SG_HOST_DEVICE inline float share(double surviving, double total) {
  return total - total == 0.0 ? static_cast<float>(surviving / total) : NAN;
}

// lam, from the surviving shares of source and destination.
SG_HOST_DEVICE inline float label_ratio(float kept, float left, float area, Norm norm) {
  if (norm == Norm::kArea) return area;
  if (norm == Norm::kL2) {
    kept = sqrtf(kept);
    left = sqrtf(left);
  }
  const float ratio = kept / (kept + left);
  return ratio - ratio == 0.0f ? ratio : area;
}

SG_HOST_DEVICE inline float mix_target(
    float own, float other, float lam, float smoothing, float classes) {
  return (1.0f - smoothing) * (lam * own + (1.0f - lam) * other) + smoothing / classes;
}

}  // namespace sg_kernels
