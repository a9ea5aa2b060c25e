// gather_tokens: copy the kept rows of hidden states, position embeddings or position ids.
//
// Memory bound: each kept row is read once and written once. A unit is a strip of one prompt's
// rows.

#include "csrc/cpu/gather.h"

namespace claa::cpu::CLAA_ISA {

constexpr int64_t kStrip = 64;

static int64_t strips(const GatherTokensParams& p) { return ceil_div(p.kept, kStrip); }

Schedule schedule(const GatherTokensParams& p) {
  return {.units = {p.batch * strips(p)}, .unit_cost = 2 * kStrip * p.row_bytes};
}

void run(const GatherTokensParams& p, Portion& portion) {
  for (int64_t unit = portion.begin; unit < portion.end; ++unit) {
    const int64_t b = unit / strips(p);
    const int64_t from = unit % strips(p) * kStrip, to = min(from + kStrip, p.kept);
    gather_rows({.first = p.x + b * p.x_stride_b, .stride = p.x_stride_n, .row_bytes = p.row_bytes},
                p.index, b * p.index_stride_b, from, to, p.out + b * p.kept * p.row_bytes);
  }
}

}  // namespace claa::cpu::CLAA_ISA
