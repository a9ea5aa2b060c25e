// kept_metadata: lengths and slots of the layers behind a selection, for a step of decoding.
//
// Latency bound: one node, a thread for each request.

#include <cassert>

#include "csrc/cuda/overlap.cuh"

namespace claa::cuda {
namespace {

constexpr int kThreads = 128;

__global__ __launch_bounds__(kThreads) void kept_metadata_kernel(const KeptMetadataParams p) {
  wait_for_kernels_ahead();
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= p.batch) return;
  const int64_t length = p.length(b);
  assert(length == 0 || p.table.holds(length - 1));
  p.seq_lens[b] = int32_t(length);
  for (int64_t i = 0; i < p.queries; ++i) p.slots[b * p.queries + i] = p.slot(b, length, i);
}

}  // namespace

int64_t workspace_bytes(const KeptMetadataParams&) { return 0; }

cudaError_t run(const KeptMetadataParams& p, cudaStream_t stream) {
  return launch_overlapping(kept_metadata_kernel, unsigned(ceil_div(p.batch, kThreads)), kThreads,
                            stream, p);
}

}  // namespace claa::cuda
