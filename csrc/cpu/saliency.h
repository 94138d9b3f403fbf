// Stage 1.
#pragma once

#include "../backend.h"

namespace sg_kernels::cpu {

// Sums the features or checks the ready map.
void saliency_map(const Call& call, float* map, const Context& context);

}  // namespace sg_kernels::cpu
