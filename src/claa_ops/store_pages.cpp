// store_pages: check the arguments, fill the params, launch.

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"
#include "src/claa_ops/pages.h"

namespace claa {

void store_pages(const Tensor& pages, const Tensor& x, const Tensor& slots) {
  constexpr const char* op = "store_pages";
  check_rank(op, "pages", pages, 3, "[P, block, C]");
  check_rank(op, "x", x, 2, "[T, C]");
  const int64_t count = x.size(0), num_pages = pages.size(0), block = pages.size(1);
  check_size(op, "x", x, 1, "C", pages.size(2), "pages");
  check_dtype_like(op, "x", x, pages, "pages");
  check_device_like(op, "x", x, pages, "pages");
  const PagedRows rows = paged_rows_of(op, "pages", pages);
  check_rows_apart(op, "pages", pages);
  check(num_pages * block < int64_t(1) << 31, op, "pages must have fewer than 2^31 rows, got ",
        num_pages * block);
  check_last_dim_contiguous(op, "x", x);
  const Indices places = integers_of(op, "slots", slots, "T", count, x, "x");
  for (int64_t i = 0; slots.is_cpu() && i < count; ++i)
    check(places[i] >= -1 && places[i] < num_pages * block, op,
          "slots must be in [-1, P * block) = [-1, ", num_pages * block, "), got ", places[i]);

  if (x.numel() == 0) return;
  launch(x, StorePagesParams{
                .x = static_cast<const char*>(x.const_data_ptr()),
                .slots = places,
                .pages = rows,
                .num_pages = num_pages,
                .block = block,
                .count = count,
                .x_stride = x.stride(0) * int64_t(x.element_size()),
            });
}

}  // namespace claa
