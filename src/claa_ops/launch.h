// The only place that knows whether this library runs on the CPU or on CUDA.

#pragma once

#include <algorithm>

#include "src/claa_ops/checks.h"

namespace claa {

// Threads that a CPU kernel may prepare scratch memory for.
inline int64_t workers() { return torch::stable::get_num_threads(); }

// Scratch memory for `params`, empty if it needs none. Keep it until the launch.
template <class Params>
Tensor workspace_for(const Params& params, const Tensor& like) {
  return torch::stable::new_empty(like, {cpu::schedule(params).workspace_bytes}, ScalarType::Byte);
}

// Runs `params` on torch's CPU threads, phase by phase.
template <class Params>
void launch(const Params& params) {
  constexpr int64_t kWorthAThread = 64 << 10;  // bytes of traffic
  const cpu::Schedule plan = cpu::schedule(params);
  const int64_t grain = kWorthAThread / std::max<int64_t>(1, plan.unit_cost);
  for (int phase = 0; phase < plan.phases; ++phase)
    torch::stable::parallel_for(
        0, plan.units, std::max<int64_t>(1, grain),
        [&](int64_t begin, int64_t end) { cpu::run(params, phase, begin, end); });
}

}  // namespace claa
