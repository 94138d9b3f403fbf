// What all kernels share: launching, chunks of memory, and the reductions of a block.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "plan.h"

namespace sg_kernels::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Multiprocessors of the current device. Each operator asks once, and plans with the answer.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
      "cudaDeviceGetAttribute");
  return count;
}

// Launches a kernel on the stream of the call; with `together` all blocks run at once, so that they
// can wait for each other.
template <class... Parameters>
void launch(
    void (*kernel)(Parameters...), std::int64_t blocks, bool together, const Context& context,
    Parameters... arguments) {
  STD_TORCH_CHECK(
      blocks <= std::numeric_limits<std::int32_t>::max(), "one launch takes 2**31 - 1 blocks; got ",
      blocks);
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(context.stream);
  config.attrs = &cooperative;
  config.numAttrs = together ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

// Memory for `count` elements until the call returns.
template <class T>
T* scratch(const Context& context, std::int64_t count) {
  return static_cast<T*>(context.scratch(count * static_cast<std::int64_t>(sizeof(T))));
}

// The type of kBytes bytes that is read and written in one access.
template <int kBytes>
struct Access;
template <>
struct Access<1> {
  using type = std::uint8_t;
};
template <>
struct Access<2> {
  using type = std::uint16_t;
};
template <>
struct Access<4> {
  using type = std::uint32_t;
};
template <>
struct Access<8> {
  using type = uint2;
};
template <>
struct Access<16> {
  using type = uint4;
};

// Neighbouring numbers that are read in one access.
template <class T, int kLanes>
struct Chunk {
  static constexpr int kBytes = kLanes * static_cast<int>(sizeof(T));
  using Word = typename Access<kBytes>::type;

  Word word;

  __device__ static Chunk load(const char* from) { return {*reinterpret_cast<const Word*>(from)}; }
  __device__ void store(char* to) const { *reinterpret_cast<Word*>(to) = word; }
  __device__ T lane(int i) const {
    T lanes[kLanes];
    std::memcpy(lanes, &word, kBytes);
    return lanes[i];
  }
  template <class From>
  __device__ static Chunk of(const From* lanes) {
    T rounded[kLanes];
    for (int i = 0; i < kLanes; ++i) rounded[i] = static_cast<T>(lanes[i]);
    Chunk chunk;
    std::memcpy(&chunk.word, rounded, kBytes);
    return chunk;
  }
};

// Combines the values of `width` neighbouring lanes, a power of two; each of them gets the result.
// Every thread of the warp must call.
template <class T, class Combine>
__device__ T reduce_lanes(T value, int width, const Combine& combine) {
  for (int offset = width / 2; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// Combines each value over the block in a fixed order; every thread gets the result, and every
// thread must call.
template <int kCount, class T, class Combine>
__device__ void reduce_block(T (&values)[kCount], const Combine& combine) {
  __shared__ T of_warp[kWarps][kCount];
  const int thread = threadIdx.x;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = reduce_lanes(values[i], kWarp, combine);
    if (thread % kWarp == 0) of_warp[thread / kWarp][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = of_warp[0][i];
    for (int warp = 1; warp < kWarps; ++warp) values[i] = combine(values[i], of_warp[warp][i]);
  }
  __syncthreads();
}

template <int kCount, class T>
__device__ void sum_block(T (&values)[kCount]) {
  reduce_block(values, [](T a, T b) { return a + b; });
}

template <class T>
__device__ T sum_block(T value) {
  T values[] = {value};
  sum_block(values);
  return values[0];
}

}  // namespace sg_kernels::cuda
