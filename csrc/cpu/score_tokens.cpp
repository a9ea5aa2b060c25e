// score_tokens: score_window, pooled along the tokens and summed over each head group.
//
// window_attention.h hands over a tile of sums with a halo of half a pooling kernel on each side,
// so pooling needs no second pass over memory.

#include "csrc/cpu/pool.h"
#include "csrc/cpu/window_attention.h"

namespace claa::cpu::CLAA_ISA {

Schedule schedule(const ScoreTokensParams& p) {
  return WindowPlan(p.attention, p.kernel_size / 2).schedule();
}

void run(const ScoreTokensParams& p, Portion& portion) {
  const WindowAttention& a = p.attention;
  run_window(WindowPlan(a, p.kernel_size / 2), portion,
             [&](int64_t b, int64_t g, float* sums, int64_t stride, const TileRange& range) {
               float* out = p.out + (b * a.kv_heads + g) * a.context() + range.begin;
               int64_t heads = a.group();
               if (p.pool_mode == PoolMode::avg) {  // the mean commutes with the sum over heads
                 for (int64_t i = 1; i < heads; ++i)
                   for (int64_t j = 0; j < range.high - range.low; ++j)
                     sums[j] += sums[i * stride + j];
                 heads = 1;
               }
               for (int64_t i = 0; i < heads; ++i)
                 pool_row(sums + i * stride, range.low, range.high, range.begin, range.end,
                          p.kernel_size, p.pool_mode, i > 0, out);
             });
}

}  // namespace claa::cpu::CLAA_ISA
