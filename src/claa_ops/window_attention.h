// Checks and params of query rows against keys: the ops that attend.

#pragma once

#include <cmath>

#include "src/claa_ops/checks.h"
#include "src/claa_ops/launch.h"

namespace claa {

// The factor on query-key products: `scale`, or 1 / sqrt(D).
inline float scale_or_default(std::optional<double> scale, int64_t dim) {
  return float(scale ? *scale : 1.0 / std::sqrt(double(dim)));
}

// Checks query and key; `query_shape` is how messages write the shape of query.
inline void check_query_key(const char* op, const Tensor& query, const Tensor& key,
                            const char* query_shape) {
  check_rank(op, "query", query, 4, query_shape);
  check_rank(op, "key", key, 4, "[B, G, N, D]");
  float_dtype(op, "query", query);
  check_dtype_like(op, "key", key, query, "query");
  check_device_like(op, "key", key, query, "query");
  check_size(op, "key", key, 0, "B", query.size(0), "query");
  check_size(op, "key", key, 3, "D", query.size(3), "query");
  check(query.size(3) > 0, op, "D must be at least 1, got 0");
  check_groups(op, query.size(1), key.size(1));
  check_last_dim_contiguous(op, "query", query);
  check_last_dim_contiguous(op, "key", key);
}

// The params of a query and a key that check_query_key has passed.
inline QueryKey query_key(const char* op, const Tensor& query, const Tensor& key,
                          std::optional<double> scale) {
  return {
      .query = query.const_data_ptr(),
      .key = key.const_data_ptr(),
      .start = {},
      .workspace = nullptr,
      .dtype = float_dtype(op, "query", query),
      .batch = query.size(0),
      .heads = query.size(1),
      .kv_heads = key.size(1),
      .total = key.size(2),
      .dim = query.size(3),
      .query_stride_b = query.stride(0),
      .query_stride_h = query.stride(1),
      .key_stride_b = key.stride(0),
      .key_stride_g = key.stride(1),
      .key_stride_n = key.stride(2),
      .scale = scale_or_default(scale, query.size(3)),
      .workers = workers(),
  };
}

// The sink logits of an attention whose query has passed its checks.
inline void set_sink_logits(const char* op, const std::optional<Tensor>& sink_logits,
                            const Tensor& query, int64_t heads, WindowAttention& attention) {
  if (!sink_logits) return;
  check_rank(op, "sink_logits", *sink_logits, 1, "[H]");
  check_size(op, "sink_logits", *sink_logits, 0, "H", heads, "query");
  check(sink_logits->scalar_type() == ScalarType::Float ||
            sink_logits->scalar_type() == query.scalar_type(),
        op, "sink_logits must have dtype float32 or that of query (", name_of(query.scalar_type()),
        "), got ", name_of(sink_logits->scalar_type()));
  attention.sinks_dtype = float_dtype(op, "sink_logits", *sink_logits);
  check_device_like(op, "sink_logits", *sink_logits, query, "query");
  check_last_dim_contiguous(op, "sink_logits", *sink_logits);
  attention.sink_logits = sink_logits->const_data_ptr();
}

inline WindowAttention window_attention(const char* op, const Tensor& query, const Tensor& key,
                                        std::optional<double> scale,
                                        const std::optional<Tensor>& lse,
                                        const std::optional<Tensor>& start, int64_t sliding_window,
                                        double softcap, const std::optional<Tensor>& sink_logits) {
  check_query_key(op, query, key, "[B, H, W, D]");
  const int64_t batch = query.size(0), heads = query.size(1), window = query.size(2);
  const int64_t total = key.size(2);
  check(total >= window, op, "N must be at least W = ", window, ", got ", total);
  check(sliding_window >= 0, op, "sliding_window must not be negative, got ", sliding_window);
  check(softcap >= 0, op, "softcap must not be negative, got ", softcap);
  WindowAttention attention{query_key(op, query, key, scale)};
  attention.window = window;
  attention.query_stride_w = query.stride(2);
  attention.sliding_window = sliding_window;
  attention.softcap = float(softcap);
  if (lse) {
    check_rank(op, "lse", *lse, 3, "[B, H, W]");
    check_size(op, "lse", *lse, 0, "B", batch, "query");
    check_size(op, "lse", *lse, 1, "H", heads, "query");
    check_size(op, "lse", *lse, 2, "W", window, "query");
    check_dtype(op, "lse", *lse, ScalarType::Float);
    check_device_like(op, "lse", *lse, query, "query");
    check_last_dim_contiguous(op, "lse", *lse);
    attention.lse = lse->const_data_ptr<float>();
    attention.lse_stride_b = lse->stride(0);
    attention.lse_stride_h = lse->stride(1);
  }
  set_sink_logits(op, sink_logits, query, heads, attention);
  attention.start = row_integers(op, "start", start, batch, query, "query");
  return attention;
}

// Allocates the scratch memory and launches. Without queries nothing has a score.
template <class Params>
Tensor launch_window(Params params, Tensor out) {
  if (out.numel() == 0) return out;
  if (!params.attention.has_queries()) return torch::stable::zero_(out);
  const Tensor workspace = workspace_for(params, out);
  params.attention.workspace = workspace.mutable_data_ptr();
  launch(out, params);
  return out;
}

}  // namespace claa
