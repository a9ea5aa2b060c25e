// Checks and params of query rows against keys that lie in pages.

#pragma once

#include "src/claa_ops/window_attention.h"

namespace claa {

// The tensors of a paged op that say which keys a prompt has.
struct PagedKeys {
  const Tensor& key_pages;    // [P, L, G, D]
  const Tensor& block_table;  // [requests, blocks]
  const Tensor& lengths;      // [R]
  const std::optional<Tensor>& rows;
  const std::optional<Tensor>& k_scale;
};

inline void check_int32(const char* op, const char* name, const Tensor& t, const Tensor& query) {
  check_dtype(op, name, t, ScalarType::Int);
  check_device_like(op, name, t, query, "query");
  check_last_dim_contiguous(op, name, t);
}

inline void check_pages(const char* op, const Tensor& query, const PagedKeys& keys,
                        const char* query_shape) {
  const Tensor& pages = keys.key_pages;
  check_rank(op, "query", query, 4, query_shape);
  check_rank(op, "key_pages", pages, 4, "[P, L, G, D]");
  float_dtype(op, "query", query);
  check(pages.scalar_type() == query.scalar_type() ||
            pages.scalar_type() == ScalarType::Float8_e4m3fn,
        op, "key_pages must have dtype ", name_of(query.scalar_type()),
        " like query or float8_e4m3fn, got ", name_of(pages.scalar_type()));
  check_device_like(op, "key_pages", pages, query, "query");
  check_size(op, "key_pages", pages, 3, "D", query.size(3), "query");
  check(query.size(1) > 0 && query.size(2) > 0 && query.size(3) > 0, op,
        "query must have at least one query, head and channel, got ", shape_of(query));
  check_groups(op, query.size(2), pages.size(2));
  const int64_t size = pages.size(1);
  check(size == 16 || size == 32 || size == 64 || size == 128 || size == 256, op,
        "L must be 16, 32, 64, 128 or 256, got ", size);
  check_last_dim_contiguous(op, "query", query);
  check_last_dim_contiguous(op, "key_pages", pages);

  const int64_t prompts = query.size(0);
  check_rank(op, "block_table", keys.block_table, 2, "[requests, blocks]");
  check_int32(op, "block_table", keys.block_table, query);
  check_rank(op, "lengths", keys.lengths, 1, "[R]");
  check_size(op, "lengths", keys.lengths, 0, "R", prompts, "query");
  check_int32(op, "lengths", keys.lengths, query);
  if (keys.rows) {
    check_rank(op, "rows", *keys.rows, 1, "[R]");
    check_size(op, "rows", *keys.rows, 0, "R", prompts, "query");
    check_int32(op, "rows", *keys.rows, query);
  } else {
    check_size(op, "block_table", keys.block_table, 0, "R", prompts, "query");
  }
  if (keys.k_scale) {
    check(pages.scalar_type() == ScalarType::Float8_e4m3fn, op,
          "k_scale must come with key_pages of float8_e4m3fn, got ", name_of(pages.scalar_type()));
    check(keys.k_scale->numel() == 1, op, "k_scale must have one item, got ",
          shape_of(*keys.k_scale));
    check_dtype(op, "k_scale", *keys.k_scale, ScalarType::Float);
    check_device_like(op, "k_scale", *keys.k_scale, query, "query");
  }
}

// On the CPU a page or a length out of range is an error here, before anything is read; on CUDA
// looking at them would make the host wait.
inline void check_table_range(const char* op, const PagedKeys& keys, int64_t capacity) {
  if (!keys.lengths.is_cpu()) return;
  const Tensor& table = keys.block_table;
  const int64_t count = keys.key_pages.size(0), size = keys.key_pages.size(1);
  for (int64_t r = 0; r < keys.lengths.size(0); ++r) {
    const int64_t length = keys.lengths.const_data_ptr<int32_t>()[r];
    check(length <= capacity, op, "lengths must be at most ", capacity, ", got ", length);
    if (length <= 0) continue;  // no prompt
    const int64_t row = keys.rows ? keys.rows->const_data_ptr<int32_t>()[r] : r;
    check(row >= 0 && row < table.size(0), op, "rows must be in [0, ", table.size(0), "), got ",
          row);
    const int32_t* pages = table.const_data_ptr<int32_t>() + row * table.stride(0);
    for (int64_t i = 0; i * size < length; ++i)
      check(pages[i] >= 0 && pages[i] < count, op, "block_table must name pages in [0, ", count,
            "), got ", pages[i]);
  }
}

// The params of what check_pages has passed. A prompt has room for `most` keys in the result, and
// for as many as its row of the table has pages.
inline QueryKey paged_query_key(const char* op, const Tensor& query, const PagedKeys& keys,
                                int64_t most, std::optional<double> scale) {
  const Tensor& pages = keys.key_pages;
  const int64_t size = pages.size(1), capacity = std::min(most, keys.block_table.size(1) * size);
  check_table_range(op, keys, capacity);
  int log2_size = 4;
  while (int64_t(1) << log2_size < size) ++log2_size;
  return {
      .query = query.const_data_ptr(),
      .key = pages.const_data_ptr(),
      .start = {},
      .workspace = nullptr,
      .dtype = float_dtype(op, "query", query),
      .batch = query.size(0),
      .heads = query.size(2),
      .kv_heads = pages.size(2),
      .total = capacity,
      .dim = query.size(3),
      .query_stride_b = query.stride(0),
      .query_stride_h = query.stride(2),
      .key_stride_b = pages.stride(0),
      .key_stride_g = pages.stride(2),
      .key_stride_n = pages.stride(1),
      .scale = scale_or_default(scale, query.size(3)),
      .workers = workers(),
      .pages = {.table = keys.block_table.const_data_ptr<int32_t>(),
                .rows = keys.rows ? keys.rows->const_data_ptr<int32_t>() : nullptr,
                .lengths = keys.lengths.const_data_ptr<int32_t>(),
                .key_scale = keys.k_scale ? keys.k_scale->const_data_ptr<float>() : nullptr,
                .count = pages.size(0),
                .table_stride = keys.block_table.stride(0),
                .log2_size = log2_size,
                .is_e4m3 = pages.scalar_type() == ScalarType::Float8_e4m3fn},
  };
}

}  // namespace claa
