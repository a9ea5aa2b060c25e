// kept_metadata: check the arguments, fill the params, launch.

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"
#include "src/claa_ops/pages.h"

namespace claa {

void kept_metadata(const Tensor& seq_lens, const Tensor& slots, const Tensor& logical_seq_lens,
                   const Tensor& prompts, const Tensor& kept, const Tensor& block_table,
                   int64_t block_size) {
  constexpr const char* op = "kept_metadata";
  check_rank(op, "seq_lens", seq_lens, 1, "[R]");
  check_rank(op, "slots", slots, 1, "[R * Q]");
  check_dtype(op, "seq_lens", seq_lens, ScalarType::Int);
  check_dtype(op, "slots", slots, ScalarType::Long);
  check_device_like(op, "slots", slots, seq_lens, "seq_lens");
  check_last_dim_contiguous(op, "seq_lens", seq_lens);
  check_last_dim_contiguous(op, "slots", slots);
  const int64_t requests = seq_lens.size(0);
  check(slots.size(0) % std::max<int64_t>(requests, 1) == 0, op,
        "slots must have as many entries for each of the R = ", requests,
        " requests of seq_lens, got ", slots.size(0));
  check(block_size > 0, op, "block_size must be positive, got ", block_size);
  const auto of_requests = [&](const char* name, const Tensor& t) {
    return integers_of(op, name, t, "R", requests, seq_lens, "seq_lens");
  };
  const Indices logical = of_requests("logical_seq_lens", logical_seq_lens);
  const Indices of_prompts = of_requests("prompts", prompts), of_kept = of_requests("kept", kept);
  const PageTable table = page_table_of(op, block_table, 0, block_size, seq_lens, "seq_lens");
  check_size(op, "block_table", block_table, 0, "R", requests, "seq_lens");

  if (requests == 0) return;
  const KeptMetadataParams params{
      .seq_lens = seq_lens.mutable_data_ptr<int32_t>(),
      .slots = slots.mutable_data_ptr<int64_t>(),
      .logical = logical,
      .prompts = of_prompts,
      .kept = of_kept,
      .table = table,
      .batch = requests,
      .queries = slots.size(0) / requests,
  };
  for (int64_t r = 0; seq_lens.is_cpu() && r < requests; ++r)
    check(params.length(r) <= table.width * block_size, op, "block_table must have room for ",
          params.length(r), " entries of a request, got ", table.width * block_size);
  launch(seq_lens, params);
}

}  // namespace claa
