// score_window: check the arguments, allocate the output, fill the params, launch.

#include "src/claa_ops/ops.h"
#include "src/claa_ops/window_attention.h"

namespace claa {

Tensor score_window(const Tensor& query, const Tensor& key, std::optional<double> scale,
                    const std::optional<Tensor>& lse, const std::optional<Tensor>& start,
                    int64_t sliding_window, double softcap,
                    const std::optional<Tensor>& sink_logits) {
  const WindowAttention attention = window_attention("score_window", query, key, scale, lse, start,
                                                     sliding_window, softcap, sink_logits);
  const Tensor out =
      allocate(query, {attention.batch, attention.heads, attention.context()}, ScalarType::Float);
  return launch_window(
      ScoreWindowParams{.attention = attention, .out = out.mutable_data_ptr<float>()}, out);
}

}  // namespace claa
