// Stands in for std::condition_variable, whose `wait` has, since GCC 12, a symbol version that
// older systems lack.

#pragma once

#include <pthread.h>

#include <mutex>

namespace claa::cpu {

class Condition {
 public:
  template <class Predicate>
  void wait(std::unique_lock<std::mutex>& lock, Predicate is_met) {
    while (!is_met()) pthread_cond_wait(&condition_, lock.mutex()->native_handle());
  }
  void notify_one() { pthread_cond_signal(&condition_); }
  void notify_all() { pthread_cond_broadcast(&condition_); }

 private:
  pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
};

}  // namespace claa::cpu
