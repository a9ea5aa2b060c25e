// rank_variance: check the arguments, allocate the output, fill the params, launch.

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"

namespace claa {

Tensor rank_variance(const Tensor& scores, int64_t k) {
  constexpr const char* op = "rank_variance";
  check_rank(op, "scores", scores, 3, "[L, B, M]");
  check_dtype(op, "scores", scores, ScalarType::Float);
  check_last_dim_contiguous(op, "scores", scores);
  const int64_t layers = scores.size(0), batch = scores.size(1), context = scores.size(2);
  check(layers > 0, op, "scores must have at least one layer, got ", shape_of(scores));
  check(k >= 0 && k <= context, op, "k must be in [0, M] = [0, ", context, "], got ", k);

  Tensor out = allocate(scores, {batch});
  if (batch == 0) return out;
  if (context == 0) return torch::stable::zero_(out);
  RankVarianceParams params{
      .scores = scores.const_data_ptr<float>(),
      .out = out.mutable_data_ptr<float>(),
      .workspace = nullptr,
      .layers = layers,
      .batch = batch,
      .context = context,
      .k = k,
      .scores_stride_l = scores.stride(0),
      .scores_stride_b = scores.stride(1),
      .workers = workers(),
  };
  const Tensor workspace = workspace_for(params, scores);
  params.workspace = workspace.mutable_data_ptr();
  launch(scores, params);
  return out;
}

}  // namespace claa
