// gather_pages: check the arguments, fill the params, launch.

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"
#include "src/claa_ops/pages.h"

namespace claa {

void gather_pages(const Tensor& out, const Tensor& pages, const Tensor& block_table,
                  const Tensor& starts, const Tensor& index) {
  constexpr const char* op = "gather_pages";
  check_rank(op, "out", out, 2, "[k, C]");
  check_rank(op, "pages", pages, 3, "[P, block, C]");
  check_size(op, "pages", pages, 2, "C", out.size(1), "out");
  check_dtype_like(op, "out", out, pages, "pages");
  check_device_like(op, "out", out, pages, "pages");
  check_last_dim_contiguous(op, "out", out);
  check_packed_rows(op, "out", out);
  const PagedRows rows = paged_rows_of(op, "pages", pages);
  const PageTable table =
      page_table_of(op, block_table, pages.size(0), pages.size(1), pages, "pages");
  const Packed packed =
      packed_of(op, starts, block_table.size(0), out.size(0), block_table, "block_table");
  const Indices tokens = integers_of(op, "index", index, "k", out.size(0), out, "out");
  for (int64_t r = 0; index.is_cpu() && r < packed.requests; ++r)
    for (int64_t i = packed.begin(r); i < packed.end(r); ++i)
      check_token(op, table, r, tokens[i], -1);

  if (out.numel() == 0) return;
  launch(out, GatherPagesParams{
                  .pages = rows,
                  .table = table,
                  .packed = packed,
                  .index = tokens,
                  .out = static_cast<char*>(out.mutable_data_ptr()),
              });
}

}  // namespace claa
