// score_layer_paged: the engine of score_layer (window_attention.cu), with keys out of pages and
// the length of each prompt out of device memory. Scores go into the running maximum alone.
//
// Reads every key once, or up to twice, as score_layer without `lse`; of the table 4 bytes for each
// page and key head.

#include "csrc/cuda/window_attention.cuh"

namespace claa::cuda {
namespace {

WindowScores scores_of(const ScoreLayerPagedParams& p) {
  return {.attention = p.attention,
          .out = nullptr,
          .pooled = true,
          .kernel_size = p.kernel_size,
          .pool_mode = p.pool_mode,
          .running = p.running,
          .running_stride_b = p.running_stride_b};
}

}  // namespace

int64_t workspace_bytes(const ScoreLayerPagedParams& p) { return workspace_bytes(scores_of(p)); }

cudaError_t run(const ScoreLayerPagedParams& p, cudaStream_t stream) {
  return run(scores_of(p), stream);
}

}  // namespace claa::cuda
