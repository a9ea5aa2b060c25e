// Threads that help the one that calls an op, and sleep between calls. Nobody waits for a helper
// that has not started: on a busy machine that may take long.

#pragma once

#include <cstdint>
#include <functional>

#include "csrc/kernels.h"

namespace claa::cpu {

// Computes a portion for portion.worker; false if nothing is left.
using Step = std::function<bool(Portion& portion)>;

// Takes steps as `worker` until nothing is left.
void work_through(const Step& step, int64_t worker);

// Works through the steps in this thread, as worker 0, and in up to workers - 1 helpers, as many as
// start before nothing is left. Returns when all that started have finished.
void with_helpers(int64_t workers, const Step& step);

// Whether this process was forked. A forked process has none of its parent's threads, and the
// OpenMP that torch uses would wait for them.
bool is_forked();

}  // namespace claa::cpu
