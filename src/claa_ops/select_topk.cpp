// select_topk: check the arguments, allocate the output, fill the params, launch.

#include <vector>

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"

namespace claa {

Tensor select_topk(const Tensor& scores, int64_t k, int64_t window, int64_t num_sinks,
                   const std::optional<Tensor>& start, const std::optional<Tensor>& counts,
                   bool int32) {
  constexpr const char* op = "select_topk";
  const int64_t rank = scores.dim();
  check(rank >= 1, op, "scores must have shape [..., M], got ", shape_of(scores));
  check_dtype(op, "scores", scores, ScalarType::Float);
  check_last_dim_contiguous(op, "scores", scores);
  check(window >= 0, op, "window must not be negative, got ", window);
  check(num_sinks >= 0, op, "num_sinks must not be negative, got ", num_sinks);
  const int64_t context = scores.size(rank - 1);
  check(k >= 0 && k <= context + window, op, "k must be in [0, M + window] = [0, ",
        context + window, "], got ", k);
  check(!start || rank > 1, op, "start needs scores of shape [B, ..., M], got ", shape_of(scores));
  check(!counts || rank > 1, op, "counts needs scores of shape [B, ..., M], got ",
        shape_of(scores));
  const int64_t batch = rank > 1 ? scores.size(0) : 1;
  int64_t inner = 1;  // rows of one batch entry, which must be a constant stride apart
  for (int64_t dim = 1; dim < rank - 1; ++dim) {
    inner *= scores.size(dim);
    check(dim == 1 || scores.size(dim - 1) <= 1 ||
              scores.stride(dim - 1) == scores.size(dim) * scores.stride(dim),
          op, "scores must be contiguous between its first and its last dimension, got strides ",
          strides_of(scores));
  }
  const Indices first_valid = row_integers(op, "start", start, batch, scores, "scores");
  const Indices kept = row_integers(op, "counts", counts, batch, scores, "scores");

  std::vector<int64_t> shape(scores.sizes().begin(), scores.sizes().end());
  shape.back() = k;
  const Tensor out = allocate(scores, shape, int32 ? ScalarType::Int : ScalarType::Long);
  if (out.numel() == 0) return out;
  SelectTopkParams params{
      .scores = scores.const_data_ptr<float>(),
      .start = first_valid,
      .counts = kept,
      .out = out.mutable_data_ptr(),
      .workspace = nullptr,
      .out_is_int32 = int32,
      .batch = batch,
      .inner = inner,
      .context = context,
      .k = k,
      .window = window,
      .num_sinks = num_sinks,
      .scores_stride_b = rank > 1 ? scores.stride(0) : 0,
      .scores_stride_inner = rank > 2 ? scores.stride(rank - 2) : 0,
  };
  const Tensor workspace = workspace_for(params, scores);
  params.workspace = workspace.mutable_data_ptr();
  launch(scores, params);
  return out;
}

}  // namespace claa
