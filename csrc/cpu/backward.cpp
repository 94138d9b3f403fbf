// The gradient of stage 6.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "copy.h"

namespace sg_kernels {
namespace cpu {
namespace {

struct Contribution {
  std::int64_t row;
  bool own;
};
using Contributions = std::vector<Contribution>;

// For each image, the rows whose gradient it receives: its own, then those grafted onto it.
std::vector<Contributions> contributions(
    const std::int64_t* index, std::int64_t batch, std::int64_t rows) {
  std::vector<Contributions> lists(batch);
  for (std::int64_t r = 0; r < rows; ++r) lists[r % batch].push_back({r, true});
  for (std::int64_t r = 0; r < rows; ++r)
    lists[in_range(index[r], batch) ? index[r] : r % batch].push_back({r, false});
  return lists;
}

// Calls body(i, offset) for each number of the pixels [begin, end) of a line: its position among
// the line's numbers, and its offset in bytes.
template <class T, class Body>
void for_each_number(
    std::int64_t begin, std::int64_t end, std::int64_t numbers, std::int64_t stride,
    const Body& body) {
  constexpr std::int64_t kSize = sizeof(T);
  if (stride == numbers * kSize) {  // one loop, which compilers vectorize
    for (std::int64_t i = begin * numbers; i < end * numbers; ++i) body(i, i * kSize);
    return;
  }
  for (std::int64_t x = begin; x < end; ++x)
    for (std::int64_t n = 0; n < numbers; ++n) body(x * numbers + n, x * stride + n * kSize);
}

// Pixels of `numbers` numbers each; the stride between pixels is in bytes.
template <class T, class Sum>
void add_pixels(
    Sum* __restrict sums, const char* __restrict line, std::int64_t stride, std::int64_t numbers,
    const Run& run) {
  for_each_number<T>(run.begin, run.end, numbers, stride, [=](std::int64_t i, std::int64_t offset) {
    T value;
    std::memcpy(&value, line + offset, sizeof(T));
    sums[i] += static_cast<Sum>(value);
  });
}

template <class T, class Sum>
void store_pixels(
    const Sum* __restrict sums, char* __restrict line, std::int64_t stride, std::int64_t numbers,
    std::int64_t width) {
  for_each_number<T>(0, width, numbers, stride, [=](std::int64_t i, std::int64_t offset) {
    const T value = static_cast<T>(sums[i]);
    std::memcpy(line + offset, &value, sizeof(T));
  });
}

// The arguments of graft_backward, with what all threads share.
struct Backward {
  const Batch& grad;
  const bool* mask;
  Grid grid;
  const Batch& out;
  std::vector<Contributions> lists;
  Lines lines;
};

// Sums the gradient of images of numbers T, band by band. It adds in Sum, in the order of the list,
// and rounds once.
template <class T>
class BandWorker {
 public:
  explicit BandWorker(const Backward& backward)
      : backward_(backward),
        numbers_(backward.lines.pixel / sizeof(T)),
        sums_(backward.lines.width * numbers_) {}

  // Every line in one row of cells of one image.
  void work_on(std::int64_t image, std::int64_t band) {
    const Grid grid = backward_.grid;
    const Lines& lines = backward_.lines;
    const Contributions& list = backward_.lists[image];
    runs_.resize(std::max(runs_.size(), list.size()));
    for (std::size_t i = 0; i < list.size(); ++i)
      find_runs(
          backward_.mask + list[i].row * grid.cells() + band * grid.width, grid.width, lines.width,
          runs_[i]);
    const std::int64_t end = first_pixel(band + 1, lines.height, grid.height);
    for (std::int64_t c = 0; c < lines.channels; ++c)
      for (std::int64_t y = first_pixel(band, lines.height, grid.height); y < end; ++y)
        sum_line(list, image, c, y);
  }

 private:
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

  void sum_line(const Contributions& list, std::int64_t image, std::int64_t c, std::int64_t y) {
    const Batch &grad = backward_.grad, &out = backward_.out;
    const Lines& lines = backward_.lines;
    std::fill(sums_.begin(), sums_.end(), Sum{0});
    for (std::size_t i = 0; i < list.size(); ++i) {
      const char* from = grad.data + list[i].row * grad.batch_stride + c * grad.channel_stride +
                         y * grad.row_stride;
      const std::int64_t stride = lines.dense ? lines.pixel : grad.column_stride;
      for (const Run& run : runs_[i])
        if (run.own == list[i].own) add_pixels<T>(sums_.data(), from, stride, numbers_, run);
    }
    char* to = out.data + image * out.batch_stride + c * out.channel_stride + y * out.row_stride;
    store_pixels<T>(
        sums_.data(), to, lines.dense ? lines.pixel : out.column_stride, numbers_, lines.width);
  }

  const Backward& backward_;
  std::int64_t numbers_;  // of a pixel
  std::vector<Sum> sums_;
  std::vector<std::vector<Run>> runs_;
};

}  // namespace
}  // namespace cpu

void graft_backward(
    const Batch& grad, Float type, const bool* mask, Grid grid, const std::int64_t* index,
    const Batch& out, const Context&) {
  if (out.pixels() == 0) return;  // then the mask may have no cells
  const cpu::Backward backward{grad,
                               mask,
                               grid,
                               out,
                               cpu::contributions(index, out.batch, grad.batch),
                               cpu::lines_of(grad, out)};
  const std::int64_t bytes = out.pixels() / out.batch * out.element;
  dispatch(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cpu::parallel_for(
        out.batch * grid.height, bytes / grid.height, [&](std::int64_t begin, std::int64_t end) {
          cpu::BandWorker<T> worker(backward);
          for (std::int64_t unit = begin; unit < end; ++unit)
            worker.work_on(unit / grid.height, unit % grid.height);
        });
  });
}

}  // namespace sg_kernels
