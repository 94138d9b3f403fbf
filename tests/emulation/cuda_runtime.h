// The part of CUDA C++ that csrc/cuda uses, on the CPU, to test the kernels without a GPU. Blocks
// run one after another, the last first. A block's threads are fibers: each warp runs as far as it
// can before the next one starts, and every second block runs backwards, so that a missing barrier
// shows. If the threads of a block wait at different barriers, or some never arrive, the run
// aborts.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

enum class At { kNowhere, kBlock, kWarp, kGrid, kEnd };

constexpr int kWarp = 32;
constexpr std::size_t kStack = 64 << 10;

struct Fiber {
  At at = At::kNowhere;
  bool started = false;
  jmp_buf place;
  ucontext_t start;
  void* stack = nullptr;
};

struct Block {
  unsigned number;
  std::vector<Fiber> fibers;
  std::vector<std::uint64_t> exchanged;  // a word per thread, which its warp reads
};

inline dim3 thread_index, block_index, block_size, grid_size;
inline int launches = 0;
inline Block* block = nullptr;
inline Fiber* fiber = nullptr;
inline jmp_buf scheduler;
inline const std::function<void()>* body = nullptr;

inline void run_body() {
  (*body)();
  fiber->at = At::kEnd;
  _longjmp(scheduler, 1);
}

inline void wait(At at) {
  fiber->at = at;
  if (_setjmp(fiber->place) == 0) _longjmp(scheduler, 1);
}

inline void resume(Block& of, unsigned thread) {
  block = &of;
  block_index.x = of.number;
  thread_index.x = thread;
  fiber = &of.fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  fiber->at = At::kNowhere;
  if (fiber->started) _longjmp(fiber->place, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

inline bool all_at(const Block& of, At at, unsigned begin, unsigned end) {
  return std::all_of(of.fibers.begin() + begin, of.fibers.begin() + end, [at](const Fiber& fiber) {
    return fiber.at == at;
  });
}

inline bool all_at(const Block& of, At at) { return all_at(of, at, 0, of.fibers.size()); }

// Runs a warp until its threads have ended or wait for other warps.
inline void run_warp(Block& of, unsigned begin, unsigned end) {
  do {
    for (unsigned i = 0; i < end - begin; ++i) resume(of, of.number % 2 ? end - 1 - i : begin + i);
  } while (all_at(of, At::kWarp, begin, end));
}

// Runs a block until all its threads have ended or wait at the grid's barrier.
inline void run(Block& of) {
  const unsigned warps = of.fibers.size() / kWarp;
  do {
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned warp = of.number % 2 ? warps - 1 - i : i;
      run_warp(of, warp * kWarp, (warp + 1) * kWarp);
    }
  } while (all_at(of, At::kBlock));
  if (all_at(of, At::kEnd) || all_at(of, At::kGrid)) return;
  std::fprintf(stderr, "emulation: the threads of a block wait at different barriers\n");
  std::abort();
}

inline Block start(unsigned number, std::vector<void*>& stacks, std::size_t first_stack) {
  Block fresh{number, std::vector<Fiber>(block_size.x), std::vector<std::uint64_t>(block_size.x)};
  while (stacks.size() < first_stack + block_size.x)
    stacks.push_back(mmap(
        nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
        0));
  for (unsigned t = 0; t < block_size.x; ++t) {
    Fiber& made = fresh.fibers[t];
    made.stack = stacks[first_stack + t];
    getcontext(&made.start);
    made.start.uc_stack.ss_sp = made.stack;
    made.start.uc_stack.ss_size = kStack;
    makecontext(&made.start, run_body, 0);
  }
  return fresh;
}

// Shared memory does not survive the grid's barrier, since other blocks run meanwhile.
inline void run_grid(const std::function<void()>& kernel, bool together) {
  static std::vector<void*> stacks;
  body = &kernel;
  std::vector<Block> waiting;
  for (unsigned number = grid_size.x; number-- > 0;) {
    waiting.push_back(start(number, stacks, waiting.size() * block_size.x));
    run(waiting.back());
    if (all_at(waiting.back(), At::kEnd)) waiting.pop_back();
    if (!waiting.empty() && !together) std::abort();
  }
  for (Block& of : waiting) run(of);
}

template <class T>
T exchange(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  const unsigned thread = thread_index.x;
  std::memcpy(&block->exchanged[thread], &value, sizeof value);
  wait(At::kWarp);
  std::memcpy(&value, &block->exchanged[thread / kWarp * kWarp + lane], sizeof value);
  wait(At::kWarp);
  return value;
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index

inline void __syncthreads() { emulation::wait(emulation::At::kBlock); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  return emulation::exchange(value, (threadIdx.x % emulation::kWarp) ^ offset);
}

// The number of kernels launched so far, for the tests.
extern "C" [[gnu::used]] inline int emulated_launches() { return emulation::launches; }

inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  const std::uint64_t word = vote;
  std::memcpy(&emulation::block->exchanged[threadIdx.x], &word, sizeof word);
  emulation::wait(emulation::At::kWarp);
  const unsigned first = threadIdx.x / emulation::kWarp * emulation::kWarp;
  for (int lane = 0; lane < emulation::kWarp; ++lane)
    votes |= static_cast<unsigned>(emulation::block->exchanged[first + lane] != 0) << lane;
  emulation::wait(emulation::At::kWarp);
  return votes;
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 1 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Few multiprocessors, so that small batches take every path: splits, parts, one launch and two.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 4;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
  *blocks = 4;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  ++emulation::launches;
  emulation::grid_size = config->gridDim;
  emulation::block_size = config->blockDim;
  emulation::run_grid([&] { kernel(arguments...); }, config->numAttrs > 0);
  return cudaSuccess;
}
