// Deals the units of many schedules to helpers, for three callers at once, and checks that each
// unit is done once, not before those it needs, and alone in its scratch memory. Prints what is
// wrong.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "csrc/cpu/helpers.h"
#include "csrc/cpu/progress.h"

using claa::cpu::kSteps, claa::cpu::Portion, claa::cpu::Progress, claa::cpu::Schedule;

void require(bool holds, const char* what) {
  if (holds) return;
  std::puts(what);
  std::exit(1);
}

// Plain integers, so that a sanitizer sees two workers in one unit or in one slot.
struct Record {
  const Schedule& plan;
  std::vector<std::vector<int>> done;       // [round * kSteps + step][unit]
  std::vector<std::vector<int64_t>> owner;  // [slot][unit]: the round that wrote there last

  explicit Record(const Schedule& plan)
      : plan(plan),
        done((plan.rounds + 1) * kSteps, std::vector<int>(16)),
        owner(plan.rounds_at_once, std::vector<int64_t>(16)) {}

  bool is_complete(int64_t round, int step) const {
    const int64_t units = round == plan.rounds ? plan.last_units : plan.units[step];
    for (int64_t i = 0; i < units; ++i)
      if (done[round * kSteps + step][i] != 1) return false;
    return true;
  }

  bool is_complete(int64_t round) const {
    for (int step = 0; step < (round == plan.rounds ? 1 : kSteps); ++step)
      if (!is_complete(round, step)) return false;
    return true;
  }

  void add(const Portion& portion) {
    if (portion.step > 0)
      require(is_complete(portion.round, portion.step - 1),
              "a step started before the one before it was complete");
    for (int64_t round = 0; portion.round == plan.rounds && round < plan.rounds; ++round)
      require(is_complete(round), "the last units started before a round was complete");
    for (int64_t i = portion.begin; i < portion.end; ++i) {
      ++done[portion.round * kSteps + portion.step][i];
      if (portion.step == 0) owner[portion.slot][i] = portion.round;
    }
    for (int64_t i = 0; portion.step > 0 && i < plan.units[0]; ++i)
      require(owner[portion.slot][i] == portion.round, "two rounds in one slot");
  }
};

void deal(int64_t seed) {
  const int64_t later = seed % 3 ? 1 + seed % 9 : 0;
  const Schedule plan{.units = {1 + seed * 7 % 13, later, later && seed % 2 ? 3 : 0},
                      .unit_cost = seed % 5 ? 1 << 20 : 20'000,
                      .rounds = 1 + seed % 7,
                      .rounds_at_once = 1 + seed % 4,
                      .last_units = seed % 4};
  Record record(plan);
  Progress progress(plan, 1 + seed % 6);
  claa::cpu::with_helpers(progress.workers(), [&](Portion& portion) {
    if (!progress.next(portion)) return false;
    // One worker pauses for a while: the others open more rounds, or sleep.
    if (portion.worker == seed % 3 && portion.begin == seed % 5)
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    record.add(portion);
    return true;
  });
  for (int64_t round = 0; round <= plan.rounds; ++round)
    require(record.is_complete(round), "a unit was not done once");
}

int main() {
  std::vector<std::thread> callers;
  for (int64_t caller = 0; caller < 3; ++caller)
    callers.emplace_back([caller] {
      for (int64_t i = 0; i < 300; ++i) deal(caller + i);
    });
  for (std::thread& caller : callers) caller.join();
}
