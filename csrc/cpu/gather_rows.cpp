// gather_rows: copy the kept rows of a packed batch.
//
// Memory bound: each kept row is read once and written once. A unit is a strip of rows.

#include "csrc/cpu/gather.h"

namespace claa::cpu::CLAA_ISA {

constexpr int64_t kStrip = 64;

Schedule schedule(const GatherRowsParams& p) {
  return {.units = {ceil_div(p.kept, kStrip)}, .unit_cost = 2 * kStrip * p.row_bytes};
}

void run(const GatherRowsParams& p, Portion& portion) {
  gather_rows({.first = p.x, .stride = p.x_stride, .row_bytes = p.row_bytes}, p.index, 0,
              portion.begin * kStrip, min(portion.end * kStrip, p.kept), p.out);
}

}  // namespace claa::cpu::CLAA_ISA
