#include "csrc/cpu/helpers.h"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <list>
#include <mutex>
#include <thread>

#include "csrc/cpu/condition.h"

namespace claa::cpu {

namespace {

// Threads for each helper that a call wants: on a busy machine one of several is scheduled sooner
// than one thread would be.
constexpr int64_t kCandidates = 3;
// The time slice that a helper asks for: the scheduler runs short slices sooner. Linux 6.12 and
// later honour it.
constexpr uint64_t kSliceNs = 100'000;

void ask_for_short_slices() {
  struct {  // sched_attr, which old systems' headers do not declare
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes{};
  attributes.size = sizeof attributes;
  attributes.runtime = kSliceNs;
  syscall(SYS_sched_setattr, 0, &attributes, 0);  // if it fails, the slice stays as it was
}

// A call that wants help. It lies on the caller's stack, and the caller removes it from the list.
struct Job {
  const Step& step;
  int64_t workers;
  std::atomic<int64_t> started = 1;  // workers; the caller is worker 0
  int64_t running = 0;               // helpers
  Condition idle = {};
};

struct Helpers {
  std::mutex mutex;  // guards all members below, and the jobs
  Condition wanted;
  std::list<Job*> jobs;
  int64_t threads = 0;

  void help() {
    ask_for_short_slices();
    std::unique_lock lock(mutex);
    for (;;) {
      auto found = jobs.end();
      wanted.wait(lock, [&] {
        found = std::find_if(jobs.begin(), jobs.end(),
                             [](const Job* job) { return job->started < job->workers; });
        return found != jobs.end();
      });
      Job& job = **found;
      const int64_t worker = job.started++;
      ++job.running;
      lock.unlock();
      work_through(job.step, worker);
      lock.lock();
      if (--job.running == 0) job.idle.notify_one();
    }
  }
};

// Never destroyed: its threads wait on it until the process ends.
Helpers* helpers = new Helpers;

bool forked = false;

// A forked child has none of its parent's threads, and the mutex may be locked.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  helpers = new Helpers;
});

}  // namespace

bool is_forked() { return forked; }

void work_through(const Step& step, int64_t worker) {
  for (Portion portion{.worker = worker}; step(portion);) {
  }
}

void with_helpers(int64_t workers, const Step& step) {
  Helpers& all = *helpers;
  Job job{.step = step, .workers = workers};
  std::unique_lock lock(all.mutex);
  for (; all.threads < kCandidates * (workers - 1); ++all.threads)
    std::thread(&Helpers::help, &all).detach();
  const auto place = all.jobs.insert(all.jobs.end(), &job);
  lock.unlock();
  for (int64_t i = 1; i < workers; ++i) all.wanted.notify_one();
  // A helper that was woken and has not started waits for a processor; another may get one sooner.
  for (Portion portion{.worker = 0}; step(portion);)
    if (job.started.load(std::memory_order_relaxed) < workers) all.wanted.notify_one();
  lock.lock();
  all.jobs.erase(place);
  job.idle.wait(lock, [&] { return job.running == 0; });
}

}  // namespace claa::cpu
