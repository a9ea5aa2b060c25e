// aggregate_scores: check the arguments, allocate the output, fill the params, launch.

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"

namespace claa {

Tensor aggregate_scores(const Tensor& running, const Tensor& scores) {
  constexpr const char* op = "aggregate_scores";
  check_rank(op, "running", running, 2, "[B, M]");
  const bool has_heads = scores.dim() == 3;
  check(has_heads || scores.dim() == 2, op, "scores must have shape [B, M] or [B, G, M], got ",
        shape_of(scores));
  check_dtype(op, "running", running, ScalarType::Float);
  check_dtype(op, "scores", scores, ScalarType::Float);
  check_device_like(op, "scores", scores, running, "running");
  const int64_t batch = running.size(0), context = running.size(1);
  check_size(op, "scores", scores, 0, "B", batch, "running");
  check_size(op, "scores", scores, scores.dim() - 1, "M", context, "running");
  check(!has_heads || scores.size(1) > 0, op, "scores must have at least one head, got ",
        shape_of(scores));
  check_last_dim_contiguous(op, "running", running);
  check_last_dim_contiguous(op, "scores", scores);

  const Tensor out = allocate(running, {batch, context});
  if (out.numel() == 0) return out;
  launch(running, AggregateScoresParams{
                      .running = running.const_data_ptr<float>(),
                      .scores = scores.const_data_ptr<float>(),
                      .out = out.mutable_data_ptr<float>(),
                      .batch = batch,
                      .kv_heads = has_heads ? scores.size(1) : 1,
                      .context = context,
                      .running_stride_b = running.stride(0),
                      .scores_stride_b = scores.stride(0),
                      .scores_stride_g = has_heads ? scores.stride(1) : 0,
                      .out_stride_b = context,
                  });
  return out;
}

}  // namespace claa
