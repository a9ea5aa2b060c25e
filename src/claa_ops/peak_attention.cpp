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
  PeakAttentionParams params{query_key(op, query, key, scale)};
  params.start = row_integers(op, "start", start, batch, query, "query");
  params.queries = queries;
  params.query_stride_t = query.stride(2);
  if (running) {
    params.running = running->const_data_ptr<float>();
    params.running_stride_b = running->stride(0);
    params.running_stride_t = running->stride(1);
  }
  params.out = out.mutable_data_ptr<float>();
  if (out.numel() == 0) return out;
  const Tensor workspace = workspace_for(params, out);
  params.workspace = workspace.mutable_data_ptr();
  launch(query, params);
  return out;
}

}  // namespace claa
