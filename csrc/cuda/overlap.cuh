// Launches that overlap (programmatic dependent launch, sm_90 on): the blocks of a kernel are
// placed and set up while the kernel ahead of it in the stream still runs.

#pragma once

#include <type_traits>

#include "csrc/cuda/common.cuh"

namespace claa::cuda {

// By all threads, before they touch global memory: until the kernels ahead have ended and what they
// wrote can be read. Only a prefetch into the L2 cache may come before: all writes go through that
// cache, so nothing in it is old. From here on the next kernel may be placed; it waits in its turn.
// Inputs are read by plain loads: __ldg promises memory that nobody writes while the kernel lives,
// and the kernel ahead does.
__device__ inline void wait_for_kernels_ahead() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a launch overlap, where the device can: adds to its attributes, which have room.
inline void let_overlap(cudaLaunchConfig_t& config) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return;
  cudaLaunchAttribute& attribute = config.attrs[config.numAttrs++];
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
}

// Launches a kernel whose threads all call wait_for_kernels_ahead().
template <class... Params>
cudaError_t launch_overlapping(void (*kernel)(Params...), dim3 grid, dim3 block,
                               cudaStream_t stream, std::type_identity_t<Params>... params) {
  cudaLaunchAttribute attributes[1];
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = attributes;
  let_overlap(config);
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace claa::cuda
