// score_tokens: the engine's sums (window_attention.cu), pooled and summed over each head group.
//
// A pooling kernel too wide for the engine takes two steps, with the scores of all query heads in
// the workspace: score_window, then pool_heads.

#include "csrc/cuda/window_attention.cuh"

namespace claa::cuda {
namespace {

WindowScores scores_of(const ScoreTokensParams& p) {
  return {.attention = p.attention,
          .out = p.out,
          .pooled = true,
          .kernel_size = p.kernel_size,
          .pool_mode = p.pool_mode};
}

// Beyond the context a pooling kernel sees nothing, so a halo need not be wider than that.
bool is_one_step(const ScoreTokensParams& p) { return p.kernel_size / 2 <= kMaxHalo; }

int64_t head_scores(const ScoreTokensParams& p) {
  return p.attention.batch * p.attention.heads * p.attention.context();
}

// The first step of two: the scores come before the engine's own workspace.
ScoreWindowParams first_step(const ScoreTokensParams& p) {
  float* out = static_cast<float*>(p.attention.workspace);
  ScoreWindowParams first{.attention = p.attention, .out = out};
  first.attention.workspace = out + round_up(head_scores(p), 64);
  return first;
}

}  // namespace

int64_t workspace_bytes(const ScoreTokensParams& p) {
  if (is_one_step(p)) return workspace_bytes(scores_of(p));
  return round_up(head_scores(p), 64) * int64_t(sizeof(float)) +
         workspace_bytes(ScoreWindowParams{.attention = p.attention, .out = nullptr});
}

cudaError_t run(const ScoreTokensParams& p, cudaStream_t stream) {
  if (is_one_step(p)) return run(scores_of(p), stream);
  const WindowAttention& a = p.attention;
  const ScoreWindowParams first = first_step(p);
  const cudaError_t status = run(first, stream);
  if (status != cudaSuccess) return status;
  return run(PoolHeadsParams{.scores = first.out,
                             .out = p.out,
                             .batch = a.batch,
                             .heads = a.heads,
                             .kv_heads = a.kv_heads,
                             .context = a.context(),
                             .scores_stride_b = a.heads * a.context(),
                             .scores_stride_h = a.context(),
                             .kernel_size = p.kernel_size,
                             .pool_mode = p.pool_mode},
             stream);
}

}  // namespace claa::cuda
