// score_layer: score_tokens, whose engine (window_attention.cu) joins each score that it writes
// into the running maximum.
//
// A pooling kernel too wide for the engine takes more steps: score_tokens, then aggregate_scores.

#include "csrc/cuda/window_attention.cuh"

namespace claa::cuda {
namespace {

WindowScores scores_of(const ScoreLayerParams& p) {
  return {.attention = p.attention,
          .out = p.out,
          .pooled = true,
          .kernel_size = p.kernel_size,
          .pool_mode = p.pool_mode,
          .running = p.running,
          .running_stride_b = p.running_stride_b};
}

bool is_one_step(const ScoreLayerParams& p) { return p.kernel_size / 2 <= kMaxHalo; }

}  // namespace

int64_t workspace_bytes(const ScoreLayerParams& p) {
  return is_one_step(p) ? workspace_bytes(scores_of(p)) : workspace_bytes(p.scores());
}

cudaError_t run(const ScoreLayerParams& p, cudaStream_t stream) {
  if (is_one_step(p)) return run(scores_of(p), stream);
  const cudaError_t status = run(p.scores(), stream);
  return status == cudaSuccess ? run(p.maximum(), stream) : status;
}

}  // namespace claa::cuda
