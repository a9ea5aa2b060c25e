// What the two score kernels share, and what scores.cu asks of them.

#pragma once

#include "csrc/cuda/hopper/launch.cuh"
#include "csrc/cuda/hopper/layout.cuh"
#include "csrc/cuda/hopper/schedule.cuh"
#include "csrc/cuda/hopper/tma.cuh"
#include "csrc/cuda/window_attention.cuh"

namespace claa::cuda::hopper {

constexpr int kScoreWarpgroups = 2;  // that multiply
constexpr int kScoreConsumers = kScoreWarpgroups * kWarpgroup;
constexpr int64_t kMostHalo = 32;

struct ScoreParams {
  WindowScores scores;
  Schedule schedule;
  Layout layout;
  SoftmaxPartial* partials;  // [ranges, query rows]; nullptr with `lse`
  int kept_tiles;            // of a block, whose products stay in shared memory
  int group, head_rows;      // heads of a group; query rows of a head
  int slots, sums_stride;    // sums of a key; keys of a slot
  bool has_padding_rows;
  int pool_halo;
  // With pages: the most tiles of a range, and the blocks, for which every prompt's ranges are
  // planned.
  int most_tiles;
  cutlass::FastDivmod blocks;
  float scale_log2;  // from products to logits, in FastExp's unit
  float pool_scale;  // from sums to averages

  __device__ __forceinline__ const WindowAttention& attention() const { return scores.attention; }
  __device__ __forceinline__ int query_rows() const { return group * head_rows; }
};

inline ScoreParams score_params(const WindowScores& s, const Schedule& schedule,
                                const Layout& layout, int64_t query_rows, int64_t sums_stride,
                                int64_t kept_tiles) {
  const WindowAttention& a = s.attention;
  return {.scores = s,
          .schedule = schedule,
          .layout = layout,
          .partials = a.lse ? nullptr : static_cast<SoftmaxPartial*>(a.workspace),
          .kept_tiles = int(kept_tiles),
          .group = int(a.group()),
          .head_rows = head_rows(a),
          .slots = int(s.slots()),
          .sums_stride = int(sums_stride),
          .has_padding_rows = a.group() * a.window != query_rows,
          .pool_halo = int(s.halo()),
          .most_tiles = 0,
          .blocks = {},
          .scale_log2 = a.scale * FastExp::kUnit,
          .pool_scale = 1.f / float(2 * s.halo() + 1)};
}

inline cudaError_t launch_scores(void (*kernel)(Maps, ScoreParams), const ScoreParams& p,
                                 int64_t blocks, int threads, cudaStream_t stream) {
  Maps maps;
  const cudaError_t status = map_both(p.scores.attention, kTileRows, p.group, p.head_rows, &maps);
  if (status != cudaSuccess) return status;
  return launch_kernel(kernel,
                       {.blocks = blocks,
                        .threads = threads,
                        .shared_bytes = p.layout.bytes,
                        .is_cooperative = p.partials != nullptr,
                        .overlaps = true},
                       stream, maps, p);
}

// Up to 64 query rows of a group (scores_narrow.cu).
namespace narrow {
bool takes(const WindowScores& s);
int64_t workspace_bytes(const WindowScores& s);
cudaError_t run(const WindowScores& s, cudaStream_t stream);
}  // namespace narrow

// Up to 256 of them (scores_wide.cu).
namespace wide {
bool takes(const WindowScores& s);
int64_t workspace_bytes(const WindowScores& s);
cudaError_t run(const WindowScores& s, cudaStream_t stream);
}  // namespace wide

}  // namespace claa::cuda::hopper
