// Stage 6: how a row's pixels are copied, and how rows are shared among threads.
#pragma once

#include <vector>

#include "../backend.h"
#include "parallel.h"
#include "standardize.h"

namespace sg_kernels::cpu {

// Neighbouring pixels of a line that come from the same image.
struct Run {
  std::int64_t begin, end;
  bool own;
};

// Finds the runs of a line of `width` pixels in one row of cells.
void find_runs(const bool* cells, std::int64_t count, std::int64_t width, std::vector<Run>& runs);

// Two batches of the same size as lines of pixels. If the channels of a pixel lie together in both,
// they count as one pixel with one channel.
struct Lines {
  std::int64_t channels, height, width, pixel;  // pixel in bytes, of the first batch
  bool dense;                                   // the pixels of a line lie side by side
};

Lines lines_of(const Batch& from, const Batch& to);

// Part of a row: the rows of cells [first, last).
struct Strip {
  std::int64_t row, own, other;
  bool valid;  // whether the row's index is in range; if not, `other` is `own`
  std::int64_t first, last;
};

// Copies the strips of one batch.
class Grafter {
 public:
  Grafter(
      const Batch& images, Grid grid, std::int64_t depth, const Standardize& standardize,
      const Batch& out);
  void graft(const bool* mask, const Strip& strip);  // the mask of the whole row

 private:
  void graft_band(
      char* to, const char* own, const char* other, std::int64_t begin, std::int64_t end);
  void graft_lines(
      char* to, const char* own, const char* other, std::int64_t begin, std::int64_t end,
      std::int64_t channel);
  void graft_line(char* to, const char* own, const char* other, std::int64_t channel);

  const Batch &images_, &out_;
  Grid grid_;
  std::int64_t depth_;
  Lines lines_;
  Standardizer standardizer_;
  std::int64_t line_;  // bytes of a line, if dense
  bool stream_;
  bool blended_ = false;
  std::vector<Run> runs_;
  std::vector<char> taken_;
};

// The rows in an order in which a row's destination is the next row's source, so that the caches
// still hold it.
std::vector<std::int64_t> along_cycles(
    const std::int64_t* index, std::int64_t batch, std::int64_t rows);

// How many strips each row is cut into: one, unless there is much to copy and too few rows for the
// threads.
std::int64_t strips_per_row(std::int64_t rows, std::int64_t bytes, Grid grid);

// Orders streamed writes before whatever follows.
void finish_streams();

// Calls body(strip, state) for each strip; make_state() makes each thread's state.
template <class MakeState, class Body>
void for_each_strip(
    const Batch& images, Grid grid, const std::int64_t* index, const Batch& out,
    const MakeState& make_state, const Body& body) {
  // Measured in elements copied: the draw and the softmax of a cell cost about 16, and memcpy moves
  // 4 bytes in the time of one.
  constexpr std::int64_t kWorkPerCell = 16, kBytesPerWork = 4;
  const std::int64_t bytes = images.channels * images.height * images.width * images.element;
  const std::int64_t strips = strips_per_row(out.batch, bytes, grid);
  const std::vector<std::int64_t> order = along_cycles(index, images.batch, out.batch);
  parallel_for(
      out.batch * strips, kWorkPerCell * grid.cells() + bytes / (kBytesPerWork * strips),
      [&](std::int64_t begin, std::int64_t end) {
        auto state = make_state();
        for (std::int64_t unit = begin; unit < end; ++unit) {
          const std::int64_t row = order[unit / strips], part = unit % strips;
          const std::int64_t own = row % images.batch;
          const bool valid = in_range(index[row], images.batch);
          const Strip strip{
              row,
              own,
              valid ? index[row] : own,
              valid,
              part * grid.height / strips,
              (part + 1) * grid.height / strips};
          body(strip, state);
        }
        finish_streams();
      });
}

}  // namespace sg_kernels::cpu
