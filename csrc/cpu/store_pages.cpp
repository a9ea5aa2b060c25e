// store_pages: write rows into the slots of an engine's pages.
//
// Memory bound: each row is read once and written once. A unit is a strip of rows.

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

constexpr int64_t kStrip = 64;

Schedule schedule(const StorePagesParams& p) {
  return {.units = {ceil_div(p.count, kStrip)}, .unit_cost = 2 * kStrip * p.pages.row_bytes};
}

void run(const StorePagesParams& p, Portion& portion) {
  const int64_t end = min(portion.end * kStrip, p.count);
  for (int64_t i = portion.begin * kStrip; i < end; ++i) {
    const int64_t slot = p.slots[i];
    if (slot < 0) continue;
    const int64_t to = p.pages.offset({.page = slot / p.block, .row = slot % p.block});
    std::memcpy(p.pages.first + to, p.x + i * p.x_stride, p.pages.row_bytes);
  }
}

}  // namespace claa::cpu::CLAA_ISA
