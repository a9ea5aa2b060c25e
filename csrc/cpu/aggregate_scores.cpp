// aggregate_scores: the maximum of the running score and of every head's score, token by token.
//
// Memory bound: reads (1 + kv_heads) * context floats of a row and writes context.

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

constexpr int64_t kTile = 4096;

static int64_t tiles(const AggregateScoresParams& p) { return ceil_div(p.context, kTile); }

Schedule schedule(const AggregateScoresParams& p) {
  return {.units = {p.batch * tiles(p)}, .unit_cost = 4 * kTile * (p.kv_heads + 2)};
}

void run(const AggregateScoresParams& p, Portion& portion) {
  for (int64_t unit = portion.begin; unit < portion.end; ++unit) {
    const int64_t b = unit / tiles(p);
    const int64_t from = unit % tiles(p) * kTile, to = min(from + kTile, p.context);
    const float* running = p.running + b * p.running_stride_b;
    const float* scores = p.scores + b * p.scores_stride_b;
    float* out = p.out + b * p.out_stride_b;
    for (int64_t j = from; j < to; ++j) out[j] = max_or_nan(running[j], scores[j]);
    for (int64_t g = 1; g < p.kv_heads; ++g) {
      scores += p.scores_stride_g;
      for (int64_t j = from; j < to; ++j) out[j] = max_or_nan(out[j], scores[j]);
    }
  }
}

}  // namespace claa::cpu::CLAA_ISA
