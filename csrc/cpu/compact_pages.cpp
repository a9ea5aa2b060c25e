// compact_pages: move the kept keys and values of each request to the front of its pages, in place.
//
// Memory bound: each kept row is read once and written once. A unit is a head of a request, whose
// rows are moved in ascending order: a row moves towards the front, so it only overwrites rows that
// were moved before or are not kept.

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

Schedule schedule(const CompactPagesParams& p) {
  const int64_t rows = ceil_div(p.packed.capacity, max(p.packed.requests, int64_t(1)));
  return {.units = {p.packed.requests * p.kv_heads},
          .unit_cost = 2 * rows * (p.key.row_bytes + p.value.row_bytes)};
}

static void move_row(const PagedRows& rows, int64_t head, PageTable::Place from,
                     PageTable::Place to) {
  char* const first = rows.first + head * rows.head_stride;
  std::memcpy(first + rows.offset(to), first + rows.offset(from), rows.row_bytes);
}

void run(const CompactPagesParams& p, Portion& portion) {
  for (int64_t unit = portion.begin; unit < portion.end; ++unit) {
    const int64_t request = unit / p.kv_heads, head = unit % p.kv_heads;
    const int64_t begin = p.packed.begin(request), kept = p.packed.end(request) - begin;
    const int64_t index = head * p.index_stride_g + begin;
    for (int64_t i = 0; i < kept; ++i) {
      const int64_t token = p.index[index + i];
      if (token == i) continue;  // it is where it belongs
      const PageTable::Place from = p.table.place_of(request, token);
      const PageTable::Place to = p.table.place_of(request, i);
      move_row(p.key, head, from, to);
      move_row(p.value, head, from, to);
    }
  }
}

}  // namespace claa::cpu::CLAA_ISA
