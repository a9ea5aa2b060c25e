#include "csrc/cpu/helpers.h"

#include <pthread.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <thread>

#include "csrc/cpu/condition.h"

namespace claa::cpu {

namespace {

// A call that wants help. It lies on the stack of its caller, who takes it from the list.
struct Job {
  const std::function<void(int64_t)>& work;
  int64_t workers;
  int64_t begun = 1, running = 0;  // by helpers; the caller is worker 0
  Condition idle = {};
};

struct Helpers {
  std::mutex mutex;  // of all that follows, and of the jobs
  Condition wanted;
  std::list<Job*> jobs;
  int64_t threads = 0;

  void help() {
    std::unique_lock lock(mutex);
    for (;;) {
      auto found = jobs.end();
      wanted.wait(lock, [&] {
        found = std::find_if(jobs.begin(), jobs.end(),
                             [](const Job* job) { return job->begun < job->workers; });
        return found != jobs.end();
      });
      Job& job = **found;
      const int64_t worker = job.begun++;
      ++job.running;
      lock.unlock();
      job.work(worker);
      lock.lock();
      if (--job.running == 0) job.idle.notify_one();
    }
  }
};

// Never destroyed: its threads wait in it until the process ends.
Helpers* helpers = new Helpers;

bool forked = false;

// A child has none of its parent's threads, and perhaps a locked mutex.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  helpers = new Helpers;
});

}  // namespace

bool is_forked() { return forked; }

void with_helpers(int64_t workers, const std::function<void(int64_t)>& work) {
  Helpers& all = *helpers;
  Job job{.work = work, .workers = workers};
  std::unique_lock lock(all.mutex);
  for (; all.threads < workers - 1; ++all.threads) std::thread(&Helpers::help, &all).detach();
  const auto place = all.jobs.insert(all.jobs.end(), &job);
  lock.unlock();
  for (int64_t i = 1; i < workers; ++i) all.wanted.notify_one();
  work(0);
  lock.lock();
  all.jobs.erase(place);
  job.idle.wait(lock, [&] { return job.running == 0; });
}

}  // namespace claa::cpu
