// score_window: the window's attention to each context key, per query head.
//
// The sums of window_attention.h, without a halo, are the result.

#include "csrc/cpu/window_attention.h"

namespace claa::cpu::CLAA_ISA {

Schedule schedule(const ScoreWindowParams& p) { return WindowPlan(p.attention, 0).schedule(); }

void run(const ScoreWindowParams& p, Portion& portion) {
  const WindowAttention& a = p.attention;
  run_window(WindowPlan(a, 0), portion,
             [&](int64_t b, int64_t g, const float* sums, int64_t stride, const TileRange& range) {
               for (int64_t i = 0; i < a.group(); ++i) {
                 const int64_t row = b * a.heads + g * a.group() + i;
                 std::memcpy(p.out + row * a.context() + range.begin, sums + i * stride,
                             (range.end - range.begin) * sizeof(float));
               }
             });
}

}  // namespace claa::cpu::CLAA_ISA
