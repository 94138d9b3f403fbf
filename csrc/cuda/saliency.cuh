// Launch 1: stage 1, and the pairing, which needs no features.
#pragma once

#include "cells.cuh"

namespace sg_kernels::cuda {

constexpr int kMaxLanes = 8;  // numbers of a chunk: kChunk bytes of two each

// Sums the rows of one split into partial, (h, w). `sums`: shared memory, kMaxLanes a thread.
template <class T, int kLanes>
__device__ void sum_planes(
    const Batch& features, const SaliencyPlan& plan, const char* sample, int split, int tile,
    float* sums, float* partial) {
  using Features = Chunk<T, kLanes>;
  const int thread = threadIdx.x;
  const int cells = static_cast<int>(features.height * features.width);
  const int width = static_cast<int>(features.width);
  const int groups = kThreads / plan.columns, group = thread / plan.columns;
  const int chunk = tile * plan.columns + thread % plan.columns;
  const int share = (plan.rows + plan.splits - 1) / plan.splits;
  const int last = min(plan.rows, (split + 1) * share);
  const std::int64_t row_stride = plan.planes * features.channel_stride;

  float total[kLanes] = {};
  if (group < groups && chunk < plan.chunks) {
    const char* column = sample + (plan.dense ? chunk * std::int64_t{Features::kBytes}
                                              : chunk / width * features.row_stride +
                                                    chunk % width * features.column_stride);
    for (int row = split * share + group; row < last; row += groups * kChunksInFlight) {
      Features value[kChunksInFlight];
#pragma unroll
      for (int i = 0; i < kChunksInFlight; ++i) {
        const int ahead = row + i * groups;
        value[i] = ahead < last ? Features::load(column + ahead * row_stride) : Features{};
      }
#pragma unroll
      for (int i = 0; i < kChunksInFlight; ++i)
#pragma unroll
        for (int l = 0; l < kLanes; ++l) total[l] += fabsf(static_cast<float>(value[i].lane(l)));
    }
  }
#pragma unroll
  for (int l = 0; l < kLanes; ++l) sums[thread * kLanes + l] = total[l];
  __syncthreads();
  const int of_group = plan.columns * kLanes, begin = tile * of_group;
  const int here = plan.planes > 1 ? cells : min(of_group, cells - begin);
  for (int cell = thread; cell < here; cell += kThreads) {
    float sum = 0.0f;
    for (int g = 0; g < groups; ++g)
      for (int plane = 0; plane < plan.planes; ++plane)
        sum += sums[g * of_group + plane * cells + cell];
    partial[begin + cell] = sum;
  }
}

template <class T, int kLanes>
__device__ void sum_channels(
    const Batch& features, const SaliencyPlan& plan, const char* sample, int tile, float* map) {
  using Features = Chunk<T, kLanes>;
  const int thread = threadIdx.x, lane = thread % plan.lanes;
  const int cells = static_cast<int>(features.height * features.width);
  const int width = static_cast<int>(features.width);
  const int cell = tile * (kThreads / plan.lanes) + thread / plan.lanes;
  float total = 0.0f;
  if (cell < cells) {
    const char* pixel =
        sample + cell / width * features.row_stride + cell % width * features.column_stride;
    for (int chunk = lane; chunk < plan.chunks; chunk += plan.lanes * kChunksInFlight) {
      Features value[kChunksInFlight];
#pragma unroll
      for (int i = 0; i < kChunksInFlight; ++i) {
        const int ahead = chunk + i * plan.lanes;
        value[i] = ahead < plan.chunks
                       ? Features::load(pixel + ahead * std::int64_t{Features::kBytes})
                       : Features{};
      }
#pragma unroll
      for (int i = 0; i < kChunksInFlight; ++i)
#pragma unroll
        for (int l = 0; l < kLanes; ++l) total += fabsf(static_cast<float>(value[i].lane(l)));
    }
  }
  total = reduce_lanes(total, plan.lanes, [](float a, float b) { return a + b; });
  if (cell < cells && lane == 0) map[cell] = total;
}

// Checks a part of a ready map, and resamples it to its part of the grid.
__device__ inline void check_map(
    const Maps& maps, int tiles, std::int64_t sample, int tile, float* map, float* grid) {
  const int first = tile * kThreads + threadIdx.x, step = tiles * kThreads;
  const int cells = static_cast<int>(maps.map.cells());
  for (int cell = first; cell < cells; cell += step)
    map[sample * cells + cell] = checked_saliency(maps.partials[sample * cells + cell]);
  if (grid == nullptr) return;
  for_each_cell(maps, tile, tiles, [&](int cell, int lane) {
    const float value = resample(maps, sample, cell, lane, checked_saliency);
    if (cell < maps.cells() && lane == 0) grid[sample * maps.cells() + cell] = value;
  });
}

constexpr int kSamplesOfAWarp = 4;  // whose words are one block of Philox
constexpr int kSamplesOfABlock = kSamplesOfAWarp * kWarps;

// The pairing of one block's samples: ranks each among the tickets of the batch.
__device__ inline void draw_pairing(
    std::uint64_t seed, std::int64_t batch, bool no_fixed_points, std::int64_t draw, int part,
    std::int64_t* index) {
  constexpr std::uint64_t kNone = ~std::uint64_t{0};
  const int lane = threadIdx.x % kWarp;
  const int block = part * kWarps + threadIdx.x / kWarp;  // of Philox
  const Words own_words = philox(block, 0, draw, kPairing, seed);
  std::uint64_t own[kSamplesOfAWarp], rank[kSamplesOfAWarp], next[kSamplesOfAWarp];
  std::uint64_t lowest = kNone;
  for (int i = 0; i < kSamplesOfAWarp; ++i) {
    own[i] = ticket(own_words.word[i], std::int64_t{block} * kSamplesOfAWarp + i);
    rank[i] = 0;
    next[i] = kNone;
  }
  for (std::int64_t other = lane; other * kSamplesOfAWarp < batch; other += kWarp) {
    const Words words = philox(other, 0, draw, kPairing, seed);
    for (int w = 0; w < kSamplesOfAWarp; ++w) {
      const std::int64_t sample = other * kSamplesOfAWarp + w;
      if (sample >= batch) break;
      const std::uint64_t drawn = ticket(words.word[w], sample);
      lowest = min(lowest, drawn);
      for (int i = 0; i < kSamplesOfAWarp; ++i) {
        rank[i] += drawn < own[i];
        if (drawn > own[i]) next[i] = min(next[i], drawn);
      }
    }
  }
  const auto least = [](std::uint64_t a, std::uint64_t b) { return min(a, b); };
  lowest = reduce_lanes(lowest, kWarp, least);
  for (int i = 0; i < kSamplesOfAWarp; ++i) {
    rank[i] = reduce_lanes(rank[i], kWarp, [](std::uint64_t a, std::uint64_t b) { return a + b; });
    next[i] = reduce_lanes(next[i], kWarp, least);
    const std::uint64_t follower = (next[i] == kNone ? lowest : next[i]) & 0xFFFFFFFFu;
    const std::int64_t sample = std::int64_t{block} * kSamplesOfAWarp + i;
    if (lane == 0 && sample < batch)
      index[draw * batch + sample] =
          static_cast<std::int64_t>(no_fixed_points ? follower : rank[i]);
  }
}

// The randomness of launch 1.
struct Pairing {
  Seed seed;
  std::int64_t draws;  // 0: no pairing is wanted
  bool no_fixed_points;
  const std::int64_t* given;
  std::int64_t* index;
  std::uint64_t* call_seed;  // written for launch 2

  // Blocks of one draw, and of all.
  SG_HOST_DEVICE int parts(std::int64_t batch) const {
    return static_cast<int>((batch + kSamplesOfABlock - 1) / kSamplesOfABlock);
  }
  std::int64_t tasks(std::int64_t batch) const { return draws * parts(batch); }
};

__device__ inline void pair(const Pairing& pairing, std::int64_t batch, std::int64_t task) {
  const Seed& seed = pairing.seed;
  std::uint64_t value = seed.device == nullptr ? seed.value : *seed.device;
  if (seed.step != nullptr) value = call_seed(value, *seed.step, seed.rank);
  if (task == 0 && threadIdx.x == 0) *pairing.call_seed = value;
  const int parts = pairing.parts(batch);
  const std::int64_t draw = task / parts;
  const int part = static_cast<int>(task % parts);
  if (pairing.given == nullptr) {
    draw_pairing(value, batch, pairing.no_fixed_points, draw, part, pairing.index);
    return;
  }
  const std::int64_t sample = std::int64_t{part} * kSamplesOfABlock + threadIdx.x;
  if (threadIdx.x < kSamplesOfABlock && sample < batch)
    pairing.index[draw * batch + sample] = pairing.given[draw * batch + sample];
}

// The arguments of launch 1.
struct SaliencyWork {
  Batch features;
  Float type;
  SaliencyPlan plan;
  Pairing pairing;
  std::int64_t pairing_tasks;
  Maps given;       // the ready map
  float* partials;  // (splits, batch, h, w); with one split or a ready map, the map itself
  float* grid;      // where the ready map is resampled to; nullptr: it is not

  SG_HOST_DEVICE std::int64_t tasks() const {
    return pairing_tasks + features.batch * plan.tiles * plan.splits;
  }
};

template <class T>
__device__ void sum_features(
    const SaliencyWork& work, std::int64_t sample, int split, int tile, float* sums) {
  constexpr int kLanes = kChunk / static_cast<int>(sizeof(T));
  static_assert(kLanes <= kMaxLanes);
  const Batch& features = work.features;
  const SaliencyPlan& plan = work.plan;
  const char* from = features.data + sample * features.batch_stride;
  float* to = work.partials + (split * features.batch + sample) * features.height * features.width;
  if (plan.layout == Layout::kChannelsLast) {
    if (plan.wide)
      sum_channels<T, kLanes>(features, plan, from, tile, to);
    else
      sum_channels<T, 1>(features, plan, from, tile, to);
  } else {
    if (plan.wide)
      sum_planes<T, kLanes>(features, plan, from, split, tile, sums, to);
    else
      sum_planes<T, 1>(features, plan, from, split, tile, sums, to);
  }
}

// One task of launch 1: a part of the pairing, or a tile of one split of a sample.
__device__ inline void saliency_task(const SaliencyWork& work, std::int64_t task) {
  __shared__ float sums[kThreads * kMaxLanes];
  const SaliencyPlan& plan = work.plan;
  if (task < work.pairing_tasks) return pair(work.pairing, work.features.batch, task);
  task -= work.pairing_tasks;
  const int tile = static_cast<int>(task % plan.tiles);
  const int split = static_cast<int>(task / plan.tiles % plan.splits);
  const std::int64_t sample = task / plan.tiles / plan.splits;
  if (plan.layout == Layout::kGiven)
    return check_map(work.given, plan.tiles, sample, tile, work.partials, work.grid);
  dispatch(work.type, [&, shared = &sums[0]](auto tag) {
    sum_features<typename decltype(tag)::type>(work, sample, split, tile, shared);
  });
}

void launch_saliency(const SaliencyWork& work, const Context& context);

}  // namespace sg_kernels::cuda
