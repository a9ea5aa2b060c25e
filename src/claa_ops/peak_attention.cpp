// peak_attention: check the arguments, allocate the output, fill the params, launch.

#include "src/claa_ops/ops.h"
#include "src/claa_ops/window_attention.h"

namespace claa {

Tensor peak_attention(const Tensor& query, const Tensor& key, std::optional<double> scale,
                      const std::optional<Tensor>& running, const std::optional<Tensor>& start) {
  constexpr const char* op = "peak_attention";
  check_query_key(op, query, key, "[B, H, T, D]");
  const int64_t batch = query.size(0), queries = query.size(2), total = key.size(2);
  check(query.size(1) > 0, op, "query must have at least one head, got ", shape_of(query));
  if (running) {
    check_rank(op, "running", *running, 3, "[B, T, N]");
    check_size(op, "running", *running, 0, "B", batch, "query");
    check_size(op, "running", *running, 1, "T", queries, "query");
    check_size(op, "running", *running, 2, "N", total, "key");
    check_dtype(op, "running", *running, ScalarType::Float);
    check_device_like(op, "running", *running, query, "query");
    check_last_dim_contiguous(op, "running", *running);
  }

  const Tensor out = allocate(query, {batch, queries, total}, ScalarType::Float);
  PeakAttentionParams params{
      .query = query.const_data_ptr(),
      .key = key.const_data_ptr(),
      .running = running ? running->const_data_ptr<float>() : nullptr,
      .start = row_integers(op, "start", start, batch, query, "query"),
      .out = out.mutable_data_ptr<float>(),
      .workspace = nullptr,
      .dtype = float_dtype(op, "query", query),
      .batch = batch,
      .heads = query.size(1),
      .kv_heads = key.size(1),
      .queries = queries,
      .total = total,
      .dim = query.size(3),
      .query_stride_b = query.stride(0),
      .query_stride_h = query.stride(1),
      .query_stride_t = query.stride(2),
      .key_stride_b = key.stride(0),
      .key_stride_g = key.stride(1),
      .key_stride_n = key.stride(2),
      .running_stride_b = running ? running->stride(0) : 0,
      .running_stride_t = running ? running->stride(1) : 0,
      .scale = scale_or_default(scale, query.size(3)),
      .workers = workers(),
  };
  if (out.numel() == 0) return out;
  const Tensor workspace = workspace_for(params, out);
  params.workspace = workspace.mutable_data_ptr();
  launch(query, params);
  return out;
}

}  // namespace claa
