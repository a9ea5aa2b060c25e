// peak_attention_paged: check the arguments, fill the params, launch.

#include "src/claa_ops/ops.h"
#include "src/claa_ops/paged_attention.h"

namespace claa {

void peak_attention_paged(const Tensor& running, const Tensor& query, const Tensor& key_pages,
                          const Tensor& block_table, const Tensor& lengths,
                          const std::optional<Tensor>& rows, std::optional<double> scale,
                          const std::optional<Tensor>& k_scale) {
  constexpr const char* op = "peak_attention_paged";
  const PagedKeys keys{key_pages, block_table, lengths, rows, k_scale};
  check_pages(op, query, keys, "[R, T, H, D]");
  const int64_t prompts = query.size(0), queries = query.size(1);
  check_rank(op, "running", running, 3, "[R, T, M]");
  check_size(op, "running", running, 0, "R", prompts, "query");
  check_size(op, "running", running, 1, "T", queries, "query");
  check_dtype(op, "running", running, ScalarType::Float);
  check_device_like(op, "running", running, query, "query");
  check_last_dim_contiguous(op, "running", running);
  const int64_t most = running.size(2);
  const int64_t stride_b = prompts > 1 ? running.stride(0) : most;
  const int64_t stride_t = queries > 1 ? running.stride(1) : most;
  check((stride_t >= most && (prompts <= 1 || stride_b >= (queries - 1) * stride_t + most)) ||
            (stride_b >= most && (queries <= 1 || stride_t >= (prompts - 1) * stride_b + most)),
        op, "running must have rows that do not overlap, got strides ", strides_of(running));

  PeakAttentionPagedParams params{paged_query_key(op, query, keys, most, scale)};
  params.queries = queries;
  params.query_stride_t = query.stride(1);
  params.running = running.mutable_data_ptr<float>();
  params.running_stride_b = running.stride(0);
  params.running_stride_t = stride_t;
  if (prompts == 0 || key_pages.size(0) == 0 || params.total == 0) return;
  const Tensor workspace = workspace_for(params, running);
  params.workspace = workspace.mutable_data_ptr();
  launch(running, params);
}

}  // namespace claa
