// compact_pages: check the arguments, fill the params, launch.

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"
#include "src/claa_ops/pages.h"

namespace claa {

namespace {

// On the CPU, before anything is moved: the tokens of each request ascend, and its pages exist.
void check_tokens(const char* op, const CompactPagesParams& p, int64_t heads) {
  for (int64_t r = 0; r < p.packed.requests; ++r) {
    const int64_t begin = p.packed.begin(r), kept = p.packed.end(r) - begin;
    for (int64_t g = 0; g < heads; ++g) {
      const int64_t first = g * p.index_stride_g + begin;
      for (int64_t i = 0; i < kept; ++i) {
        const int64_t token = p.index[first + i];
        check_token(op, p.table, r, token, 0);
        check(i == 0 || token > p.index[first + i - 1], op,
              "index must ascend within a request, got ", token, " after ",
              i == 0 ? -1 : p.index[first + i - 1]);
      }
    }
    for (int64_t i = 0; i < kept; ++i) check_token(op, p.table, r, i, 0);
  }
}

}  // namespace

void compact_pages(const Tensor& key_pages, const Tensor& value_pages, const Tensor& block_table,
                   const Tensor& starts, const Tensor& index) {
  constexpr const char* op = "compact_pages";
  check_rank(op, "key_pages", key_pages, 4, "[P, block, G, D]");
  check_rank(op, "value_pages", value_pages, 4, "[P, block, G, Dv]");
  const int64_t num_pages = key_pages.size(0), block = key_pages.size(1);
  const int64_t kv_heads = key_pages.size(2);
  check_size(op, "value_pages", value_pages, 0, "P", num_pages, "key_pages");
  check_size(op, "value_pages", value_pages, 1, "block", block, "key_pages");
  check_size(op, "value_pages", value_pages, 2, "G", kv_heads, "key_pages");
  check_device_like(op, "value_pages", value_pages, key_pages, "key_pages");
  const PagedRows key = paged_rows_of(op, "key_pages", key_pages);
  const PagedRows value = paged_rows_of(op, "value_pages", value_pages);
  check_rows_apart(op, "key_pages", key_pages);
  check_rows_apart(op, "value_pages", value_pages);
  const PageTable table = page_table_of(op, block_table, num_pages, block, key_pages, "key_pages");

  const bool has_heads = index.dim() == 2;
  check(has_heads || index.dim() == 1, op, "index must have shape [k] or [G, k], got ",
        shape_of(index));
  if (has_heads) check_size(op, "index", index, 0, "G", kv_heads, "key_pages");
  check_device_like(op, "index", index, key_pages, "key_pages");
  const Indices tokens = indices_of(op, "index", index);
  const int64_t capacity = index.size(index.dim() - 1);
  const CompactPagesParams params{
      .key = key,
      .value = value,
      .table = table,
      .packed = packed_of(op, starts, block_table.size(0), capacity, block_table, "block_table"),
      .index = tokens,
      .index_stride_g = has_heads ? index.stride(0) : 0,
      .kv_heads = kv_heads,
  };
  if (index.is_cpu()) check_tokens(op, params, has_heads ? kv_heads : 1);

  if (index.numel() == 0 || kv_heads == 0 || key.row_bytes + value.row_bytes == 0) return;
  launch(key_pages, params);
}

}  // namespace claa
