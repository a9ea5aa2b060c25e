// aggregate_scores: the larger of the running score and of every head's score, token by token.
//
// Memory bound, and short: reads (1 + kv_heads) * context floats of a row and writes context. A
// thread takes one vector of tokens and has the loads of kHeads heads in flight.

#include "csrc/cuda/overlap.cuh"

namespace claa::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 8;
constexpr unsigned kMaxGridY = 65535;

__device__ float larger(float a, float b) { return max_or_nan(a, b); }
__device__ float4 larger(float4 a, float4 b) {
  return {max_or_nan(a.x, b.x), max_or_nan(a.y, b.y), max_or_nan(a.z, b.z), max_or_nan(a.w, b.w)};
}

// `context` and the strides count vectors.
template <class Vector>
__global__ __launch_bounds__(kThreads) void aggregate_kernel(const AggregateScoresParams p) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  wait_for_kernels_ahead();
  if (j >= p.context) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const auto* scores = reinterpret_cast<const Vector*>(p.scores) + b * p.scores_stride_b + j;
    Vector best = reinterpret_cast<const Vector*>(p.running)[b * p.running_stride_b + j];
    int64_t g = 0;
    for (; g + kHeads <= p.kv_heads; g += kHeads) {
      Vector of_head[kHeads];
#pragma unroll
      for (int i = 0; i < kHeads; ++i) of_head[i] = scores[(g + i) * p.scores_stride_g];
#pragma unroll
      for (int i = 0; i < kHeads; ++i) best = larger(best, of_head[i]);
    }
    for (; g < p.kv_heads; ++g) best = larger(best, scores[g * p.scores_stride_g]);
    reinterpret_cast<Vector*>(p.out)[b * p.out_stride_b + j] = best;
  }
}

template <class Vector>
cudaError_t launch(AggregateScoresParams p, cudaStream_t stream) {
  constexpr int64_t kItems = sizeof(Vector) / sizeof(float);
  p.context /= kItems;
  p.running_stride_b /= kItems;
  p.scores_stride_b /= kItems;
  p.scores_stride_g /= kItems;
  p.out_stride_b /= kItems;
  const dim3 grid(unsigned(ceil_div(p.context, kThreads)),
                  unsigned(min<int64_t>(p.batch, kMaxGridY)));
  return launch_overlapping(aggregate_kernel<Vector>, grid, kThreads, stream, p);
}

}  // namespace

int64_t workspace_bytes(const AggregateScoresParams&) { return 0; }

cudaError_t run(const AggregateScoresParams& p, cudaStream_t stream) {
  const uint64_t floats =
      p.context | p.running_stride_b | p.scores_stride_b | p.scores_stride_g | p.out_stride_b;
  const uint64_t addresses = uint64_t(p.running) | uint64_t(p.scores) | uint64_t(p.out);
  return floats % 4 == 0 && addresses % sizeof(float4) == 0 ? launch<float4>(p, stream)
                                                            : launch<float>(p, stream);
}

}  // namespace claa::cuda
