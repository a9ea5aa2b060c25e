// The CUDA side's view of the device.

#pragma once

#include <cuda_runtime_api.h>

namespace claa::cuda {

// Sets `sm` to the architecture (90 for sm_90) of the code that runs on the current device.
cudaError_t device_code(int* sm);

}  // namespace claa::cuda
