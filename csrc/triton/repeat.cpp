// Repeats calls of the Triton backend's saliency_graft without Python, on the LibTorch stable ABI.
// sg_kernels/backends/triton/repeat.py prepares the first call of each layout.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "../tensor.h"

namespace sg_kernels::triton {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Numbers = std::vector<std::int64_t>;

// The parameters of kernels that differ from call to call; repeat.py's Slot counts alike.
enum Slot : std::int64_t {
  kLiteral,
  kImages,
  kSource,
  kGivenMask,
  kGivenIndex,
  kTargets,
  kStep,
  kQuantiles,
  kAffine,
  kSeed,
  kHostSeed,
  kKeepProb,
  kProb,
  kTemperature,
  kThreshold,
  kLabelSmoothing,
  kOut,
  kLam,
  kIndex,
  kMask,
  kSaliency,
  kMixed,
  kPartials,
  kGrid,
  kDrawn,
  kSlots,
};
using Values = std::array<std::uint64_t, kSlots>;

// CUlaunchConfig and CUlaunchAttribute of the driver, whose header this build does without.
struct Attribute {
  std::int32_t id;
  std::int32_t padding;
  std::int32_t value[16];
};
constexpr std::int32_t kProgrammaticStreamSerialization = 6;

struct Config {
  std::uint32_t grid[3], block[3], shared_bytes;
  void* stream;
  Attribute* attributes;
  std::uint32_t attribute_count;
};

using LaunchKernel = int (*)(const Config*, void* function, void** parameters, void** extra);
using CurrentStream = AOTITorchError (*)(std::int32_t device, void** stream);

struct Parameter {
  std::int64_t slot;
  std::uint64_t literal;
};

struct Launch {
  void* function;
  std::uint32_t grid[3], threads, shared_bytes;
  bool overlaps;
  std::vector<Parameter> parameters;
};

struct Fresh {
  std::int64_t slot;
  Numbers sizes, strides;
};

struct Prepared {
  LaunchKernel launch_kernel;
  CurrentStream current_stream;
  std::vector<Fresh> fresh;
  std::vector<Launch> launches;
};

// Reads the numbers that repeat.py's keep() writes.
class Reader {
 public:
  explicit Reader(const Tensor& numbers)
      : next_(static_cast<const std::int64_t*>(numbers.data_ptr())) {}

  std::int64_t number() { return *next_++; }

  Numbers numbers() {
    const std::int64_t count = number();
    next_ += count;
    return {next_ - count, next_};
  }

  template <class T>
  T address() {
    return reinterpret_cast<T>(number());
  }

  std::uint32_t count() { return static_cast<std::uint32_t>(number()); }

 private:
  const std::int64_t* next_;
};

Launch read_launch(Reader& reader) {
  Launch launch{};
  launch.function = reader.address<void*>();
  for (std::uint32_t& extent : launch.grid) extent = reader.count();
  launch.threads = reader.count();
  launch.shared_bytes = reader.count();
  launch.overlaps = reader.number() != 0;
  launch.parameters.resize(reader.number());
  for (Parameter& parameter : launch.parameters) {
    parameter.slot = reader.number();
    parameter.literal = static_cast<std::uint64_t>(reader.number());
  }
  return launch;
}

Prepared read(const Tensor& encoded) {
  Reader reader(encoded);
  Prepared prepared{};
  prepared.launch_kernel = reader.address<LaunchKernel>();
  prepared.current_stream = reader.address<CurrentStream>();
  prepared.fresh.resize(reader.number());
  for (Fresh& fresh : prepared.fresh) {
    fresh.slot = reader.number();
    fresh.sizes = reader.numbers();
    fresh.strides = reader.numbers();
  }
  prepared.launches.resize(reader.number());
  for (Launch& launch : prepared.launches) launch = read_launch(reader);
  return prepared;
}

// Prepared calls by all that their launches depend on.
class Memory {
 public:
  std::shared_ptr<const Prepared> find(const Numbers& layout) {
    const std::lock_guard lock(mutex_);
    const auto found = calls_.find(layout);
    return found == calls_.end() ? nullptr : found->second;
  }

  void keep(const Numbers& layout, Prepared prepared) {
    constexpr std::size_t kMost = 1024;
    const std::lock_guard lock(mutex_);
    if (calls_.size() >= kMost) calls_.clear();
    calls_[layout] = std::make_shared<const Prepared>(std::move(prepared));
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    calls_.clear();
  }

 private:
  std::mutex mutex_;
  std::map<Numbers, std::shared_ptr<const Prepared>> calls_;
};

Memory memory;

// Adds what a launch may depend on: dtype, device, sizes, strides and alignment.
void describe(const Tensor& tensor, Numbers& layout) {
  constexpr std::uintptr_t kChunk = 16;  // bytes of the widest access
  const std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(tensor.data_ptr()) | kChunk;
  layout.push_back(tensor.dim());
  layout.push_back(dtype_of(tensor));
  layout.push_back(tensor.is_cpu());
  layout.push_back(static_cast<std::int64_t>(bits & (~bits + 1)));
  for (const std::int64_t size : tensor.sizes()) layout.push_back(size);
  for (const std::int64_t stride : tensor.strides()) layout.push_back(stride);
}

void describe(const MaybeTensor& tensor, Numbers& layout) {
  if (tensor)
    describe(*tensor, layout);
  else
    layout.push_back(-1);
}

std::uint64_t address(const Tensor& tensor) {
  return reinterpret_cast<std::uintptr_t>(tensor.data_ptr());
}

std::uint64_t address(const MaybeTensor& tensor) { return tensor ? address(*tensor) : 0; }

// A probability as a threshold of 32-bit words.
std::uint64_t threshold_of(double probability) {
  return static_cast<std::uint64_t>(probability * 4294967296.0);
}

std::uint64_t float_bits(double value) {
  const auto rounded = static_cast<float>(value);
  std::uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  return bits;
}

// Of images that come out standardised, by the position in call.py's DTYPES.
std::int32_t standardized_dtype(std::int64_t position) {
  switch (position) {
    case 0: return aoti_torch_dtype_float16();
    case 1: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float32();
  }
}

std::int32_t dtype_of_fresh(std::int64_t slot, std::int32_t images) {
  switch (slot) {
    case kOut: return images;
    case kIndex:
    case kDrawn: return aoti_torch_dtype_int64();
    case kMask: return aoti_torch_dtype_bool();
    default: return aoti_torch_dtype_float32();
  }
}

// Returns whether there was room.
bool allocate(
    const Prepared& prepared, const Tensor& images, std::int32_t dtype, Values& values,
    std::array<MaybeTensor, kSlots>& tensors) {
  for (const auto& [slot, sizes, strides] : prepared.fresh) {
    tensors[slot] = try_empty(images, sizes, strides, dtype_of_fresh(slot, dtype));
    if (!tensors[slot]) return false;
    // Where `out` is given, an empty tensor is returned in its place.
    if (values[slot] == 0) values[slot] = address(*tensors[slot]);
  }
  return true;
}

// Returns the driver's error.
int launch(const Prepared& prepared, const Launch& given, const Values& values, void* stream) {
  std::array<std::uint64_t, 128> bits;
  std::array<void*, 128> parameters;
  STD_TORCH_CHECK(given.parameters.size() <= bits.size(), "a kernel has too many parameters");
  for (std::size_t i = 0; i < given.parameters.size(); ++i) {
    const auto [slot, literal] = given.parameters[i];
    bits[i] = slot == kLiteral ? literal : values[slot];
    parameters[i] = &bits[i];
  }
  Attribute overlap{kProgrammaticStreamSerialization, 0, {1}};
  Config config{};
  std::copy_n(given.grid, 3, config.grid);
  config.block[0] = given.threads;
  config.block[1] = config.block[2] = 1;
  config.shared_bytes = given.shared_bytes;
  config.stream = stream;
  config.attributes = &overlap;
  config.attribute_count = given.overlaps ? 1 : 0;
  return prepared.launch_kernel(&config, given.function, parameters.data(), nullptr);
}

// The outputs; none, with nothing done, where there is no room or the driver refuses.
std::vector<Tensor> run(
    const Prepared& prepared, const Tensor& images, std::int32_t out_dtype, Values values) {
  const std::int32_t device = images.get_device_index();
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (!images.is_cpu()) guard.emplace(device);
  std::array<MaybeTensor, kSlots> fresh;
  if (!allocate(prepared, images, out_dtype, values, fresh)) return {};
  void* stream;
  TORCH_ERROR_CODE_CHECK(prepared.current_stream(device, &stream));
  for (std::size_t i = 0; i < prepared.launches.size(); ++i) {
    const int error = launch(prepared, prepared.launches[i], values, stream);
    if (error != 0 && i == 0) return {};
    STD_TORCH_CHECK(error == 0, "launch ", i + 1, " of saliency_graft: CUDA error ", error);
  }
  return {*fresh[kOut],  *fresh[kLam],      *fresh[kIndex],
          *fresh[kMask], *fresh[kSaliency], *fresh[kMixed]};
}

// The operator saliency_graft again: its outputs, or none where no call like it is kept or run()
// gives none: Python then makes the call. Given `prepared`, keeps that for calls like this one. The
// other parameters are those of operators.cpp.
std::vector<Tensor> repeat(
    const Tensor& images, const Tensor& seed, const std::vector<std::int64_t>& grid_size,
    double temperature, double threshold, std::int64_t normalize, std::int64_t norm,
    const MaybeTensor& features, const MaybeTensor& saliency, const MaybeTensor& mask,
    const MaybeTensor& index, const MaybeTensor& targets, const MaybeTensor& out,
    const MaybeTensor& step, std::int64_t rank, const MaybeTensor& quantiles, double keep_prob,
    std::optional<std::int64_t> k, double prob, std::int64_t augmentations, bool no_fixed_points,
    std::int64_t num_classes, double label_smoothing, std::int64_t depth, const MaybeTensor& affine,
    std::int64_t dtype, std::int64_t overlap, const MaybeTensor& prepared) {
  Numbers layout;
  layout.reserve(128);
  layout = {
      normalize,
      norm,
      rank,
      augmentations,
      num_classes,
      no_fixed_points,
      depth,
      dtype,
      overlap,
      k.value_or(-1),
      grid_size.at(0),
      grid_size.at(1),
      images.get_device_index()};
  describe(images, layout);
  describe(seed, layout);
  for (const MaybeTensor* tensor :
       {&features, &saliency, &mask, &index, &targets, &out, &step, &quantiles, &affine})
    describe(*tensor, layout);
  if (prepared) {
    memory.keep(layout, read(*prepared));
    return {};
  }
  const std::shared_ptr<const Prepared> known = memory.find(layout);
  if (!known) return {};
  Values values{};
  values[kImages] = address(images);
  values[kSource] = address(features ? features : saliency);
  values[kGivenMask] = address(mask);
  values[kGivenIndex] = address(index);
  values[kTargets] = address(targets);
  values[kStep] = address(step);
  values[kQuantiles] = address(quantiles);
  values[kAffine] = address(affine);
  values[kSeed] = address(seed);
  values[kHostSeed] =
      seed.is_cpu() ? static_cast<std::uint64_t>(*static_cast<std::int64_t*>(seed.data_ptr())) : 0;
  values[kKeepProb] = threshold_of(keep_prob);
  values[kProb] = threshold_of(prob);
  values[kTemperature] = float_bits(temperature);
  values[kThreshold] = float_bits(threshold);
  values[kLabelSmoothing] = float_bits(label_smoothing);
  values[kOut] = address(out);
  return run(*known, images, affine ? standardized_dtype(dtype) : dtype_of(images), values);
}

void forget() { memory.clear(); }

}  // namespace
}  // namespace sg_kernels::triton

STABLE_TORCH_LIBRARY_IMPL(sg_kernels, CompositeExplicitAutograd, library) {
  library.impl("repeat", TORCH_BOX(&sg_kernels::triton::repeat));
  library.impl("forget", TORCH_BOX(&sg_kernels::triton::forget));
}
