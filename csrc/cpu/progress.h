// Deals the units of one call (`Schedule` in csrc/kernels.h) to its workers.
//
// A worker that becomes free takes what is left of the oldest round, so none waits for a worker
// that the operating system has descheduled while there is anything else to do. Each worker begins
// with a part of its own of every step, consecutive units, which suits the caches; after that it
// steals half of the largest part that is left.

#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "csrc/cpu/condition.h"
#include "csrc/kernels.h"

namespace claa::cpu {

class Progress {
 public:
  Progress(const Schedule& plan, int64_t workers);

  // How many workers are worth starting.
  int64_t workers() const { return workers_; }

  // Marks `portion` as done, unless it is new, and makes it the next one of its worker; false when
  // all units are taken. Waits while units are left that may not be taken yet.
  bool next(Portion& portion);

 private:
  struct Part {
    int64_t begin, end;
  };
  struct Round {
    int64_t number = -1;  // -1: the slot is free
    int step = 0;
    int64_t untaken = 0, unfinished = 0;
    std::vector<Part> parts;
  };

  void finish(const Portion& portion);
  bool take(Portion& portion);
  bool spin_for_change(std::unique_lock<std::mutex>& lock);
  void take_from(Round& round, Portion& portion);
  Round* open_round();
  void begin_step(Round& round);
  int64_t units_of(int64_t round, int step) const;
  bool all_taken() const;

  const Schedule plan_;
  const int64_t grain_, workers_;
  std::mutex mutex_;  // guards all members below
  std::vector<Round> slots_;
  const int64_t rounds_;  // with the last one, which waits for all others
  int64_t opened_ = 0;
  bool may_spin_ = true;
  std::atomic<int64_t> changes_ = 0;  // counts the moments when units may have become available
  Condition wake_;
};

}  // namespace claa::cpu
