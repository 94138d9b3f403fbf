// Division by numbers that are known before a launch.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sg_kernels {

// Divides numbers in 0 .. 2**31 - 1 by a value >= 1 with a multiplication and a shift: an integer
// division takes a GPU some thirty instructions.
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

}  // namespace sg_kernels
