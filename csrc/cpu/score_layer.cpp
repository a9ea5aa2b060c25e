// score_layer: score_tokens, then aggregate_scores in place, once all scores are written.
//
// The scores of a token's heads come from different workers, so the maximum waits for all of them.
// It reads 4 bytes per head and token, which are still in the cache unless the prompt is long.

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

Schedule schedule(const ScoreLayerParams& p) {
  Schedule plan = cpu::schedule(p.scores());
  plan.last_units = cpu::schedule(p.maximum()).units[0];
  return plan;
}

void run(const ScoreLayerParams& p, Portion& portion) {
  if (portion.round == cpu::schedule(p.scores()).rounds)
    cpu::run(p.maximum(), portion);
  else
    cpu::run(p.scores(), portion);
}

}  // namespace claa::cpu::CLAA_ISA
