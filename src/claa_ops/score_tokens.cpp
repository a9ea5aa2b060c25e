// score_tokens: check the arguments, allocate the output, fill the params, launch.

#include "src/claa_ops/ops.h"
#include "src/claa_ops/window_attention.h"

namespace claa {

Tensor score_tokens(const Tensor& query, const Tensor& key, int64_t kernel_size, int64_t pool_mode,
                    std::optional<double> scale, const std::optional<Tensor>& lse,
                    const std::optional<Tensor>& start, int64_t sliding_window, double softcap,
                    const std::optional<Tensor>& sink_logits) {
  constexpr const char* op = "score_tokens";
  const WindowAttention attention =
      window_attention(op, query, key, scale, lse, start, sliding_window, softcap, sink_logits);
  check_kernel_size(op, kernel_size);
  const PoolMode mode = pool_mode_of(op, pool_mode);
  const Tensor out = allocate(query, {attention.batch, attention.kv_heads, attention.context()},
                              ScalarType::Float);
  return launch_window(ScoreTokensParams{.attention = attention,
                                         .out = out.mutable_data_ptr<float>(),
                                         .kernel_size = kernel_size,
                                         .pool_mode = mode},
                       out);
}

}  // namespace claa
