// Memory for results and scratch.
//
// Through the C shim that AOTInductor's generated code calls: torch::stable::new_empty looks its
// operator up by name and boxes its arguments on every call, which took as long as the rest of a
// small op.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "src/claa_ops/checks.h"

namespace claa {

// A contiguous, uninitialised tensor on the device of `like`, with its dtype unless another
// is given.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                       std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t dim = shape.size(); dim-- > 1;)
    strides[dim - 1] = strides[dim] * std::max<int64_t>(1, shape[dim]);
  int32_t device = 0, type = 0;
  aoti_torch_get_device_type(like.get(), &device);
  if (dtype)
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  else
    aoti_torch_get_dtype(like.get(), &type);
  AtenTensorHandle tensor = nullptr;
  if (aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), type, device,
                               like.get_device_index(), &tensor)) {
    std::ostringstream text;
    write_list(text, shape);
    fail("claa", "torch could not allocate a tensor on ", device_of(like), " of shape ",
         text.str());
  }
  return Tensor(tensor);
}

}  // namespace claa
