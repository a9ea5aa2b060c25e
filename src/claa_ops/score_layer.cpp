// score_layer: check the arguments, allocate the output, fill the params, launch.

#include "src/claa_ops/ops.h"
#include "src/claa_ops/window_attention.h"

namespace claa {

Tensor score_layer(const Tensor& running, const Tensor& query, const Tensor& key,
                   int64_t kernel_size, int64_t pool_mode, std::optional<double> scale,
                   const std::optional<Tensor>& lse, const std::optional<Tensor>& start,
                   int64_t sliding_window, double softcap,
                   const std::optional<Tensor>& sink_logits) {
  constexpr const char* op = "score_layer";
  const WindowAttention attention =
      window_attention(op, query, key, scale, lse, start, sliding_window, softcap, sink_logits);
  check_kernel_size(op, kernel_size);
  const PoolMode mode = pool_mode_of(op, pool_mode);
  check_rank(op, "running", running, 2, "[B, M]");
  check_size(op, "running", running, 0, "B", attention.batch, "query");
  check_size(op, "running", running, 1, "M", attention.context(), "the context of key");
  check_dtype(op, "running", running, ScalarType::Float);
  check_device_like(op, "running", running, query, "query");
  check_last_dim_contiguous(op, "running", running);
  check(attention.batch <= 1 || running.stride(0) >= attention.context(), op,
        "running must have rows that do not overlap, got strides ", strides_of(running));

  const Tensor out = allocate(query, {attention.batch, attention.kv_heads, attention.context()},
                              ScalarType::Float);
  const ScoreLayerParams params{.attention = attention,
                                .out = out.mutable_data_ptr<float>(),
                                .running = running.mutable_data_ptr<float>(),
                                .running_stride_b = running.stride(0),
                                .kernel_size = kernel_size,
                                .pool_mode = mode};
  launch_window(params, out);
  // Without queries no kernel runs and the scores are zeros, which count in the maximum.
  if (!attention.has_queries() && out.numel() > 0) launch(out, params.maximum());
  return out;
}

}  // namespace claa
