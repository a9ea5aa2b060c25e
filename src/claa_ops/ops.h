// The functions that implement the schemas of library.cpp: each checks its arguments, allocates the
// result and launches the kernel of its device.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace claa {

using torch::stable::Tensor;

Tensor score_window(const Tensor& query, const Tensor& key, std::optional<double> scale,
                    const std::optional<Tensor>& lse, const std::optional<Tensor>& start,
                    int64_t sliding_window, double softcap,
                    const std::optional<Tensor>& sink_logits);

Tensor pool_heads(const Tensor& scores, int64_t num_kv_heads, int64_t kernel_size,
                  int64_t pool_mode);

Tensor score_tokens(const Tensor& query, const Tensor& key, int64_t kernel_size, int64_t pool_mode,
                    std::optional<double> scale, const std::optional<Tensor>& lse,
                    const std::optional<Tensor>& start, int64_t sliding_window, double softcap,
                    const std::optional<Tensor>& sink_logits);

Tensor aggregate_scores(const Tensor& running, const Tensor& scores);

Tensor score_layer(const Tensor& running, const Tensor& query, const Tensor& key,
                   int64_t kernel_size, int64_t pool_mode, std::optional<double> scale,
                   const std::optional<Tensor>& lse, const std::optional<Tensor>& start,
                   int64_t sliding_window, double softcap,
                   const std::optional<Tensor>& sink_logits);

void score_layer_paged(const Tensor& running, const Tensor& query, const Tensor& key_pages,
                       const Tensor& block_table, const Tensor& lengths,
                       const std::optional<Tensor>& rows, int64_t kernel_size, int64_t pool_mode,
                       std::optional<double> scale, double softcap,
                       const std::optional<Tensor>& sink_logits,
                       const std::optional<Tensor>& k_scale);

Tensor select_topk(const Tensor& scores, int64_t k, int64_t window, int64_t num_sinks,
                   const std::optional<Tensor>& start, const std::optional<Tensor>& counts,
                   bool int32);

std::tuple<Tensor, Tensor> gather_kv(const Tensor& key, const Tensor& value, const Tensor& index);

Tensor gather_tokens(const Tensor& x, const Tensor& index);

Tensor peak_attention(const Tensor& query, const Tensor& key, std::optional<double> scale,
                      const std::optional<Tensor>& running, const std::optional<Tensor>& start);

void peak_attention_paged(const Tensor& running, const Tensor& query, const Tensor& key_pages,
                          const Tensor& block_table, const Tensor& lengths,
                          const std::optional<Tensor>& rows, std::optional<double> scale,
                          const std::optional<Tensor>& k_scale);

Tensor rank_variance(const Tensor& scores, int64_t k);

Tensor hop_tokens(const Tensor& scores, const Tensor& states, int64_t hops, int64_t num_seeds,
                  double temperature, int64_t gap, int64_t kernel_size, int64_t pool_mode,
                  const std::optional<Tensor>& start);

// These write to their first arguments.

void select_topk_packed(const Tensor& index, const Tensor& scores, const Tensor& lengths,
                        const Tensor& starts, int64_t window, int64_t num_sinks);

void gather_rows(const Tensor& out, const Tensor& x, const Tensor& index);

void store_pages(const Tensor& pages, const Tensor& x, const Tensor& slots);

void gather_pages(const Tensor& out, const Tensor& pages, const Tensor& block_table,
                  const Tensor& starts, const Tensor& index);

void kept_metadata(const Tensor& seq_lens, const Tensor& slots, const Tensor& logical_seq_lens,
                   const Tensor& prompts, const Tensor& kept, const Tensor& block_table,
                   int64_t block_size);

void compact_pages(const Tensor& key_pages, const Tensor& value_pages, const Tensor& block_table,
                   const Tensor& starts, const Tensor& index);

}  // namespace claa
