// select_topk: positions of the k best scores of each row, ascending. A unit is a row.

#include "csrc/cpu/select.h"

namespace claa::cpu::CLAA_ISA {

Schedule schedule(const SelectTopkParams& p) {
  return {.units = {p.rows()}, .unit_cost = 16 * p.context + 8 * p.k};
}

void run(const SelectTopkParams& p, Portion& portion) {
  for (int64_t i = portion.begin; i < portion.end; ++i)
    p.out_is_int32 ? select_row(p.row(uint32_t(i)), static_cast<int32_t*>(p.out))
                   : select_row(p.row(uint32_t(i)), static_cast<int64_t*>(p.out));
}

}  // namespace claa::cpu::CLAA_ISA
