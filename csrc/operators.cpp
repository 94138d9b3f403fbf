// The operators on the LibTorch stable ABI; their schemas stand in sg_kernels/ops.py. Compiled once
// for each backend, SG_KERNELS_BACKEND, whose tensors are on SG_KERNELS_DEVICE.
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

#include "kernels.h"

namespace sg_kernels::ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<std::int64_t>;

// A fresh tensor on the device of `like`.
Tensor empty_strided(
    const Tensor& like, const Sizes& sizes, const Sizes& strides, std::int32_t dtype) {
  std::int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device_type,
      like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty(const Tensor& like, const Sizes& sizes, std::int32_t dtype) {
  Sizes strides(sizes.size(), 1);
  for (std::size_t d = sizes.size() - 1; d > 0; --d)
    strides[d - 1] = strides[d] * std::max<std::int64_t>(1, sizes[d]);
  return empty_strided(like, sizes, strides, dtype);
}

// First touching a large fresh output costs more than writing it; in huge pages it costs far less.
void advise_huge_pages([[maybe_unused]] const Tensor& fresh) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kPage = 4096, kHugePage = std::uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(fresh.data_ptr());
  const std::uintptr_t end = begin + fresh.numel() * fresh.element_size();
  const std::uintptr_t first = begin / kPage * kPage;
  const std::uintptr_t last = (end + kPage - 1) / kPage * kPage;
  if (end - begin >= 2 * kHugePage)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// An output of `rows` images in the memory format of `images`, as reference.empty_rows has it.
Tensor empty_rows(const Tensor& images, std::int64_t rows) {
  const std::int64_t c = images.size(1), h = images.size(2), w = images.size(3);
  const bool channels_last = 0 < images.stride(1) && images.stride(1) < images.stride(3);
  std::int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(images.get(), &dtype));
  const Tensor fresh = channels_last
                           ? empty_strided(images, {rows, c, h, w}, {c * h * w, 1, c * w, c}, dtype)
                           : empty(images, {rows, c, h, w}, dtype);
  advise_huge_pages(fresh);
  return fresh;
}

// Runs what follows on the device of a tensor, on its current stream.
class Call {
 public:
  explicit Call(const Tensor& tensor)
#ifdef USE_CUDA
      : guard_(tensor.get_device_index())
#endif
  {
#ifdef USE_CUDA
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &context_.stream));
#endif
    context_.scratch = [this, tensor](std::int64_t bytes) {
      scratch_.push_back(empty(tensor, {bytes}, aoti_torch_dtype_uint8()));
      return scratch_.back().data_ptr();
    };
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const Context& context() const { return context_; }

 private:
#ifdef USE_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  std::vector<Tensor> scratch_;  // freed in the order of the stream: the kernels have run by then
  Context context_{};
};

Batch batch_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const auto size = static_cast<std::int64_t>(tensor.element_size());
  return {
      static_cast<char*>(tensor.data_ptr()),
      sizes[0],
      sizes[1],
      sizes[2],
      sizes[3],
      strides[0] * size,
      strides[1] * size,
      strides[2] * size,
      strides[3] * size,
      size};
}

Grid grid_of(const Tensor& map) { return {map.size(1), map.size(2)}; }

// The type of a tensor's numbers, of which a complex element holds two.
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

bool is_complex(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::ComplexHalf || type == ScalarType::ComplexFloat ||
         type == ScalarType::ComplexDouble;
}

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
T* data_to(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor checked(const Tensor& tensor, ScalarType type, std::int64_t dim, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == type && tensor.dim() == dim, name, " must be ",
      torch::headeronly::toString(type), " of ", dim, " dimensions");
  return dense(tensor);
}

void check_rows(std::int64_t rows, std::int64_t batch, const Tensor& index) {
  STD_TORCH_CHECK(index.size(0) == rows, "index must have ", rows, " entries");
  STD_TORCH_CHECK(
      batch == 0 ? rows == 0 : rows % batch == 0, "rows must be a multiple of the batch, ", batch);
}

Normalize normalize_of(const std::string& name) {
  if (name == "max") return Normalize::kMax;
  if (name == "mean") return Normalize::kMean;
  STD_TORCH_CHECK(name == "none", "normalize must be max, mean or none; got ", name);
  return Normalize::kNone;
}

Norm norm_of(const std::string& name) {
  if (name == "l1") return Norm::kL1;
  if (name == "l2") return Norm::kL2;
  if (name == "l2sq") return Norm::kL2Squared;
  STD_TORCH_CHECK(name == "area", "norm must be l1, l2, l2sq or area; got ", name);
  return Norm::kArea;
}

Tensor channel_saliency(const Tensor& features) {
  STD_TORCH_CHECK(
      features.dim() == 4 && !is_complex(features), "features must be real, (B, K, h, w)");
  const Call call(features);
  const Tensor map = empty(
      features, {features.size(0), features.size(2), features.size(3)}, aoti_torch_dtype_float32());
  sg_kernels::channel_saliency(
      batch_of(features), float_of(features, "features"), data_to<float>(map), call.context());
  return map;
}

void check_out(const Tensor& out, const Tensor& images, std::int64_t rows) {
  STD_TORCH_CHECK(
      out.dim() == 4 && out.size(0) == rows && out.size(1) == images.size(1) &&
          out.size(2) == images.size(2) && out.size(3) == images.size(3) &&
          out.scalar_type() == images.scalar_type(),
      "out must have ", rows, " rows, of the images' size and dtype");
}

void check_grid(const Tensor& mask, const Tensor& images) {
  STD_TORCH_CHECK(
      images.numel() == 0 || (mask.size(1) >= 1 && mask.size(1) <= images.size(2) &&
                              mask.size(2) >= 1 && mask.size(2) <= images.size(3)),
      "mask must have cells, and be no finer than the images");
}

void graft_out(const Tensor& out, const Tensor& images, const Tensor& mask, const Tensor& index) {
  STD_TORCH_CHECK(images.dim() == 4, "images must be (B, C, H, W)");
  const Tensor cells = checked(mask, ScalarType::Bool, 3, "mask");
  const Tensor destinations = checked(index, ScalarType::Long, 1, "index");
  check_rows(mask.size(0), images.size(0), index);
  check_out(out, images, mask.size(0));
  check_grid(mask, images);
  const Call call(images);
  sg_kernels::graft(
      batch_of(images), data_of<bool>(cells), grid_of(mask), data_of<std::int64_t>(destinations),
      batch_of(out), call.context());
}

Tensor graft(const Tensor& images, const Tensor& mask, const Tensor& index) {
  STD_TORCH_CHECK(images.dim() == 4, "images must be (B, C, H, W)");
  const Tensor out = empty_rows(images, mask.size(0));
  graft_out(out, images, mask, index);
  return out;
}

Tensor graft_backward(
    const Tensor& grad, const Tensor& mask, const Tensor& index, std::int64_t augmentations) {
  STD_TORCH_CHECK(grad.dim() == 4, "grad must be (rows, C, H, W)");
  STD_TORCH_CHECK(augmentations >= 1, "augmentations must be >= 1");
  const Tensor cells = checked(mask, ScalarType::Bool, 3, "mask");
  const Tensor destinations = checked(index, ScalarType::Long, 1, "index");
  const std::int64_t batch = grad.size(0) / augmentations;
  STD_TORCH_CHECK(mask.size(0) == grad.size(0), "mask must have a row for each of grad's");
  check_grid(mask, grad);
  check_rows(grad.size(0), batch, index);
  const Call call(grad);
  const Tensor out = empty_rows(grad, batch);
  sg_kernels::graft_backward(
      batch_of(grad), float_of(grad, "grad"), data_of<bool>(cells), grid_of(mask),
      data_of<std::int64_t>(destinations), batch_of(out), call.context());
  return out;
}

// Targets as the kernels take them; `dense` keeps their memory.
Targets targets_of(const Tensor& dense, std::int64_t num_classes, double label_smoothing) {
  const bool ids = dense.dim() == 1;
  STD_TORCH_CHECK(
      dense.scalar_type() == (ids ? ScalarType::Long : ScalarType::Float),
      "targets must be int64 class ids or float32 rows");
  STD_TORCH_CHECK(
      ids || (dense.dim() == 2 && dense.size(1) == num_classes),
      "targets must have num_classes columns");
  return {
      ids ? data_of<std::int64_t>(dense) : nullptr, ids ? nullptr : data_of<float>(dense),
      num_classes, static_cast<float>(label_smoothing)};
}

Tensor mix_targets(
    const Tensor& targets, const Tensor& lam, const Tensor& index, std::int64_t num_classes,
    double label_smoothing) {
  const Tensor weights = checked(lam, ScalarType::Float, 1, "lam");
  const Tensor destinations = checked(index, ScalarType::Long, 1, "index");
  const Tensor rows_or_ids = dense(targets);
  const std::int64_t batch = targets.size(0), rows = lam.size(0);
  check_rows(rows, batch, index);
  const Targets source = targets_of(rows_or_ids, num_classes, label_smoothing);
  const Call call(lam);
  const Tensor mixed = empty(lam, {rows, num_classes}, aoti_torch_dtype_float32());
  sg_kernels::mix_targets(
      source, batch, data_of<float>(weights), data_of<std::int64_t>(destinations), rows,
      data_to<float>(mixed), call.context());
  return mixed;
}

// A seed that lies on the host is read here: an operator waits for no device.
Seed seed_of(const Tensor& seed, const std::optional<Tensor>& step, std::int64_t rank) {
  const auto* value = data_of<std::int64_t>(seed);
  const bool on_host = seed.is_cpu();
  return {
      on_host ? nullptr : value, on_host ? static_cast<std::uint64_t>(*value) : 0,
      step ? data_to<std::int64_t>(*step) : nullptr, static_cast<std::uint32_t>(rank)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> saliency_graft_out(
    const Tensor& out, const Tensor& images, const std::optional<Tensor>& features,
    const std::optional<Tensor>& ready_saliency, const std::optional<Tensor>& given_index,
    const std::optional<Tensor>& targets, const Tensor& seed_tensor,
    const std::optional<Tensor>& step, std::int64_t rank, const std::optional<Tensor>& quantiles,
    double keep_prob, const std::vector<std::int64_t>& grid_size, double temperature,
    const std::string& normalize, double threshold, std::optional<std::int64_t> k,
    const std::string& norm_name, double prob, std::int64_t augmentations, bool no_fixed_points,
    std::int64_t num_classes, double label_smoothing) {
  STD_TORCH_CHECK(images.dim() == 4, "images must be (B, C, H, W)");
  STD_TORCH_CHECK(
      features.has_value() != ready_saliency.has_value(), "give one of features and saliency");
  const auto is_number = [](const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Long && tensor.numel() == 1;
  };
  STD_TORCH_CHECK(
      is_number(seed_tensor) && (!step || is_number(*step)),
      "seed and step must be one int64 each");
  std::optional<Tensor> table;
  if (quantiles) {
    table = checked(*quantiles, ScalarType::Long, 1, "quantiles");
    STD_TORCH_CHECK(
        table->numel() == kQuantileBins + 1, "quantiles must have ", kQuantileBins, " bins");
  }
  STD_TORCH_CHECK(augmentations >= 1, "augmentations must be >= 1");
  const std::int64_t batch = images.size(0), rows = augmentations * batch;
  const Grid grid{grid_size.at(0), grid_size.at(1)};
  STD_TORCH_CHECK(
      grid.height >= 1 && grid.width >= 1 && grid.height <= images.size(2) &&
          grid.width <= images.size(3),
      "grid_size must be >= 1 and no finer than the images");
  STD_TORCH_CHECK(!k || (*k >= 1 && *k <= grid.cells()), "k must be in 1 .. cells");
  std::optional<Tensor> given_destinations;
  if (given_index) {
    given_destinations = checked(*given_index, ScalarType::Long, 1, "index");
    check_rows(rows, batch, *given_index);
  }
  check_out(out, images, rows);
  STD_TORCH_CHECK(!targets || targets->size(0) == batch, "targets: not the batch of images");
  std::optional<Tensor> dense_targets;
  Targets source{};
  if (targets) {
    dense_targets = dense(*targets);
    source = targets_of(*dense_targets, num_classes, label_smoothing);
  }
  const Norm norm = norm_of(norm_name);
  const Selection selection{
      static_cast<float>(temperature), normalize_of(normalize), static_cast<float>(threshold),
      k.value_or(0)};
  std::optional<Tensor> ready;
  if (ready_saliency) ready = checked(*ready_saliency, ScalarType::Float, 3, "saliency");
  STD_TORCH_CHECK(
      ready || (features->dim() == 4 && !is_complex(*features)),
      "features must be real, (B, K, h, w)");
  const Tensor& mapped = ready ? *ready : *features;
  const Grid map{mapped.size(mapped.dim() - 2), mapped.size(mapped.dim() - 1)};
  STD_TORCH_CHECK(
      mapped.size(0) == batch && map.cells() > 0,
      "features, saliency: not the batch of images, or without cells");

  const Call call(images);
  const Tensor lam = empty(images, {rows}, aoti_torch_dtype_float32());
  const Tensor index = empty(images, {rows}, aoti_torch_dtype_int64());
  const Tensor mask = empty(images, {rows, grid.height, grid.width}, aoti_torch_dtype_bool());
  const Tensor saliency = empty(images, {batch, map.height, map.width}, aoti_torch_dtype_float32());
  const Tensor mixed = empty(images, {rows, source.classes}, aoti_torch_dtype_float32());
  sg_kernels::saliency_graft(
      {batch_of(images),
       ready.has_value(),
       ready ? Batch{} : batch_of(*features),
       ready ? Float{} : float_of(*features, "features"),
       ready ? data_of<float>(*ready) : nullptr,
       map,
       grid,
       given_destinations ? data_of<std::int64_t>(*given_destinations) : nullptr,
       seed_of(seed_tensor, step, rank),
       selection,
       {table ? data_of<std::int64_t>(*table) : nullptr, keep_prob, prob, no_fixed_points},
       norm,
       source},
      {batch_of(out), data_to<float>(lam), data_to<std::int64_t>(index), data_to<bool>(mask),
       data_to<float>(saliency), data_to<float>(mixed)},
      call.context());
  return {lam, index, mask, saliency, mixed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> saliency_graft(
    const Tensor& images, const std::optional<Tensor>& features,
    const std::optional<Tensor>& saliency, const std::optional<Tensor>& index,
    const std::optional<Tensor>& targets, const Tensor& seed, const std::optional<Tensor>& step,
    std::int64_t rank, const std::optional<Tensor>& quantiles, double keep_prob,
    const std::vector<std::int64_t>& grid_size, double temperature, const std::string& normalize,
    double threshold, std::optional<std::int64_t> k, const std::string& norm, double prob,
    std::int64_t augmentations, bool no_fixed_points, std::int64_t num_classes,
    double label_smoothing) {
  STD_TORCH_CHECK(images.dim() == 4, "images must be (B, C, H, W)");
  const Tensor out = empty_rows(images, augmentations * images.size(0));
  return std::tuple_cat(
      std::make_tuple(out),
      saliency_graft_out(
          out, images, features, saliency, index, targets, seed, step, rank, quantiles, keep_prob,
          grid_size, temperature, normalize, threshold, k, norm, prob, augmentations,
          no_fixed_points, num_classes, label_smoothing));
}

}  // namespace
}  // namespace sg_kernels::ops

STABLE_TORCH_LIBRARY_IMPL(sg_kernels, SG_KERNELS_DEVICE, library) {
  using namespace sg_kernels::ops;
  library.impl("channel_saliency." SG_KERNELS_BACKEND, TORCH_BOX(&channel_saliency));
  library.impl("graft." SG_KERNELS_BACKEND, TORCH_BOX(&graft));
  library.impl("graft_out." SG_KERNELS_BACKEND, TORCH_BOX(&graft_out));
  library.impl("graft_backward." SG_KERNELS_BACKEND, TORCH_BOX(&graft_backward));
  library.impl("mix_targets." SG_KERNELS_BACKEND, TORCH_BOX(&mix_targets));
  library.impl("saliency_graft." SG_KERNELS_BACKEND, TORCH_BOX(&saliency_graft));
  library.impl("saliency_graft_out." SG_KERNELS_BACKEND, TORCH_BOX(&saliency_graft_out));
}
