// gather_rows: check the arguments, fill the params, launch.

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"
#include "src/claa_ops/pages.h"

namespace claa {

void gather_rows(const Tensor& out, const Tensor& x, const Tensor& index) {
  constexpr const char* op = "gather_rows";
  check_rank(op, "out", out, 2, "[k, C]");
  check_rank(op, "x", x, 2, "[T, C]");
  const int64_t kept = out.size(0), total = x.size(0);
  check_size(op, "x", x, 1, "C", out.size(1), "out");
  check_dtype_like(op, "out", out, x, "x");
  check_device_like(op, "out", out, x, "x");
  check_last_dim_contiguous(op, "out", out);
  check_packed_rows(op, "out", out);
  check_last_dim_contiguous(op, "x", x);
  const Indices positions = integers_of(op, "index", index, "k", kept, out, "out");
  check_index_range(op, index, total);
  const int64_t item_bytes = item_bytes_of(op, "x", x);

  if (out.numel() == 0) return;
  launch(x, GatherRowsParams{
                .x = static_cast<const char*>(x.const_data_ptr()),
                .index = positions,
                .out = static_cast<char*>(out.mutable_data_ptr()),
                .total = total,
                .kept = kept,
                .row_bytes = x.size(1) * item_bytes,
                .x_stride = x.stride(0) * item_bytes,
            });
}

}  // namespace claa
