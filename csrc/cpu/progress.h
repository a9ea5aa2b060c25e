// Who computes what: deals the units of one call (`Schedule` in csrc/kernels.h) to its workers.
//
// A worker that comes free takes what is left of the oldest round, so none waits for a worker that
// the operating system has put aside, until there is nothing else to do. Each worker has a part of
// every step, neighbouring units, as caches like it; when it is through, it takes half of what
// another one has left.

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

  // The workers that are worth their start.
  int64_t workers() const { return workers_; }

  // Marks `portion` as done, unless it is new, and makes it the next one of its worker; false when
  // all units are taken. Waits while units are left that none may take yet.
  bool next(Portion& portion);

 private:
  struct Part {
    int64_t begin, end;
  };
  struct Round {
    int64_t number = -1;  // -1: its place is free
    int step = 0;
    int64_t untaken = 0, undone = 0;
    std::vector<Part> parts;
  };

  void finish(const Portion& portion);
  bool take(Portion& portion);
  bool look_for_news(std::unique_lock<std::mutex>& lock);
  void take_from(Round& round, Portion& portion);
  Round* open_round();
  void begin_step(Round& round);
  int64_t units_of(int64_t round, int step) const;
  bool all_taken() const;

  const Schedule plan_;
  const int64_t grain_, workers_;
  std::mutex mutex_;  // of all that follows
  std::vector<Round> places_;
  const int64_t rounds_;  // with the last one, which waits for all
  int64_t opened_ = 0;
  bool is_patient_ = true;
  std::atomic<int64_t> news_ = 0;  // changes when there may be units to take that there were not
  Condition wake_;
};

}  // namespace claa::cpu
