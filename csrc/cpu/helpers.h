// Threads that help the one which calls an op. They sleep in between.
#pragma once

#include <cstdint>

namespace claa::cpu {

// Calls work(context, 0) in this thread and work(context, i), 0 < i < workers, in threads that come
// free before it returns.
void with_helpers(int64_t workers, void (*work)(const void* context, int64_t worker),
                  const void* context);

}  // namespace claa::cpu
