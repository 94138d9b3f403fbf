// Launch 1, and stage 1 alone.
#include "saliency.cuh"

namespace sg_kernels {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    sum_splits_kernel(const float* partials, int splits, std::int64_t cells, float* map) {
  const std::int64_t cell = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (cell >= cells) return;
  float sum = partials[cell];
  for (int split = 1; split < splits; ++split) sum += partials[split * cells + cell];
  map[cell] = sum;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm) saliency_kernel(SaliencyWork work) {
  saliency_task(work, blockIdx.x);
}

}  // namespace

void launch_saliency(const SaliencyWork& work, const Context& context) {
  launch(saliency_kernel, work.tasks(), false, context, work);
}

}  // namespace cuda

void channel_saliency(const Batch& features, Float type, float* map, const Context& context) {
  using namespace cuda;
  const std::int64_t cells = features.batch * features.height * features.width;
  if (cells == 0) return;
  SaliencyWork work{};
  work.features = features;
  work.type = type;
  work.plan = plan_saliency(features, kBlocksPerSm);
  work.partials = map;
  if (work.plan.splits > 1)
    work.partials = static_cast<float*>(context.scratch(work.plan.splits * cells * 4));
  launch_saliency(work, context);
  if (work.plan.splits > 1)
    launch<const float*, int, std::int64_t, float*>(
        sum_splits_kernel, ceil_div(cells, kThreads), false, context, work.partials,
        work.plan.splits, cells, map);
}

}  // namespace sg_kernels
