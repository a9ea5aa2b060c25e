// hop_tokens: check the arguments, allocate the output, fill the params, launch part after part.

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"

namespace claa {

Tensor hop_tokens(const Tensor& scores, const Tensor& states, int64_t hops, int64_t num_seeds,
                  double temperature, int64_t gap, int64_t kernel_size, int64_t pool_mode,
                  const std::optional<Tensor>& start) {
  constexpr const char* op = "hop_tokens";
  check_rank(op, "scores", scores, 2, "[B, M]");
  check_rank(op, "states", states, 4, "[B, G, N, D]");
  check_dtype(op, "scores", scores, ScalarType::Float);
  const DType dtype = float_dtype(op, "states", states);
  check_device_like(op, "states", states, scores, "scores");
  const int64_t batch = scores.size(0), context = scores.size(1);
  check_size(op, "states", states, 0, "B", batch, "scores");
  check(states.size(2) >= context, op, "N must be at least M = ", context, ", got ",
        states.size(2));
  check(states.size(1) > 0, op, "G must be at least 1, got 0");
  check(states.size(3) > 0, op, "D must be at least 1, got 0");
  check_last_dim_contiguous(op, "scores", scores);
  check_last_dim_contiguous(op, "states", states);
  check(hops > 0, op, "hops must be at least 1, got ", hops);
  check(num_seeds > 0, op, "num_seeds must be at least 1, got ", num_seeds);
  // Of the smallest cosine, -1, exp((cosine - 1) / temperature) is still a normal float.
  check(temperature >= 0.025, op, "temperature must be at least 0.025, got ", temperature);
  check(gap >= 0, op, "gap must not be negative, got ", gap);
  check_kernel_size(op, kernel_size);
  const PoolMode mode = pool_mode_of(op, pool_mode);

  HopTokensParams params{
      .part = HopTokensParams::kMean,
      .scores = scores.const_data_ptr<float>(),
      .states = states.const_data_ptr(),
      .start = row_integers(op, "start", start, batch, scores, "scores"),
      .out = nullptr,
      .workspace = nullptr,
      .dtype = dtype,
      .batch = batch,
      .context = context,
      .pieces = states.size(1),
      .dim = states.size(3),
      .scores_stride_b = scores.stride(0),
      .states_stride_b = states.stride(0),
      .states_stride_g = states.stride(1),
      .states_stride_n = states.stride(2),
      .hops = hops,
      .num_seeds = std::min(num_seeds, context),
      .temperature = static_cast<float>(temperature),
      .gap = gap,
      .kernel_size = kernel_size,
      .pool_mode = mode,
      .workers = workers(),
  };
  const Tensor out = allocate(scores, {batch, hops, context});
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr<float>();
  const Tensor workspace = workspace_for(params, scores);
  params.workspace = workspace.mutable_data_ptr();
  for (; params.part < hops; ++params.part) launch(scores, params);
  return out;
}

}  // namespace claa
