// score_window: the engine's sums (window_attention.cu), one row for each query head.

#include "csrc/cuda/window_attention.cuh"

namespace claa::cuda {
namespace {

WindowScores scores_of(const ScoreWindowParams& p) {
  return {.attention = p.attention,
          .out = p.out,
          .pooled = false,
          .kernel_size = 1,
          .pool_mode = PoolMode::avg};
}

}  // namespace

int64_t workspace_bytes(const ScoreWindowParams& p) { return workspace_bytes(scores_of(p)); }

cudaError_t run(const ScoreWindowParams& p, cudaStream_t stream) {
  return run(scores_of(p), stream);
}

}  // namespace claa::cuda
