// Checks of what the ops on packed prompts and on an engine's pages share.

#pragma once

#include "src/claa_ops/checks.h"

namespace claa {

// A [size] tensor of integers, such as one for each request.
inline Indices integers_of(const char* op, const char* name, const Tensor& t, const char* symbol,
                           int64_t size, const Tensor& like, const char* source) {
  check_rank(op, name, t, 1, (std::string("[") + symbol + "]").c_str());
  check_size(op, name, t, 0, symbol, size, source);
  check_device_like(op, name, t, like, source);
  return indices_of(op, name, t);
}

inline Packed packed_of(const char* op, const Tensor& starts, int64_t requests, int64_t capacity,
                        const Tensor& like, const char* source) {
  return {.starts = integers_of(op, "starts", starts, "R + 1", requests + 1, like, source),
          .requests = requests,
          .capacity = capacity};
}

// Rows [k, C] that are written one after the other.
inline void check_packed_rows(const char* op, const char* name, const Tensor& t) {
  check(t.size(0) <= 1 || t.size(1) == 0 || t.stride(0) == t.size(1), op, name,
        " must be contiguous, got strides ", strides_of(t));
}

// Where every item is written through one view, no two of its rows may share memory.
inline void check_rows_apart(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  for (int64_t dim = 0; dim < last; ++dim)
    check(t.size(dim) <= 1 || t.stride(dim) >= t.size(last), op, name,
          " must have rows that do not overlap, got strides ", strides_of(t));
}

// Pages [P, block, C], or [P, block, G, D] with heads.
inline PagedRows paged_rows_of(const char* op, const char* name, const Tensor& pages) {
  check(pages.size(1) > 0, op, name, " must have a block of at least one row, got ",
        shape_of(pages));
  check_last_dim_contiguous(op, name, pages);
  const int64_t item_bytes = item_bytes_of(op, name, pages), last = pages.dim() - 1;
  // Whoever only reads them does not write through this pointer.
  return {.first = const_cast<char*>(static_cast<const char*>(pages.const_data_ptr())),
          .row_bytes = pages.size(last) * item_bytes,
          .page_stride = pages.stride(0) * item_bytes,
          .row_stride = pages.stride(1) * item_bytes,
          .head_stride = last == 3 ? pages.stride(2) * item_bytes : 0};
}

inline PageTable page_table_of(const char* op, const Tensor& block_table, int64_t num_pages,
                               int64_t block, const Tensor& like, const char* source) {
  check_rank(op, "block_table", block_table, 2, "[R, blocks]");
  check_device_like(op, "block_table", block_table, like, source);
  return {.pages = indices_of(op, "block_table", block_table),
          .width = block_table.size(1),
          .stride = block_table.stride(0),
          .num_pages = num_pages,
          .block = block};
}

// On the CPU, before anything is written, as `check_index_range`: that the table has this token of
// request r.
inline void check_token(const char* op, const PageTable& table, int64_t r, int64_t token,
                        int64_t least) {
  check(token >= least && token < table.width * table.block, op, "index must be in [", least,
        ", blocks * block) = [", least, ", ", table.width * table.block, "), got ", token);
  if (token < 0) return;
  const int64_t page = table.place_of(r, token).page;
  check(table.exists(page), op, "block_table must be in [0, P) = [0, ", table.num_pages,
        ") where it is read, got ", page);
}

}  // namespace claa
