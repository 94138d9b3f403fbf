// The gradient of stage 6.
#include <type_traits>

#include "copy.cuh"

namespace sg_kernels {
namespace cuda {
namespace {

struct GraftBackward {
  Tile tile;
  Batch grad;
  const bool* mask;
  Grid grid;
  const std::int64_t* index;
  Batch out;
};

// A block for each tile of each image adds up the rows that took from it: its own rows in order,
// then those grafted onto it in order. No additions are atomic, so the result is always the same.
template <class T, int kLanes>
__device__ void add_tile(const GraftBackward& work) {
  using Numbers = Chunk<T, kLanes>;
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  __shared__ unsigned found[kWarps];
  const Tile& tile = work.tile;
  const Batch &grad = work.grad, &out = work.out;
  const int number = static_cast<int>(blockIdx.x % tile.tiles), thread = threadIdx.x;
  const std::int64_t image = blockIdx.x / tile.tiles, batch = out.batch, rows = grad.batch;
  const Column column(tile, number);
  const char* from = grad.data + column.offset(tile, grad);
  Sum total[kLinesInFlight][kLanes] = {};

  const auto add = [&](std::int64_t row, bool own) {
    std::uint64_t bits = from_own(tile, column, work.mask + row * work.grid.cells());
    if (!own) bits = ~bits;
    const auto of_line = [bits](int i) -> std::uint32_t {
      return bits >> i * kChunk & kAll<Numbers::kBytes>;
    };
    const char* from_row = from + row * grad.batch_stride;
    Numbers value[kLinesInFlight] = {};
#pragma unroll
    for (int i = 0; i < kLinesInFlight; ++i)
      if (column.has(i) && of_line(i) != 0)
        value[i] = Numbers::load(from_row + line_offset(tile, grad, column.line(i)));
#pragma unroll
    for (int i = 0; i < kLinesInFlight; ++i) {
      // Cleared as one word: lanes chosen one by one would be loaded one by one.
      const Numbers taken{blend(value[i].word, typename Numbers::Word{}, of_line(i))};
#pragma unroll
      for (int l = 0; l < kLanes; ++l) total[i][l] += static_cast<Sum>(taken.lane(l));
    }
  };

  for (std::int64_t row = image; row < rows; row += batch) add(row, true);
  for (std::int64_t begin = 0; begin < rows; begin += kThreads) {
    const std::int64_t row = begin + thread;
    const bool onto = row < rows && destination(work.index[row], row % batch, batch) == image;
    const unsigned ballot = __ballot_sync(kAllLanes, onto);
    if (thread % kWarp == 0) found[thread / kWarp] = ballot;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp)
      for (unsigned left = found[warp]; left != 0; left &= left - 1)
        add(begin + warp * kWarp + __ffs(static_cast<int>(left)) - 1, false);
    __syncthreads();
  }

  char* to = out.data + image * out.batch_stride + column.offset(tile, out);
#pragma unroll
  for (int i = 0; i < kLinesInFlight; ++i)
    if (column.has(i)) Numbers::of(total[i]).store(to + line_offset(tile, out, column.line(i)));
}

// A chunk is kChunk bytes or one element, which is one number, or two if it is complex.
template <class T>
__global__ void __launch_bounds__(kThreads, kLargeBlocksPerSm)
    graft_backward_kernel(GraftBackward work) {
  constexpr int kSize = static_cast<int>(sizeof(T));
  if (work.tile.chunk == kChunk) return add_tile<T, kChunk / kSize>(work);
  if constexpr (kChunk > 2 * kSize)
    if (work.tile.chunk == 2 * kSize) return add_tile<T, 2>(work);
  add_tile<T, 1>(work);
}

}  // namespace
}  // namespace cuda

void graft_backward(
    const Batch& grad, Float type, const bool* mask, Grid grid, const std::int64_t* index,
    const Batch& out, const Context& context) {
  using namespace cuda;
  if (out.pixels() == 0) return;  // then the mask may have no cells
  const Tile tile = plan_tile(grad, out, grid, 1, true, multiprocessors());
  const GraftBackward work{tile, grad, mask, grid, index, out};
  dispatch(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(graft_backward_kernel<T>, out.batch * tile.tiles, false, context, work);
  });
}

}  // namespace sg_kernels
