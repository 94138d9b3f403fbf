// The operators on the LibTorch stable ABI; sg_kernels/ops.py defines their schemas. This file is
// compiled once per backend, SG_KERNELS_BACKEND, for tensors on SG_KERNELS_DEVICE.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__) && !defined(USE_CUDA)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "backend.h"
#include "tensor.h"

namespace sg_kernels::ops {
namespace {

using sg_kernels::dtype_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<std::int64_t>;

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// A fresh tensor on the device of `like`.
Tensor empty_strided(
    const Tensor& like, const Sizes& sizes, const Sizes& strides, std::int32_t dtype) {
  if (const auto fresh = try_empty(like, sizes, strides, dtype)) return *fresh;
  std::string shape;
  for (const std::int64_t size : sizes)
    shape += (shape.empty() ? "" : " x ") + std::to_string(size);
  STD_TORCH_CHECK(false, "out of memory: no room for an output of ", shape, " elements");
}

Tensor empty(const Tensor& like, const Sizes& sizes, std::int32_t dtype) {
  Sizes strides(sizes.size(), 1);
  for (std::size_t d = sizes.size() - 1; d > 0; --d)
    strides[d - 1] = strides[d] * std::max<std::int64_t>(1, sizes[d]);
  return empty_strided(like, sizes, strides, dtype);
}

// The page faults of a large fresh output cost more than writing it; huge pages take far fewer.
void advise_huge_pages([[maybe_unused]] const Tensor& fresh) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kPage = 4096;  // madvise takes whole pages
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(fresh.data_ptr());
  const std::uintptr_t end = begin + fresh.numel() * fresh.element_size();
  const std::uintptr_t first = begin / kPage * kPage;
  const std::uintptr_t last = (end + kPage - 1) / kPage * kPage;
  if (end - begin >= 2 * kHugePage)  // so that at least one huge page fits
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// See reference.is_channels_last.
bool is_channels_last(const Tensor& images) {
  std::int64_t least = 0;
  for (const int dim : {1, 3, 2, 0}) {
    const std::int64_t size = images.size(dim), stride = images.stride(dim);
    if (size == 0 || stride < std::max<std::int64_t>(least, 1)) return false;
    if (dim == 0 && least == images.stride(1)) return false;
    least = stride * size;
  }
  return true;
}

// An output of `rows` images in the memory format of `images`; see reference.empty_rows.
Tensor empty_rows(const Tensor& images, std::int64_t rows, std::int32_t dtype) {
  const std::int64_t c = images.size(1), h = images.size(2), w = images.size(3);
  const Tensor fresh = is_channels_last(images)
                           ? empty_strided(images, {rows, c, h, w}, {c * h * w, 1, c * w, c}, dtype)
                           : empty(images, {rows, c, h, w}, dtype);
  advise_huge_pages(fresh);
  return fresh;
}

// Runs an operator on the device of a tensor, on its current stream, and keeps what the operator
// needs until it returns.
class Scope {
 public:
  explicit Scope(const Tensor& tensor)
      :
#ifdef USE_CUDA
        guard_(tensor.get_device_index()),
#endif
        tensor_(tensor) {
#ifdef USE_CUDA
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &context_.stream));
#endif
    context_.scratch = [this](std::int64_t bytes) {
      kept_.push_back(empty(tensor_, {bytes}, aoti_torch_dtype_uint8()));
      return kept_.back().data_ptr();
    };
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

  const Context& context() const { return context_; }

  // The elements of a tensor, contiguous; copied if they are not.
  template <class T>
  const T* dense(const Tensor& tensor) {
    if (tensor.is_contiguous()) return data_of<T>(tensor);
    kept_.push_back(torch::stable::contiguous(tensor));
    return data_of<T>(kept_.back());
  }

 private:
#ifdef USE_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  const Tensor& tensor_;
  std::vector<Tensor> kept_;  // freed in the order of the stream, so after the kernels have run
  Context context_{};
};

Batch batch_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const auto size = static_cast<std::int64_t>(tensor.element_size());
  return {data_of<char>(tensor), sizes[0],          sizes[1],          sizes[2],          sizes[3],
          strides[0] * size,     strides[1] * size, strides[2] * size, strides[3] * size, size};
}

// The type of a tensor's numbers; a complex element holds two.
Float float_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
    case ScalarType::ComplexHalf: return Float::kHalf;
    case ScalarType::BFloat16: return Float::kBFloat16;
    case ScalarType::Float:
    case ScalarType::ComplexFloat: return Float::kFloat;
    case ScalarType::Double:
    case ScalarType::ComplexDouble: return Float::kDouble;
    default: STD_TORCH_CHECK(false, name, " must be floating point");
  }
}

// An enumeration arrives as a position, 0 .. last.
template <class Enum>
Enum enum_of(std::int64_t position, Enum last, const char* name) {
  const auto highest = static_cast<std::int64_t>(last);
  STD_TORCH_CHECK(
      in_range(position, highest + 1), name, " must be in 0 .. ", highest, "; got ", position);
  return static_cast<Enum>(position);
}

void check_images(const Tensor& images, const char* name = "images") {
  STD_TORCH_CHECK(images.dim() == 4, name, " must have 4 dimensions; got ", images.dim());
}

void check_features(const Tensor& features) {
  const ScalarType type = features.scalar_type();
  const bool complex = type == ScalarType::ComplexHalf || type == ScalarType::ComplexFloat ||
                       type == ScalarType::ComplexDouble;
  STD_TORCH_CHECK(features.dim() == 4 && !complex, "features must be real, (B, K, h, w)");
}

void check(const Tensor& tensor, ScalarType type, std::int64_t dim, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == type && tensor.dim() == dim, name, " must be ",
      torch::headeronly::toString(type), " with ", dim, " dimensions");
}

void check_index(const Tensor& index, std::int64_t rows, std::int64_t batch) {
  check(index, ScalarType::Long, 1, "index");
  STD_TORCH_CHECK(index.size(0) == rows, "index must have ", rows, " entries");
  STD_TORCH_CHECK(
      batch == 0 ? rows == 0 : rows % batch == 0, "rows must be a multiple of the batch, ", batch);
}

void check_grid(Grid grid, const Tensor& images, std::int64_t depth, const char* name) {
  STD_TORCH_CHECK(
      grid.height >= 1 && grid.height <= images.size(2) / depth && grid.width >= 1 &&
          grid.width <= images.size(3),
      name, " must have cells and be no finer than the images");
}

Grid checked_grid(const Tensor& mask, const Tensor& images) {
  check(mask, ScalarType::Bool, 3, "mask");
  const Grid grid{mask.size(1), mask.size(2)};
  if (images.numel() > 0) check_grid(grid, images, 1, "mask");
  return grid;
}

// Where an operator writes its images, and what it returns in their place: an output must not be
// an input, so with `out` that is an empty tensor.
struct Destination {
  Tensor written, returned;
};

Destination destination(
    const std::optional<Tensor>& out, const Tensor& images, std::int64_t rows, std::int32_t dtype) {
  if (!out) {
    const Tensor fresh = empty_rows(images, rows, dtype);
    return {fresh, fresh};
  }
  STD_TORCH_CHECK(
      out->dim() == 4 && out->size(0) == rows && out->size(1) == images.size(1) &&
          out->size(2) == images.size(2) && out->size(3) == images.size(3) &&
          dtype_of(*out) == dtype,
      "out must have ", rows, " rows with the images' size, and the dtype that they come out in");
  return {*out, empty(images, {0}, dtype)};
}

Tensor channel_saliency(const Tensor& features) {
  check_features(features);
  const Scope scope(features);
  const Tensor map = empty(
      features, {features.size(0), features.size(2), features.size(3)}, aoti_torch_dtype_float32());
  sg_kernels::channel_saliency(
      batch_of(features), float_of(features, "features"), data_of<float>(map), scope.context());
  return map;
}

Tensor graft(
    const Tensor& images, const Tensor& mask, const Tensor& index,
    const std::optional<Tensor>& out) {
  check_images(images);
  const Grid grid = checked_grid(mask, images);
  check_index(index, mask.size(0), images.size(0));
  Scope scope(images);
  const Destination to = destination(out, images, mask.size(0), dtype_of(images));
  sg_kernels::graft(
      batch_of(images), scope.dense<bool>(mask), grid, scope.dense<std::int64_t>(index),
      batch_of(to.written), scope.context());
  return to.returned;
}

Tensor graft_backward(
    const Tensor& grad, const Tensor& mask, const Tensor& index, std::int64_t augmentations) {
  check_images(grad, "grad");
  STD_TORCH_CHECK(augmentations >= 1, "augmentations must be >= 1");
  const Grid grid = checked_grid(mask, grad);
  STD_TORCH_CHECK(mask.size(0) == grad.size(0), "mask must have as many rows as grad");
  const std::int64_t batch = grad.size(0) / augmentations;
  check_index(index, grad.size(0), batch);
  Scope scope(grad);
  const Tensor out = empty_rows(grad, batch, dtype_of(grad));
  sg_kernels::graft_backward(
      batch_of(grad), float_of(grad, "grad"), scope.dense<bool>(mask), grid,
      scope.dense<std::int64_t>(index), batch_of(out), scope.context());
  return out;
}

Targets targets_of(
    const Tensor& targets, std::int64_t num_classes, double label_smoothing, Scope& scope) {
  const bool ids = targets.dim() == 1;
  STD_TORCH_CHECK(
      targets.scalar_type() == (ids ? ScalarType::Long : ScalarType::Float),
      "targets must be int64 class ids or float32 rows");
  STD_TORCH_CHECK(
      ids || (targets.dim() == 2 && targets.size(1) == num_classes),
      "targets must have num_classes columns");
  return {
      ids ? scope.dense<std::int64_t>(targets) : nullptr,
      ids ? nullptr : scope.dense<float>(targets), num_classes,
      static_cast<float>(label_smoothing)};
}

Tensor mix_targets(
    const Tensor& targets, const Tensor& lam, const Tensor& index, std::int64_t num_classes,
    double label_smoothing) {
  check(lam, ScalarType::Float, 1, "lam");
  const std::int64_t batch = targets.size(0), rows = lam.size(0);
  check_index(index, rows, batch);
  Scope scope(lam);
  const Targets source = targets_of(targets, num_classes, label_smoothing, scope);
  const Tensor mixed = empty(lam, {rows, num_classes}, aoti_torch_dtype_float32());
  sg_kernels::mix_targets(
      source, batch, scope.dense<float>(lam), scope.dense<std::int64_t>(index), rows,
      data_of<float>(mixed), scope.context());
  return mixed;
}

// A seed on the host is read here; one on a device is read there, so that no operator waits.
Seed seed_of(const Tensor& seed, const std::optional<Tensor>& step, std::int64_t rank) {
  const auto is_number = [](const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Long && tensor.numel() == 1;
  };
  STD_TORCH_CHECK(
      is_number(seed) && (!step || is_number(*step)), "seed and step must be one int64 each");
  const auto* value = data_of<std::int64_t>(seed);
  const bool on_host = seed.is_cpu();
  return {
      on_host ? nullptr : value, on_host ? static_cast<std::uint64_t>(*value) : 0,
      step ? data_of<std::int64_t>(*step) : nullptr, static_cast<std::uint32_t>(rank)};
}

const std::int64_t* quantiles_of(const std::optional<Tensor>& quantiles, Scope& scope) {
  if (!quantiles) return nullptr;
  check(*quantiles, ScalarType::Long, 1, "quantiles");
  STD_TORCH_CHECK(
      quantiles->numel() == kQuantileBins + 1, "quantiles must have ", kQuantileBins, " bins");
  return scope.dense<std::int64_t>(*quantiles);
}

// What images of a scalar type are read as, where they come out standardised.
Pixel pixel_of(const Tensor& images) {
  switch (images.scalar_type()) {
    case ScalarType::Byte: return Pixel::kByte;
    case ScalarType::Half: return Pixel::kHalf;
    case ScalarType::BFloat16: return Pixel::kBFloat16;
    case ScalarType::Float: return Pixel::kFloat;
    default:
      STD_TORCH_CHECK(false, "images to be standardised must be uint8, float16, bfloat16, float32");
  }
}

Standardize standardize_of(
    const std::optional<Tensor>& affine, const Tensor& images, std::int64_t dtype, Scope& scope) {
  if (!affine) return {};
  check(*affine, ScalarType::Float, 2, "affine");
  const std::int64_t channels = images.size(1);
  STD_TORCH_CHECK(
      affine->size(0) == 2 && affine->size(1) == channels, "affine must be (2, ", channels, ")");
  const float* scale = scope.dense<float>(*affine);
  return {scale, scale + channels, pixel_of(images), enum_of(dtype, Pixel::kFloat, "dtype")};
}

// The dtype that images come out in.
std::int32_t dtype_of(const Standardize& standardize, const Tensor& images) {
  if (!standardize.wanted()) return dtype_of(images);
  switch (standardize.to) {
    case Pixel::kHalf: return aoti_torch_dtype_float16();
    case Pixel::kBFloat16: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float32();
  }
}

// Fills what stage 1 reads: features or a ready map, which has cells if it is `needed`.
void set_source(
    Call& call, const std::optional<Tensor>& features, const std::optional<Tensor>& saliency,
    bool needed, Scope& scope) {
  STD_TORCH_CHECK(
      features.has_value() != saliency.has_value(), "give one of features and saliency");
  call.ready = saliency.has_value();
  if (call.ready) {
    check(*saliency, ScalarType::Float, 3, "saliency");
    call.saliency = scope.dense<float>(*saliency);
    call.map = {saliency->size(1), saliency->size(2)};
  } else {
    check_features(*features);
    call.features = batch_of(*features);
    call.features_type = float_of(*features, "features");
    call.map = {call.features.height, call.features.width};
  }
  STD_TORCH_CHECK(
      (call.ready ? *saliency : *features).size(0) == call.images.batch &&
          (call.map.cells() > 0 || !needed),
      "features, saliency: must have the batch of images, and cells");
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results run(
    const Call& call, const Tensor& images, const std::optional<Tensor>& out,
    const Context& context) {
  const std::int64_t batch = call.images.batch, rows = call.rows();
  const Grid map = call.map, grid = call.grid;
  const Destination to = destination(out, images, rows, dtype_of(call.standardize, images));
  const Tensor lam = empty(images, {rows}, aoti_torch_dtype_float32());
  const Tensor index = empty(images, {rows}, aoti_torch_dtype_int64());
  const Tensor mask = empty(images, {rows, grid.height, grid.width}, aoti_torch_dtype_bool());
  const Tensor saliency = empty(images, {batch, map.height, map.width}, aoti_torch_dtype_float32());
  const Tensor targets = empty(images, {rows, call.targets.classes}, aoti_torch_dtype_float32());
  sg_kernels::saliency_graft(
      call,
      {batch_of(to.written), data_of<float>(lam), data_of<std::int64_t>(index), data_of<bool>(mask),
       data_of<float>(saliency), data_of<float>(targets)},
      context);
  return {to.returned, lam, index, mask, saliency, targets};
}

// The parameters are the fields of sg_kernels/call.py's Call, in order; this is their one list.
Results saliency_graft(
    const Tensor& images, const Tensor& seed, const std::vector<std::int64_t>& grid_size,
    double temperature, double threshold, std::int64_t normalize, std::int64_t norm,
    const std::optional<Tensor>& features, const std::optional<Tensor>& saliency,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& index,
    const std::optional<Tensor>& targets, const std::optional<Tensor>& out,
    const std::optional<Tensor>& step, std::int64_t rank, const std::optional<Tensor>& quantiles,
    double keep_prob, std::optional<std::int64_t> k, double prob, std::int64_t augmentations,
    bool no_fixed_points, std::int64_t num_classes, double label_smoothing, std::int64_t depth,
    const std::optional<Tensor>& affine, std::int64_t dtype) {
  check_images(images);
  STD_TORCH_CHECK(augmentations >= 1, "augmentations must be >= 1");
  STD_TORCH_CHECK(
      depth >= 1 && images.size(2) % depth == 0, "depth must be >= 1 and divide the height");
  Scope scope(images);
  Call call{};
  call.images = batch_of(images);
  call.augmentations = augmentations;
  call.seed = seed_of(seed, step, rank);
  call.grid = {grid_size.at(0), grid_size.at(1)};
  call.depth = depth;
  call.standardize = standardize_of(affine, images, dtype, scope);
  check_grid(call.grid, images, depth, "grid_size");
  STD_TORCH_CHECK(!k || (*k >= 1 && *k <= call.grid.cells()), "k must be in 1 .. cells");
  call.selection = {
      static_cast<float>(temperature), enum_of(normalize, Normalize::kNone, "normalize"),
      static_cast<float>(threshold), k.value_or(0)};
  call.norm = enum_of(norm, Norm::kArea, "norm");
  if (mask) {
    check(*mask, ScalarType::Bool, 3, "mask");
    STD_TORCH_CHECK(
        mask->size(0) == call.rows() && mask->size(1) == call.grid.height &&
            mask->size(2) == call.grid.width,
        "mask must have a row per output, on the grid");
    call.mask = scope.dense<bool>(*mask);
  }
  // The area of a given mask needs no map.
  set_source(call, features, saliency, !mask || call.norm != Norm::kArea, scope);
  if (index) {
    check_index(*index, call.rows(), call.images.batch);
    call.index = scope.dense<std::int64_t>(*index);
  }
  if (targets) {
    STD_TORCH_CHECK(targets->size(0) == call.images.batch, "targets must have the batch of images");
    call.targets = targets_of(*targets, num_classes, label_smoothing, scope);
  }
  call.draws = {quantiles_of(quantiles, scope), keep_prob, prob, no_fixed_points};
  return run(call, images, out, scope.context());
}

}  // namespace
}  // namespace sg_kernels::ops

STABLE_TORCH_LIBRARY_IMPL(sg_kernels, SG_KERNELS_DEVICE, library) {
  using namespace sg_kernels::ops;
  library.impl("channel_saliency." SG_KERNELS_BACKEND, TORCH_BOX(&channel_saliency));
  library.impl("graft." SG_KERNELS_BACKEND, TORCH_BOX(&graft));
  library.impl("graft_backward." SG_KERNELS_BACKEND, TORCH_BOX(&graft_backward));
  library.impl("mix_targets." SG_KERNELS_BACKEND, TORCH_BOX(&mix_targets));
  library.impl("saliency_graft." SG_KERNELS_BACKEND, TORCH_BOX(&saliency_graft));
}
