// How images come out standardised, for host and device: see sg_kernels/backends/reference.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace sg_kernels {

// What images are read as. They are written as one of the first three, in the order of DTYPES in
// sg_kernels/call.py.
enum class Pixel { kHalf, kBFloat16, kFloat, kByte };

struct Standardize {
  const float *scale, *shift;  // of each channel; nullptr: images are copied as they are
  Pixel from, to;

  SG_HOST_DEVICE bool wanted() const { return scale != nullptr; }
};

// Rounds after each step, since no compiler may contract the two.
template <class To, class From>
SG_HOST_DEVICE inline To standardized(From value, float scale, float shift) {
  return static_cast<To>(static_cast<float>(value) * scale + shift);
}

// Calls body with the TypeTag of what is written; From is that of what is read.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class From, class Body>
SG_HOST_DEVICE void dispatch_to(Pixel to, From from, const Body& body) {
  switch (to) {
    case Pixel::kHalf: return body(from, TypeTag<torch::headeronly::Half>{});
    case Pixel::kBFloat16: return body(from, TypeTag<torch::headeronly::BFloat16>{});
    default: return body(from, TypeTag<float>{});
  }
}

// Calls body with the TypeTags of what is read and of what is written.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Body>
SG_HOST_DEVICE void dispatch(const Standardize& standardize, const Body& body) {
  const Pixel to = standardize.to;
  switch (standardize.from) {
    case Pixel::kHalf: return dispatch_to(to, TypeTag<torch::headeronly::Half>{}, body);
    case Pixel::kBFloat16: return dispatch_to(to, TypeTag<torch::headeronly::BFloat16>{}, body);
    case Pixel::kFloat: return dispatch_to(to, TypeTag<float>{}, body);
    case Pixel::kByte: return dispatch_to(to, TypeTag<std::uint8_t>{}, body);
  }
}

}  // namespace sg_kernels
