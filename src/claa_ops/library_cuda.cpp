// The CUDA library. The ops' kernels are not in it yet; it tells which of its code a device runs.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "csrc/cuda/device_code.h"

namespace {

int64_t cuda_device_code(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  int sm = 0;
  const cudaError_t status = claa::cuda::device_code(&sm);
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("_cuda_device_code: ") + cudaGetErrorString(status));
  return sm;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(claa, m) { m.def("_cuda_device_code(int device) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(claa, CompositeExplicitAutograd, m) {
  m.impl("_cuda_device_code", TORCH_BOX(&cuda_device_code));
}
