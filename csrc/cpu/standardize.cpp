#include "standardize.h"

#include <cstring>

namespace sg_kernels::cpu {
namespace {

// Numbers side by side. `scale_of` and `shift_of` tell those of each.
template <class From, class To, class Scale, class Shift>
void standardize_dense(
    char* to, const char* from, std::int64_t count, const Scale& scale_of, const Shift& shift_of) {
  const From* __restrict source = reinterpret_cast<const From*>(from);
  To* __restrict target = reinterpret_cast<To*>(to);
  for (std::int64_t i = 0; i < count; ++i)
    target[i] = standardized<To>(source[i], scale_of(i), shift_of(i));
}

}  // namespace

Standardizer::Standardizer(const Standardize& standardize, std::int64_t width, std::int64_t numbers)
    : standardize_(standardize), numbers_(numbers) {
  if (!wanted() || numbers == 1) return;
  for (std::int64_t x = 0; x < width; ++x) {
    scale_.insert(scale_.end(), standardize.scale, standardize.scale + numbers);
    shift_.insert(shift_.end(), standardize.shift, standardize.shift + numbers);
  }
}

void Standardizer::copy(
    char* to, std::int64_t to_stride, const char* from, std::int64_t from_stride,
    std::int64_t count, std::int64_t channel) const {
  const float scale = standardize_.scale[channel], shift = standardize_.shift[channel];
  dispatch(standardize_, [&](auto from_tag, auto to_tag) {
    using From = typename decltype(from_tag)::type;
    using To = typename decltype(to_tag)::type;
    if (numbers_ > 1)
      standardize_dense<From, To>(
          to, from, count * numbers_, [this](std::int64_t i) { return scale_[i]; },
          [this](std::int64_t i) { return shift_[i]; });
    else if (from_stride == sizeof(From) && to_stride == sizeof(To))
      standardize_dense<From, To>(
          to, from, count, [=](std::int64_t) { return scale; },
          [=](std::int64_t) { return shift; });
    else
      for (std::int64_t x = 0; x < count; ++x)
        standardize_dense<From, To>(
            to + x * to_stride, from + x * from_stride, 1, [=](std::int64_t) { return scale; },
            [=](std::int64_t) { return shift; });
  });
}

}  // namespace sg_kernels::cpu
