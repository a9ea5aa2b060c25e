// std::condition_variable as every libstdc++ has it: GCC 12 gave `wait` another version, which
// older systems lack.

#pragma once

#include <condition_variable>

asm(".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,"
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
