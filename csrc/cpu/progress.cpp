#include "csrc/cpu/progress.h"

#include <immintrin.h>

#include <algorithm>
#include <chrono>

namespace claa::cpu {

namespace {

constexpr int64_t kWorthAThread = 64 << 10;  // bytes of traffic that justify one more thread
// How long a worker spins for a change before it opens another round, which takes more cache, or
// sleeps: a unit takes less.
constexpr auto kSpinTime = std::chrono::microseconds(50);

// Spins before it blocks: the lock is held for less time than it takes to sleep and wake.
void spin_then_lock(std::unique_lock<std::mutex>& lock) {
  for (int i = 0; i < 100; ++i) {
    if (lock.try_lock()) return;
    _mm_pause();
  }
  lock.lock();
}

int64_t all_units(const Schedule& plan) {
  int64_t units = 0;
  for (const int64_t n : plan.units) units += n;
  return units * plan.rounds + plan.last_units;
}

}  // namespace

Progress::Progress(const Schedule& plan, int64_t workers)
    : plan_(plan),
      grain_(std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, plan.unit_cost))),
      workers_(std::clamp<int64_t>((all_units(plan) + grain_ - 1) / grain_, 1, workers)),
      slots_(plan.rounds_at_once),
      rounds_(plan.rounds + (plan.last_units > 0)) {}

bool Progress::next(Portion& portion) {
  std::unique_lock lock(mutex_, std::defer_lock);
  spin_then_lock(lock);
  if (portion.begin < portion.end) finish(portion);
  while (!take(portion)) {
    if (all_taken()) return false;
    if (may_spin_) {
      may_spin_ = spin_for_change(lock);  // if there is none, a worker was descheduled
      continue;
    }
    if (open_round()) continue;
    const int64_t seen = changes_;
    wake_.wait(lock, [&] { return changes_ != seen; });
  }
  return true;
}

void Progress::finish(const Portion& portion) {
  Round& round = slots_[portion.slot];
  round.unfinished -= portion.end - portion.begin;
  if (round.unfinished > 0) return;
  ++round.step;
  if (units_of(round.number, round.step) > 0)
    begin_step(round);
  else
    round.number = -1;
  ++changes_;
  wake_.notify_all();
}

// Takes units of the oldest round that has any; opens a round if none is open.
bool Progress::take(Portion& portion) {
  Round* oldest = nullptr;
  bool is_open = false;
  for (Round& round : slots_) {
    is_open |= round.number >= 0;
    if (round.untaken > 0 && (!oldest || round.number < oldest->number)) oldest = &round;
  }
  if (!is_open) oldest = open_round();
  if (!oldest) return false;
  portion.round = oldest->number;
  portion.slot = oldest - slots_.data();
  portion.step = oldest->step;
  take_from(*oldest, portion);
  return true;
}

bool Progress::spin_for_change(std::unique_lock<std::mutex>& lock) {
  const int64_t seen = changes_;
  lock.unlock();
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  while (changes_ == seen && std::chrono::steady_clock::now() < end) _mm_pause();
  spin_then_lock(lock);
  return changes_ != seen;
}

void Progress::take_from(Round& round, Portion& portion) {
  Part& mine = round.parts[portion.worker];
  if (mine.begin == mine.end) {
    Part& theirs = *std::max_element(
        round.parts.begin(), round.parts.end(),
        [](const Part& a, const Part& b) { return a.end - a.begin < b.end - b.begin; });
    mine = {(theirs.begin + theirs.end) / 2, theirs.end};
    theirs.end = mine.begin;
  }
  portion.begin = mine.begin;
  portion.end = mine.begin = std::min(mine.begin + grain_, mine.end);
  round.untaken -= portion.end - portion.begin;
}

Progress::Round* Progress::open_round() {
  const auto is_free = [](const Round& round) { return round.number < 0; };
  const auto slot = std::find_if(slots_.begin(), slots_.end(), is_free);
  if (opened_ == rounds_ || slot == slots_.end()) return nullptr;
  // The last round reads what all others have written.
  if (opened_ == plan_.rounds && !std::all_of(slots_.begin(), slots_.end(), is_free))
    return nullptr;
  slot->number = opened_++;
  slot->step = 0;
  begin_step(*slot);
  return &*slot;
}

void Progress::begin_step(Round& round) {
  const int64_t units = units_of(round.number, round.step);
  round.untaken = round.unfinished = units;
  round.parts.resize(workers_);
  for (int64_t i = 0; i < workers_; ++i)
    round.parts[i] = {i * units / workers_, (i + 1) * units / workers_};
}

int64_t Progress::units_of(int64_t round, int step) const {
  if (round == plan_.rounds) return step == 0 ? plan_.last_units : 0;
  return step < kSteps ? plan_.units[step] : 0;
}

// Whether no more units can become available: the open rounds are in their last steps.
bool Progress::all_taken() const {
  if (opened_ < rounds_) return false;
  return std::none_of(slots_.begin(), slots_.end(), [&](const Round& round) {
    return round.number >= 0 && (round.untaken > 0 || units_of(round.number, round.step + 1) > 0);
  });
}

}  // namespace claa::cpu
