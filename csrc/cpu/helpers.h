// Threads that help the one which calls an op, and sleep in between. Nobody waits for a helper that
// has not begun: on a busy machine it may be long in coming.

#pragma once

#include <cstdint>
#include <functional>

namespace claa::cpu {

// Calls work(0) in this thread and work(i), 0 < i < workers, in those helpers that come before it
// is through. Returns when every call that began has ended.
void with_helpers(int64_t workers, const std::function<void(int64_t worker)>& work);

// Whether this process was forked from another one, which takes none of its parent's threads along:
// the OpenMP that torch uses would wait for them.
bool is_forked();

}  // namespace claa::cpu
