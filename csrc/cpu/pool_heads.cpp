// pool_heads: pool each query head along its tokens, then sum the heads of each group.
//
// Works on tiles of a row that stay in the L1 cache while the heads of the group are added.

#include "csrc/cpu/pool.h"

namespace claa::cpu::CLAA_ISA {

constexpr int64_t kTile = 2048;

static int64_t tiles(const PoolHeadsParams& p) { return ceil_div(p.context, kTile); }

Schedule schedule(const PoolHeadsParams& p) {
  return {.units = {p.batch * p.kv_heads * tiles(p)},
          .unit_cost = kTile * (p.heads / p.kv_heads) * p.kernel_size};
}

void run(const PoolHeadsParams& p, Portion& portion) {
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t unit = portion.begin; unit < portion.end; ++unit) {
    const int64_t row = unit / tiles(p), b = row / p.kv_heads, g = row % p.kv_heads;
    const int64_t from = unit % tiles(p) * kTile, to = min(from + kTile, p.context);
    const float* head = p.scores + b * p.scores_stride_b + g * group * p.scores_stride_h;
    for (int64_t i = 0; i < group; ++i)
      pool_row(head + i * p.scores_stride_h, 0, p.context, from, to, p.kernel_size, p.pool_mode,
               i > 0, p.out + row * p.context + from);
  }
}

}  // namespace claa::cpu::CLAA_ISA
