// gather_kv: copy the kept rows of keys and values.
//
// Memory bound: each kept row is read once and written once. A unit is a strip of one head's rows.

#include "csrc/cpu/gather.h"

namespace claa::cpu::CLAA_ISA {

constexpr int64_t kStrip = 256;

static int64_t strips(const GatherKvParams& p) { return ceil_div(p.kept, kStrip); }

Schedule schedule(const GatherKvParams& p) {
  return {.units = {p.batch * p.kv_heads * strips(p)},
          .unit_cost = 2 * kStrip * (p.key_row_bytes + p.value_row_bytes)};
}

void run(const GatherKvParams& p, Portion& portion) {
  for (int64_t unit = portion.begin; unit < portion.end; ++unit) {
    const int64_t head = unit / strips(p), b = head / p.kv_heads, g = head % p.kv_heads;
    const int64_t from = unit % strips(p) * kStrip, to = min(from + kStrip, p.kept);
    const int64_t index = b * p.index_stride_b + g * p.index_stride_g;
    gather_rows({.first = p.key + b * p.key_stride_b + g * p.key_stride_g,
                 .stride = p.key_stride_n,
                 .row_bytes = p.key_row_bytes},
                p.index, index, from, to, p.key_out + head * p.kept * p.key_row_bytes);
    gather_rows({.first = p.value + b * p.value_stride_b + g * p.value_stride_g,
                 .stride = p.value_stride_n,
                 .row_bytes = p.value_row_bytes},
                p.index, index, from, to, p.value_out + head * p.kept * p.value_row_bytes);
  }
}

}  // namespace claa::cpu::CLAA_ISA
