// select_topk_packed: check the arguments, fill the params, launch.

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"
#include "src/claa_ops/pages.h"

namespace claa {

void select_topk_packed(const Tensor& index, const Tensor& scores, const Tensor& lengths,
                        const Tensor& starts, int64_t window, int64_t num_sinks) {
  constexpr const char* op = "select_topk_packed";
  check_rank(op, "index", index, 1, "[k]");
  check_rank(op, "scores", scores, 2, "[R, M]");
  check_dtype(op, "index", index, ScalarType::Int);
  check_dtype(op, "scores", scores, ScalarType::Float);
  check_device_like(op, "index", index, scores, "scores");
  check_last_dim_contiguous(op, "index", index);
  check_last_dim_contiguous(op, "scores", scores);
  check(window >= 0, op, "window must not be negative, got ", window);
  check(num_sinks >= 0, op, "num_sinks must not be negative, got ", num_sinks);
  const int64_t requests = scores.size(0);
  const Indices tokens = integers_of(op, "lengths", lengths, "R", requests, scores, "scores");
  const Packed packed = packed_of(op, starts, requests, index.size(0), scores, "scores");

  if (index.numel() == 0) return;
  SelectTopkPackedParams params{
      .scores = scores.const_data_ptr<float>(),
      .lengths = tokens,
      .packed = packed,
      .out = index.mutable_data_ptr<int32_t>(),
      .workspace = nullptr,
      .context = scores.size(1),
      .window = window,
      .num_sinks = num_sinks,
      .scores_stride_r = scores.stride(0),
  };
  const Tensor workspace = workspace_for(params, scores);
  params.workspace = workspace.mutable_data_ptr();
  launch(scores, params);
}

}  // namespace claa
