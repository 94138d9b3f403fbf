// The floating-point types of features and gradients.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "host_device.h"

namespace sg_kernels {

enum class Float { kHalf, kBFloat16, kFloat, kDouble };

template <class T>
struct TypeTag {
  using type = T;
};

// Calls body with the TypeTag of `type`.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // host code passes a host function, device code a device function
#endif
template <class Body>
SG_HOST_DEVICE void dispatch(Float type, const Body& body) {
  switch (type) {
    case Float::kHalf: return body(TypeTag<torch::headeronly::Half>{});
    case Float::kBFloat16: return body(TypeTag<torch::headeronly::BFloat16>{});
    case Float::kFloat: return body(TypeTag<float>{});
    case Float::kDouble: return body(TypeTag<double>{});
  }
}

}  // namespace sg_kernels
