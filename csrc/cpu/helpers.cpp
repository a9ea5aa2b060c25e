#include "csrc/cpu/helpers.h"

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cstdlib>
#include <cstdio>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace claa::cpu {

namespace {

struct Job {
  void (*work)(const void*, int64_t);
  const void* context;
  int64_t workers;
  int64_t joined = 1, active = 0;
  std::condition_variable idle = {};
};

struct Helpers {
  std::mutex mutex;
  std::condition_variable wanted;
  std::deque<Job*> jobs;
  int64_t threads = 0;

  [[noreturn]] void help() {
    std::unique_lock lock(mutex);
    if (const char* ns = std::getenv("CLAA_SLICE")) {
      struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t prio; uint64_t runtime, deadline, period; } attr = {48, 0, 0, 0, 0, (uint64_t)atoll(ns), 0, 0};
      if (syscall(SYS_sched_setattr, 0, &attr, 0)) perror("sched_setattr");
    }
    for (;;) {
      const auto open = [](const Job* job) { return job->joined < job->workers; };
      auto job = jobs.end();
      wanted.wait(lock, [&] {
        job = std::find_if(jobs.begin(), jobs.end(), open);
        return job != jobs.end();
      });
      Job& mine = **job;
      const int64_t worker = mine.joined++;
      ++mine.active;
      lock.unlock();
      mine.work(mine.context, worker);
      lock.lock();
      if (--mine.active == 0) mine.idle.notify_one();
    }
  }
};

Helpers* helpers = new Helpers;  // never destroyed: threads wait in it until the process ends

// The child of a fork has none of its parent's threads.
const int registered = pthread_atfork(nullptr, nullptr, [] { helpers = new Helpers; });

}  // namespace

void with_helpers(int64_t workers, void (*work)(const void*, int64_t), const void* context) {
  if (workers == 1) return work(context, 0);
  Helpers& h = *helpers;
  Job job{work, context, workers};
  {
    std::unique_lock lock(h.mutex);
    for (; h.threads < workers - 1; ++h.threads) std::thread(&Helpers::help, &h).detach();
    h.jobs.push_back(&job);
  }
  for (int64_t i = 1; i < workers; ++i) h.wanted.notify_one();
  work(context, 0);
  std::unique_lock lock(h.mutex);
  h.jobs.erase(std::find(h.jobs.begin(), h.jobs.end(), &job));
  job.idle.wait(lock, [&] { return job.active == 0; });
}

}  // namespace claa::cpu
