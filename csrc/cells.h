// The arithmetic of single cells, for host and device: stage names as in sg_kernels/reference.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace sg_kernels {

enum class Normalize { kMax, kMean, kNone };
enum class Norm { kL1, kL2, kL2Squared, kArea };

// A map whose least value is at least this share of its peak is constant: see reference.py.
constexpr float kFlat = 1.0f - 1.0f / 65536.0f;

struct Grid {
  std::int64_t height, width;
  SG_HOST_DEVICE std::int64_t cells() const { return height * width; }
};

SG_HOST_DEVICE inline bool in_range(std::int64_t value, std::int64_t size) {
  return value >= 0 && value < size;
}

// A divisor >= 1 of numbers below 2**31, by which the GPU multiplies instead: a division takes it
// some thirty instructions.
class Divisor {
 public:
  Divisor() = default;
  SG_HOST_DEVICE explicit Divisor(std::int32_t value) : value_(value) {
    while (std::int64_t{1} << shift_ < value) ++shift_;
    const std::uint64_t dividend = std::uint64_t{1} << (31 + shift_);
    factor_ = static_cast<std::uint32_t>((dividend + value - 1) / value);
  }

  SG_HOST_DEVICE operator std::int32_t() const { return value_; }

  friend SG_HOST_DEVICE std::int32_t operator/(std::int32_t dividend, Divisor divisor) {
    const std::uint64_t product = std::uint64_t{2u * dividend} * divisor.factor_;
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(product >> 32) >> divisor.shift_);
  }
  friend SG_HOST_DEVICE std::int32_t operator%(std::int32_t dividend, Divisor divisor) {
    return dividend - dividend / divisor * divisor.value_;
  }

 private:
  std::int32_t value_ = 1, shift_ = 0;
  std::uint32_t factor_ = std::uint32_t{1} << 31;
};

template <class Int>
struct Window {
  Int begin, end;
};

// The cells of a map of `size` that cell `position` of a grid of `grid` averages over, on one axis.
// Int holds size * grid, here and below. Sizes are of type Int or, on the GPU, Divisor.
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

// A ready map's value: what is not >= 0 counts as NaN, so its sample keeps nothing.
SG_HOST_DEVICE inline float checked_saliency(float value) { return value >= 0.0f ? value : NAN; }

SG_HOST_DEVICE inline float softmax_numerator(
    float value, float peak, float scale, float temperature) {
  return expf((value - peak) / scale / temperature);
}

// What a cell weighs in ||S||, up to a factor: the norm's square root is left to label_ratio.
template <class T>
SG_HOST_DEVICE inline T weight(T value, Norm norm) {
  return norm == Norm::kL1 ? value : value * value;
}

// The share of a map's weight that survives; NaN where there is none, or it is not finite.
SG_HOST_DEVICE inline float share(double surviving, double total) {
  return total - total == 0.0 ? static_cast<float>(surviving / total) : NAN;
}

// lam, from the shares of the source and of the destination.
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
