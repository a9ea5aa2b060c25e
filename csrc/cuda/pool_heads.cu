// pool_heads: pool each query head along its tokens, then sum the heads of each group.
//
// Memory bound: reads heads * context floats of a prompt and writes kv_heads * context. A thread
// owns one token of one key head; its neighbours' taps come from the L1 cache. Heads are added in
// index order.

#include "csrc/cuda/overlap.cuh"
#include "csrc/cuda/pool.cuh"

namespace claa::cuda {
namespace {

constexpr int kThreads = 256;

__global__ __launch_bounds__(kThreads) void pool_kernel(const PoolHeadsParams p) {
  const int64_t blocks = ceil_div(p.context, kThreads);
  const int64_t row = blockIdx.x / blocks, b = row / p.kv_heads, g = row % p.kv_heads;
  const int64_t j = blockIdx.x % blocks * kThreads + threadIdx.x;
  wait_for_kernels_ahead();
  if (j >= p.context) return;
  const int64_t group = p.heads / p.kv_heads;
  const float* head = p.scores + b * p.scores_stride_b + g * group * p.scores_stride_h;
  float sum = pool_token(head, j, int64_t(0), p.context, p.kernel_size, p.pool_mode);
  for (int64_t i = 1; i < group; ++i)
    sum += pool_token(head + i * p.scores_stride_h, j, int64_t(0), p.context, p.kernel_size,
                      p.pool_mode);
  p.out[row * p.context + j] = sum;
}

}  // namespace

int64_t workspace_bytes(const PoolHeadsParams&) { return 0; }

cudaError_t run(const PoolHeadsParams& p, cudaStream_t stream) {
  const int64_t blocks = p.batch * p.kv_heads * ceil_div(p.context, kThreads);
  return launch_overlapping(pool_kernel, dim3(unsigned(blocks)), kThreads, stream, p);
}

}  // namespace claa::cuda
