// Stage 6, where images come out standardised.
#pragma once

#include <cstdint>
#include <vector>

#include "../backend.h"

namespace sg_kernels::cpu {

// Copies neighbouring pixels of `numbers` numbers each, of channel `channel` or of all channels.
class Standardizer {
 public:
  Standardizer(const Standardize& standardize, std::int64_t width, std::int64_t numbers);
  bool wanted() const { return standardize_.wanted(); }
  void copy(
      char* to, std::int64_t to_stride, const char* from, std::int64_t from_stride,
      std::int64_t count, std::int64_t channel) const;

 private:
  Standardize standardize_;
  std::int64_t numbers_;
  std::vector<float> scale_, shift_;  // of every number of a line, where pixels have several
};

}  // namespace sg_kernels::cpu
