#include <cstdlib>
// The only place that knows whether this library runs on the CPU or on CUDA: the border is compiled
// once for each.

#pragma once

#include <algorithm>

#include "src/claa_ops/allocate.h"
#include "src/claa_ops/checks.h"

#ifdef CLAA_CUDA
#include <torch/csrc/stable/accelerator.h>
#else
#include "csrc/cpu/helpers.h"
#include "csrc/cpu/progress.h"
#endif

namespace claa {

#ifdef CLAA_CUDA

inline int64_t workers() { return 1; }

// Scratch memory for `params`, empty if it needs none. Keep it until the launch.
template <class Params>
Tensor workspace_for(const Params& params, const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  return allocate(like, {cuda::workspace_bytes(params)}, ScalarType::Byte);
}

// Enqueues `params` on the current stream of the device where `like` lives.
template <class Params>
void launch(const Tensor& like, const Params& params) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) == 0, "CUDA launch",
        "torch has no current stream for device ", like.get_device_index());
  const cudaError_t status = cuda::run(params, static_cast<cudaStream_t>(stream));
  check(status == cudaSuccess, "CUDA launch", cudaGetErrorName(status), ": ",
        cudaGetErrorString(status));
}

#else

// Threads that a kernel may prepare scratch memory for.
inline int64_t workers() { return torch::stable::get_num_threads(); }

// Scratch memory for `params`, empty if it needs none. Keep it until the launch.
template <class Params>
Tensor workspace_for(const Params& params, const Tensor& like) {
  return allocate(like, {cpu::schedule(params).workspace_bytes}, ScalarType::Byte);
}

// Runs `params` on as many threads as torch has.
template <class Params>
void launch(const Tensor&, const Params& params) {
  cpu::Progress progress(cpu::schedule(params), workers());
  const auto work = [&](int64_t worker) {
    cpu::Portion portion{.worker = worker};
    while (progress.next(portion)) cpu::run(params, portion);
  };
  static const bool own = std::getenv("CLAA_OWN");
  if (own) {
    cpu::with_helpers(
        progress.workers(),
        [](const void* context, int64_t worker) {
          (*static_cast<decltype(work)*>(context))(worker);
        },
        &work);
  } else {
    torch::stable::parallel_for(0, progress.workers(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) work(worker);
    });
  }
}

#endif

}  // namespace claa
