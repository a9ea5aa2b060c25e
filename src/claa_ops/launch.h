// The only file of the border that differs between the CPU and CUDA: the border is compiled once
// for each.

#pragma once

#include <algorithm>

#include "src/claa_ops/allocate.h"
#include "src/claa_ops/checks.h"

#ifdef CLAA_CUDA
#include <torch/csrc/stable/accelerator.h>
#else
#include <pthread.h>
#include <time.h>

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

// The threads that a kernel prepares scratch memory for.
inline int64_t workers() { return torch::stable::get_num_threads(); }

// Scratch memory for `params`, empty if it needs none. Keep it until the launch.
template <class Params>
Tensor workspace_for(const Params& params, const Tensor& like) {
  return allocate(like, {cpu::schedule(params).workspace_bytes}, ScalarType::Byte);
}

// Whether a thread is running at this moment: its CPU clock advances. True for one that has ended.
inline bool is_running(clockid_t cpu_clock) {
  timespec before, after;
  if (clock_gettime(cpu_clock, &before) || clock_gettime(cpu_clock, &after)) return true;
  return before.tv_nsec != after.tv_nsec || before.tv_sec != after.tv_sec;
}

// Works through the steps in this thread and in others at the same time.
//
// After an op of torch its threads spin for some milliseconds: they start at once, and other
// threads would compete with them for the cores. But a parallel region ends only when all of its
// threads have run, and on a busy machine a thread that has spun through its time slice is
// scheduled last. So torch's threads take part if they are running at this moment. Otherwise our
// own helpers do, and only those that have started are waited for.
inline void spread(int64_t workers, const cpu::Step& step) {
  constexpr int64_t kWatched = 4;  // threads: asking for one clock takes half a microsecond
  // The clocks of the threads that last worked for this one. None has yet: a clock that always
  // runs.
  static thread_local clockid_t clocks[kWatched] = {CLOCK_MONOTONIC, CLOCK_MONOTONIC,
                                                    CLOCK_MONOTONIC, CLOCK_MONOTONIC};
  if (workers == 1) return cpu::work_through(step, 0);
  const auto last = clocks + std::min(workers - 1, kWatched);
  if (cpu::is_forked() || !std::all_of(clocks, last, is_running))
    return cpu::with_helpers(workers, step);
  clockid_t* const of_team = clocks;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      if (0 < worker && worker <= kWatched)
        pthread_getcpuclockid(pthread_self(), &of_team[worker - 1]);
      cpu::work_through(step, worker);
    }
  });
}

// Runs `params` on as many threads as torch has.
template <class Params>
void launch(const Tensor&, const Params& params) {
  cpu::Progress progress(cpu::schedule(params), workers());
  spread(progress.workers(), [&](cpu::Portion& portion) {
    if (!progress.next(portion)) return false;
    cpu::run(params, portion);
    return true;
  });
}

#endif

}  // namespace claa
