// pool_heads: check the arguments, allocate the output, fill the params, launch.

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"

namespace claa {

Tensor pool_heads(const Tensor& scores, int64_t num_kv_heads, int64_t kernel_size,
                  int64_t pool_mode) {
  constexpr const char* op = "pool_heads";
  check_rank(op, "scores", scores, 3, "[B, H, M]");
  check_dtype(op, "scores", scores, ScalarType::Float);
  check_last_dim_contiguous(op, "scores", scores);
  check(num_kv_heads > 0 && scores.size(1) % num_kv_heads == 0, op,
        "num_kv_heads must divide H = ", scores.size(1), ", got ", num_kv_heads);
  check_kernel_size(op, kernel_size);
  const PoolMode mode = pool_mode_of(op, pool_mode);

  const int64_t batch = scores.size(0), context = scores.size(2);
  const Tensor out = allocate(scores, {batch, num_kv_heads, context});
  if (out.numel() == 0) return out;
  if (scores.numel() == 0) return torch::stable::zero_(const_cast<Tensor&>(out));
  launch(scores, PoolHeadsParams{
                     .scores = scores.const_data_ptr<float>(),
                     .out = out.mutable_data_ptr<float>(),
                     .batch = batch,
                     .heads = scores.size(1),
                     .kv_heads = num_kv_heads,
                     .context = context,
                     .scores_stride_b = scores.stride(0),
                     .scores_stride_h = scores.stride(1),
                     .kernel_size = kernel_size,
                     .pool_mode = mode,
                 });
  return out;
}

}  // namespace claa
