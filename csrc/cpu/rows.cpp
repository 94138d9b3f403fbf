// Pass 2: from the saliency to a row's image, lam and target. Also stage 8 alone.
#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "cells.h"
#include "copy.h"
#include "saliency.h"

namespace sg_kernels {
namespace cpu {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The seed of this call; advances the step.
std::uint64_t advance(const Seed& seed) {
  if (seed.step == nullptr) return seed.value;
  return call_seed(seed.value, static_cast<std::uint64_t>((*seed.step)++), seed.rank);
}

void fill_index(const Call& call, std::uint64_t seed, std::int64_t* index) {
  const std::int64_t batch = call.images.batch;
  if (call.index != nullptr)
    std::copy_n(call.index, call.rows(), index);
  else
    for (std::int64_t draw = 0; batch > 0 && draw < call.augmentations; ++draw)
      pairing(seed, draw, batch, call.draws.no_fixed_points, index + draw * batch);
}

// A thread's work on strips, and what it keeps of the row at hand.
class RowWorker {
 public:
  RowWorker(
      const Call& call, const Outputs& outputs, std::uint64_t seed, const Resampling& resample)
      : call_(call),
        outputs_(outputs),
        seed_(seed),
        resample_(resample),
        resampled_(
            call.map.cells() > 0 &&
            (call.map.height != call.grid.height || call.map.width != call.grid.width)),
        cells_(call.grid.cells()),
        grafter_(call.images, call.grid, call.depth, call.standardize, outputs.images),
        own_grid_(resampled_ ? cells_ : 0),
        other_grid_(resampled_ ? cells_ : 0),
        keep_(std::make_unique<bool[]>(cells_)),
        mask_(std::make_unique<bool[]>(cells_)) {}

  void work_on(const Strip& strip) {
    const float* own_grid = on_grid(strip.own, own_grid_);
    const std::int64_t draw = strip.row / call_.images.batch;
    const KeepProb drawn = call_.draws.draw_keep_prob(draw, seed_);
    if (call_.mask == nullptr) {
      select(own_grid, cells_, call_.selection, keep_.get());
      sample(keep_.get(), strip.own, draw, cells_, drawn.p, seed_, mask_.get());
    } else {
      std::copy_n(call_.mask + strip.row * cells_, cells_, mask_.get());
    }
    gate(mask_.get(), cells_, drawn.grafts);
    grafter_.graft(mask_.get(), strip);
    if (strip.first == 0) finish_row(strip, own_grid);
  }

 private:
  // A sample's map on the grid, in `storage` if it has to be resampled.
  const float* on_grid(std::int64_t sample, std::vector<float>& storage) const {
    const float* map = outputs_.saliency + sample * call_.map.cells();
    if (!resampled_) return map;
    resample_(map, storage.data());
    return storage.data();
  }

  // Per-row outputs: mask, lam and target.
  void finish_row(const Strip& strip, const float* own_grid) {
    std::copy_n(mask_.get(), cells_, outputs_.mask + strip.row * cells_);
    const float* other_grid = on_grid(strip.other, other_grid_);
    const float ratio = label_ratio(own_grid, other_grid, mask_.get(), cells_, call_.norm);
    const float lam = strip.valid ? ratio : kNaN;
    float* mixed = outputs_.targets + strip.row * call_.targets.classes;
    const bool known = mix_targets(call_.targets, lam, strip.own, strip.other, mixed);
    outputs_.lam[strip.row] = known ? lam : kNaN;
  }

  const Call& call_;
  const Outputs& outputs_;
  std::uint64_t seed_;
  const Resampling& resample_;
  bool resampled_;
  std::int64_t cells_;
  Grafter grafter_;
  std::vector<float> own_grid_, other_grid_;
  std::unique_ptr<bool[]> keep_, mask_;
};

}  // namespace
}  // namespace cpu

void saliency_graft(const Call& call, const Outputs& outputs, const Context& context) {
  cpu::saliency_map(call, outputs.saliency, context);
  const std::uint64_t seed = cpu::advance(call.seed);
  cpu::fill_index(call, seed, outputs.index);
  const cpu::Resampling resample(call.map, call.grid);
  cpu::for_each_strip(
      call.images, call.grid, outputs.index, outputs.images,
      [&] { return cpu::RowWorker(call, outputs, seed, resample); },
      [](const cpu::Strip& strip, cpu::RowWorker& worker) { worker.work_on(strip); });
}

void mix_targets(
    const Targets& targets, std::int64_t batch, const float* lam, const std::int64_t* index,
    std::int64_t rows, float* mixed, const Context&) {
  cpu::parallel_for(rows, 2 * targets.classes, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t own = r % batch, other = index[r];
      const bool valid = in_range(other, batch);
      cpu::mix_targets(
          targets, valid ? lam[r] : cpu::kNaN, own, valid ? other : own,
          mixed + r * targets.classes);
    }
  });
}

}  // namespace sg_kernels
