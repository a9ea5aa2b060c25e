// kept_metadata: lengths and slots of the layers behind a selection, for a step of decoding.
//
// A few integers for each request: one unit.

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

Schedule schedule(const KeptMetadataParams& p) {
  return {.units = {1}, .unit_cost = 8 * p.batch * (p.queries + 5)};
}

void run(const KeptMetadataParams& p, Portion&) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = p.length(b);
    p.seq_lens[b] = int32_t(length);
    for (int64_t i = 0; i < p.queries; ++i) p.slots[b * p.queries + i] = p.slot(b, length, i);
  }
}

}  // namespace claa::cpu::CLAA_ISA
