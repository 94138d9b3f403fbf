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
  work.plan = plan_saliency(features, std::int64_t{kBlocksPerSm} * multiprocessors());
  work.partials = map;
  const std::int32_t splits = work.plan.splits;
  if (splits > 1) work.partials = scratch<float>(context, splits * cells);
  launch_saliency(work, context);
  if (splits > 1)
    launch<const float*, int, std::int64_t, float*>(
        sum_splits_kernel, ceil_div(cells, kThreads), false, context, work.partials, splits, cells,
        map);
}

}  // namespace sg_kernels
