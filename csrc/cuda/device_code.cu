// device_code: which of the architectures in this library runs on the current device.
//
// The kernel does nothing; the runtime tells which of its binaries it loaded for the device.

#include <cute/config.hpp>

#include "csrc/kernels.h"

namespace claa::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

cudaError_t device_code(int* sm) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaSuccess) *sm = attributes.binaryVersion;
  return status;
}

}  // namespace claa::cuda
