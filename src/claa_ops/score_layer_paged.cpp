// score_layer_paged: check the arguments, fill the params, launch.

#include "src/claa_ops/ops.h"
#include "src/claa_ops/paged_attention.h"

namespace claa {

void score_layer_paged(const Tensor& running, const Tensor& query, const Tensor& key_pages,
                       const Tensor& block_table, const Tensor& lengths,
                       const std::optional<Tensor>& rows, int64_t kernel_size, int64_t pool_mode,
                       std::optional<double> scale, double softcap,
                       const std::optional<Tensor>& sink_logits,
                       const std::optional<Tensor>& k_scale) {
  constexpr const char* op = "score_layer_paged";
  const PagedKeys keys{key_pages, block_table, lengths, rows, k_scale};
  check_pages(op, query, keys, "[R, W, H, D]");
  check(softcap >= 0, op, "softcap must not be negative, got ", softcap);
  const int64_t prompts = query.size(0), window = query.size(1);
  check_kernel_size(op, kernel_size);
  check(kernel_size <= 257, op, "kernel_size must be at most 257, got ", kernel_size);
  const PoolMode mode = pool_mode_of(op, pool_mode);
  check_rank(op, "running", running, 2, "[R, M]");
  check_size(op, "running", running, 0, "R", prompts, "query");
  check_dtype(op, "running", running, ScalarType::Float);
  check_device_like(op, "running", running, query, "query");
  check_last_dim_contiguous(op, "running", running);
  check(prompts <= 1 || running.stride(0) >= running.size(1), op,
        "running must have rows that do not overlap, got strides ", strides_of(running));

  WindowAttention attention{paged_query_key(op, query, keys, running.size(1) + window, scale)};
  attention.window = window;
  attention.query_stride_w = query.stride(1);
  attention.softcap = float(softcap);
  set_sink_logits(op, sink_logits, query, query.size(2), attention);
  ScoreLayerPagedParams params{.attention = attention,
                               .running = running.mutable_data_ptr<float>(),
                               .running_stride_b = running.stride(0),
                               .kernel_size = kernel_size,
                               .pool_mode = mode};
  if (prompts == 0 || key_pages.size(0) == 0 || attention.context() <= 0) return;
  const Tensor workspace = workspace_for(params, running);
  params.attention.workspace = workspace.mutable_data_ptr();
  launch(running, params);
}

}  // namespace claa
