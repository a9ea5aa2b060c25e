#include "csrc/cpu/progress.h"

#include <immintrin.h>

#include <algorithm>
#include <chrono>

namespace claa::cpu {

namespace {

constexpr int64_t kWorthAThread = 64 << 10;  // bytes of traffic
// How long a worker looks whether there is news before it opens another round, which takes more
// cache, or sleeps: a unit takes less.
constexpr auto kPatience = std::chrono::microseconds(50);

// Locks; the lock is held for less time than it takes to sleep and wake.
void lock_soon(std::unique_lock<std::mutex>& lock) {
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
      places_(plan.rounds_at_once),
      rounds_(plan.rounds + (plan.last_units > 0)) {}

bool Progress::next(Portion& portion) {
  std::unique_lock lock(mutex_, std::defer_lock);
  lock_soon(lock);
  if (portion.begin < portion.end) finish(portion);
  while (!take(portion)) {
    if (all_taken()) return false;
    if (is_patient_) {
      is_patient_ = look_for_news(lock);  // if not, somebody has been put aside
      continue;
    }
    if (open_round()) continue;
    const int64_t seen = news_;
    wake_.wait(lock, [&] { return news_ != seen; });
  }
  return true;
}

void Progress::finish(const Portion& portion) {
  Round& round = places_[portion.place];
  round.undone -= portion.end - portion.begin;
  if (round.undone > 0) return;
  ++round.step;
  if (units_of(round.number, round.step) > 0)
    begin_step(round);
  else
    round.number = -1;
  ++news_;
  wake_.notify_all();
}

// Takes units of the oldest round that has any; opens a round if none is open.
bool Progress::take(Portion& portion) {
  Round* oldest = nullptr;
  bool is_open = false;
  for (Round& round : places_) {
    is_open |= round.number >= 0;
    if (round.untaken > 0 && (!oldest || round.number < oldest->number)) oldest = &round;
  }
  if (!is_open) oldest = open_round();
  if (!oldest) return false;
  portion.round = oldest->number;
  portion.place = oldest - places_.data();
  portion.step = oldest->step;
  take_from(*oldest, portion);
  return true;
}

bool Progress::look_for_news(std::unique_lock<std::mutex>& lock) {
  const int64_t seen = news_;
  lock.unlock();
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (news_ == seen && std::chrono::steady_clock::now() < end) _mm_pause();
  lock_soon(lock);
  return news_ != seen;
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
  const auto place = std::find_if(places_.begin(), places_.end(), is_free);
  if (opened_ == rounds_ || place == places_.end()) return nullptr;
  // The last round reads what all the others have written.
  if (opened_ == plan_.rounds && !std::all_of(places_.begin(), places_.end(), is_free))
    return nullptr;
  place->number = opened_++;
  place->step = 0;
  begin_step(*place);
  return &*place;
}

void Progress::begin_step(Round& round) {
  const int64_t units = units_of(round.number, round.step);
  round.untaken = round.undone = units;
  round.parts.resize(workers_);
  for (int64_t i = 0; i < workers_; ++i)
    round.parts[i] = {i * units / workers_, (i + 1) * units / workers_};
}

int64_t Progress::units_of(int64_t round, int step) const {
  if (round == plan_.rounds) return step == 0 ? plan_.last_units : 0;
  return step < kSteps ? plan_.units[step] : 0;
}

// Whether no unit will ever be left to take: the open rounds are in their last steps.
bool Progress::all_taken() const {
  if (opened_ < rounds_) return false;
  return std::none_of(places_.begin(), places_.end(), [&](const Round& round) {
    return round.number >= 0 && (round.untaken > 0 || units_of(round.number, round.step + 1) > 0);
  });
}

}  // namespace claa::cpu
