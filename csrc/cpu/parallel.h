// How work is shared among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace sg_kernels::cpu {

// Runs body(begin, end) over [0, count); `work` is the cost of an item in elements.
template <class Body>
void parallel_for(std::int64_t count, std::int64_t work, const Body& body) {
  // As torch's own grain size: less work does not pay for waking a thread.
  constexpr std::int64_t kWorkPerThread = 32768;
  if (count > 0)
    torch::stable::parallel_for(
        0, count, std::max<std::int64_t>(1, kWorkPerThread / std::max<std::int64_t>(1, work)),
        body);
}

}  // namespace sg_kernels::cpu
