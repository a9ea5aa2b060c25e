// aggregate_scores: the larger of the running score and of every head's score, token by token.
//
// Memory bound: reads (1 + kv_heads) * context floats of a row and writes context. A thread takes
// kItems tokens one block width apart, so every load is coalesced and several are in flight.

#include "csrc/cuda/common.cuh"

namespace claa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 2;

__global__ __launch_bounds__(kThreads) void aggregate_kernel(const AggregateScoresParams p) {
  const int64_t blocks = ceil_div(p.context, kThreads * kItems);
  const int64_t b = blockIdx.x / blocks;
  const int64_t first = blockIdx.x % blocks * kThreads * kItems + threadIdx.x;
  const float* running = p.running + b * p.running_stride_b;
  const float* scores = p.scores + b * p.scores_stride_b;

  float best[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t j = first + i * kThreads;
    best[i] = j < p.context ? running[j] : 0.f;
  }
#pragma unroll 4
  for (int64_t g = 0; g < p.kv_heads; ++g) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t j = first + i * kThreads;
      if (j < p.context) best[i] = max_or_nan(best[i], scores[g * p.scores_stride_g + j]);
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t j = first + i * kThreads;
    if (j < p.context) p.out[b * p.context + j] = best[i];
  }
}

}  // namespace

int64_t workspace_bytes(const AggregateScoresParams&) { return 0; }

cudaError_t run(const AggregateScoresParams& p, cudaStream_t stream) {
  const int64_t blocks = p.batch * ceil_div(p.context, kThreads * kItems);
  aggregate_kernel<<<blocks, kThreads, 0, stream>>>(p);
  return launched();
}

}  // namespace claa::cuda
