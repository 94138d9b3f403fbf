#include "copy.cuh"

namespace sg_kernels {
namespace cuda {
namespace {

// A block for each tile of each row.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) graft_kernel(
    Tile tile, Batch images, const bool* mask, Grid grid, const std::int64_t* index, Batch out) {
  const std::int64_t row = blockIdx.x / tile.tiles, own = row % images.batch;
  const std::int64_t other = destination(index[row], own, images.batch);
  const int number = static_cast<int>(blockIdx.x % tile.tiles);
  copy_tiles(
      tile, number, tile.tiles, images, out,
      {images, out, row, own, other, mask + row * grid.cells()});
}

}  // namespace

void launch_copy(
    const Tile& tile, const Batch& images, const bool* mask, Grid grid, const std::int64_t* index,
    const Batch& out, const Context& context) {
  if (out.pixels() == 0) return;
  launch(
      graft_kernel, out.batch * tile.tiles, false, context, tile, images, mask, grid, index, out);
}

}  // namespace cuda

void graft(
    const Batch& images, const bool* mask, Grid grid, const std::int64_t* index, const Batch& out,
    const Context& context) {
  using namespace cuda;
  if (out.pixels() == 0) return;  // then the mask may have no cells
  const Tile tile = plan_tile(images, out, grid, 1, false, multiprocessors());
  launch_copy(tile, images, mask, grid, index, out, context);
}

}  // namespace sg_kernels
