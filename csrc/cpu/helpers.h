// Threads that help the one which calls an op, and sleep in between. Nobody waits for a helper that
// has not begun: on a busy machine it may be long in coming.

#pragma once

#include <cstdint>
#include <functional>

#include "csrc/kernels.h"

namespace claa::cpu {

// Computes a portion for portion.worker; false if nothing is left.
using Step = std::function<bool(Portion& portion)>;

// Takes steps as this worker until nothing is left.
void work_through(const Step& step, int64_t worker);

// Works through the steps in this thread, as worker 0, and in those of workers - 1 helpers that
// come before nothing is left. Returns when all that began have ended.
void with_helpers(int64_t workers, const Step& step);

// Whether this process was forked from another one, which takes none of its parent's threads along:
// the OpenMP that torch uses would wait for them.
bool is_forked();

}  // namespace claa::cpu
