// What every operator asks of tensors, on the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace sg_kernels {

inline std::int32_t dtype_of(const torch::stable::Tensor& tensor) {
  std::int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// A fresh tensor on the device of `like`; none where there is no room.
inline std::optional<torch::stable::Tensor> try_empty(
    const torch::stable::Tensor& like, const std::vector<std::int64_t>& sizes,
    const std::vector<std::int64_t>& strides, std::int32_t dtype) {
  std::int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  const AOTITorchError error = aoti_torch_empty_strided(
      static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device_type,
      like.get_device_index(), &handle);
  if (error != AOTI_TORCH_SUCCESS) return std::nullopt;
  return torch::stable::Tensor(handle);
}

}  // namespace sg_kernels
