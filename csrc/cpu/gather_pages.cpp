// gather_pages: copy the kept rows of each request out of an engine's pages.
//
// Memory bound: each kept row is read once and written once. A unit is a strip of rows, whose
// places are looked up before any of them is copied.

#include "csrc/cpu/gather.h"

namespace claa::cpu::CLAA_ISA {

constexpr int64_t kStrip = 64;

Schedule schedule(const GatherPagesParams& p) {
  return {.units = {ceil_div(p.packed.capacity, kStrip)},
          .unit_cost = 2 * kStrip * p.pages.row_bytes};
}

static const char* row_of(const GatherPagesParams& p, int64_t i) {
  const int64_t request = p.packed.request_of(i);
  const int64_t token = request < 0 ? -1 : p.index[i];
  return token < 0 ? nullptr : p.pages.first + p.pages.offset(p.table.place_of(request, token));
}

void run(const GatherPagesParams& p, Portion& portion) {
  const int64_t row_bytes = p.pages.row_bytes;
  const char* rows[kStrip];
  for (int64_t strip = portion.begin; strip < portion.end; ++strip) {
    const int64_t from = strip * kStrip, count = min(kStrip, p.packed.capacity - from);
    for (int64_t i = 0; i < count; ++i) rows[i] = row_of(p, from + i);
    for (int64_t i = 0; i < count; ++i) {
      if (i + kPrefetchRows < count && rows[i + kPrefetchRows])
        prefetch_row(rows[i + kPrefetchRows], row_bytes);
      copy_row(p.out + (from + i) * row_bytes, rows[i], row_bytes);
    }
  }
}

}  // namespace claa::cpu::CLAA_ISA
