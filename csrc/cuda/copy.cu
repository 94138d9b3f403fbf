#include "copy.cuh"

#include "standardize.cuh"

namespace sg_kernels {
namespace cuda {
namespace {

// A block for each tile of each row.
template <bool kStandardized>
__global__ void __launch_bounds__(kThreads, kCopyBlocksPerSm<kStandardized>) graft_kernel(
    Tile tile, Standardize standardize, Batch images, const bool* mask, Grid grid,
    const std::int64_t* index, Batch out) {
  const std::int64_t row = blockIdx.x / tile.tiles, own = row % images.batch;
  const std::int64_t other = destination(index[row], own, images.batch);
  const int number = static_cast<int>(blockIdx.x % tile.tiles);
  graft_tiles<kStandardized>(
      tile, number, tile.tiles, standardize, images, out,
      {images, out, row, own, other, mask + row * grid.cells()});
}

}  // namespace

void launch_copy(
    const Tile& tile, const Standardize& standardize, const Batch& images, const bool* mask,
    Grid grid, const std::int64_t* index, const Batch& out, const Context& context) {
  if (out.pixels() == 0) return;
  const auto kernel = standardize.wanted() ? graft_kernel<true> : graft_kernel<false>;
  launch(
      kernel, out.batch * tile.tiles, false, context, tile, standardize, images, mask, grid, index,
      out);
}

}  // namespace cuda

void graft(
    const Batch& images, const bool* mask, Grid grid, const std::int64_t* index, const Batch& out,
    const Context& context) {
  using namespace cuda;
  if (out.pixels() == 0) return;  // then the mask may have no cells
  const Tile tile = plan_tile(images, out, grid, 1, false, multiprocessors());
  launch_copy(tile, {}, images, mask, grid, index, out, context);
}

}  // namespace sg_kernels
