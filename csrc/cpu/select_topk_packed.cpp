// select_topk_packed: positions of the best scores of requests of several lengths, packed.
//
// A unit is a request; one more fills the entries that belong to none.

#include "csrc/cpu/select.h"

namespace claa::cpu::CLAA_ISA {

Schedule schedule(const SelectTopkPackedParams& p) {
  return {.units = {p.rows() + 1}, .unit_cost = 16 * p.context};
}

void run(const SelectTopkPackedParams& p, Portion& portion) {
  for (int64_t unit = portion.begin; unit < portion.end; ++unit) {
    if (unit < p.rows())
      select_row(p.row(uint32_t(unit)), p.out);
    else
      for (int64_t i = p.unused(); i < p.packed.capacity; ++i) p.out[i] = -1;
  }
}

}  // namespace claa::cpu::CLAA_ISA
