// gather_tokens: check the arguments, allocate the output, fill the params, launch.

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"

namespace claa {

Tensor gather_tokens(const Tensor& x, const Tensor& index) {
  constexpr const char* op = "gather_tokens";
  check_rank(op, "x", x, 3, "[B, N, C] or [1, N, C]");
  check_rank(op, "index", index, 2, "[B, k]");
  const int64_t batch = index.size(0), kept = index.size(1), total = x.size(1);
  check(x.size(0) == 1 || x.size(0) == batch, op, "x must have B = 1 or B = ", batch,
        " like index, got ", x.size(0), " in ", shape_of(x));
  check_device_like(op, "index", index, x, "x");
  check_last_dim_contiguous(op, "x", x);
  const Indices positions = indices_of(op, "index", index);
  check_index_range(op, index, total);
  const int64_t item_bytes = item_bytes_of(op, "x", x);

  const Tensor out = allocate(x, {batch, kept, x.size(2)});
  if (out.numel() == 0) return out;
  launch(x, GatherTokensParams{
                .x = static_cast<const char*>(x.const_data_ptr()),
                .index = positions,
                .out = static_cast<char*>(out.mutable_data_ptr()),
                .batch = batch,
                .total = total,
                .kept = kept,
                .row_bytes = x.size(2) * item_bytes,
                .x_stride_b = x.size(0) == 1 ? 0 : x.stride(0) * item_bytes,
                .x_stride_n = x.stride(1) * item_bytes,
                .index_stride_b = index.stride(0),
            });
  return out;
}

}  // namespace claa
