// Host side of the Hopper kernels: whether the device runs them, which instance fits, the launch.

#pragma once

#include <type_traits>

#include "csrc/cuda/overlap.cuh"

namespace claa::cuda::hopper {

// Whether the current device is of sm_90, for whose instructions alone these kernels are compiled.
inline bool device_fits() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int64_t most_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

inline int padded_dim(const WindowAttention& a) {
  return a.dim <= 64 ? 64 : a.dim <= 128 ? 128 : 256;
}

// Calls fn with a value of the type of queries and keys, and with the padded head dimension.
template <class Fn>
cudaError_t with_shape(const WindowAttention& a, Fn fn) {
  const auto with_dim = [&](auto type) {
    switch (padded_dim(a)) {
      case 64: return fn(type, std::integral_constant<int, 64>{});
      case 128: return fn(type, std::integral_constant<int, 128>{});
      default: return fn(type, std::integral_constant<int, 256>{});
    }
  };
  return a.dtype == DType::f16 ? with_dim(__half{}) : with_dim(__nv_bfloat16{});
}

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  bool is_cooperative = false;  // all blocks run at once, so they may wait for each other
  bool overlaps = false;        // all threads call wait_for_kernels_ahead()
};

template <class... Params>
cudaError_t launch_kernel(void (*kernel)(Params...), const Launch& launch, cudaStream_t stream,
                          const std::type_identity_t<Params>&... params) {
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(launch.shared_bytes));
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2]{
      {.id = cudaLaunchAttributeCooperative, .val = {.cooperative = launch.is_cooperative}}};
  cudaLaunchConfig_t config{.gridDim = dim3(unsigned(launch.blocks)),
                            .blockDim = dim3(unsigned(launch.threads)),
                            .dynamicSmemBytes = size_t(launch.shared_bytes),
                            .stream = stream,
                            .attrs = attributes,
                            .numAttrs = 1};
  if (launch.overlaps) let_overlap(config);
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace claa::cuda::hopper
