// score_layer: score_tokens, then aggregate_scores in place, in a phase of its own.
//
// The scores of a token's heads come from different workers, so their maximum has to wait for all.
// It reads 4 bytes per head and token, which are still in the cache unless the prompt is long.

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

Schedule schedule(const ScoreLayerParams& p) {
  Schedule plan = cpu::schedule(p.scores());
  ++plan.phases;
  return plan;
}

void run(const ScoreLayerParams& p, int phase, int64_t begin, int64_t end) {
  const Schedule plan = cpu::schedule(p.scores());
  if (phase < plan.phases) return cpu::run(p.scores(), phase, begin, end);
  const AggregateScoresParams maximum = p.maximum();
  const int64_t units = cpu::schedule(maximum).units;
  cpu::run(maximum, 0, begin * units / plan.units, end * units / plan.units);
}

}  // namespace claa::cpu::CLAA_ISA
