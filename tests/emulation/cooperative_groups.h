// The grid's barrier from cuda_runtime.h, under CUDA's name.
#pragma once

#include <cuda_runtime.h>

namespace cooperative_groups {

struct grid_group {
  void sync() const { emulation::wait(emulation::At::kGrid); }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
