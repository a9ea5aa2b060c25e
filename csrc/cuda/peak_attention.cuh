// The second pass of peak_attention, when the softmax is known.

#pragma once

#include "csrc/cuda/attention.cuh"

namespace claa::cuda {

struct PeakSecondPass {
  WindowAttention attention;  // its window: the queries; its keys may lie in pages
  const float* running;       // [batch, queries, total], may be nullptr or `out`
  float* out;                 // [batch, queries, total]
  int64_t running_stride_b, running_stride_t, out_stride_b, out_stride_t;
  const float2* normalizers;  // of the softmax
};

// The softmax, then the second pass. `pass` has no normalizers yet.
cudaError_t run_peaks(PeakSecondPass pass, cudaStream_t stream);

// What the softmax sees: its window is the block of queries.
inline WindowAttention attention_of_queries(const QueryKey& p, int64_t queries, int64_t stride_t) {
  WindowAttention attention{p};
  attention.window = queries;
  attention.query_stride_w = stride_t;
  return attention;
}

// The pass on Hopper (hopper/peak.cu). `takes`: whether its instructions can do the work on this
// device, with these sizes and strides.
namespace hopper {
#ifdef CLAA_HOPPER
bool takes(const PeakSecondPass& p);
cudaError_t run(const PeakSecondPass& p, cudaStream_t stream);
#else
inline bool takes(const PeakSecondPass&) { return false; }
inline cudaError_t run(const PeakSecondPass&, cudaStream_t) { return cudaErrorNotSupported; }
#endif
}  // namespace hopper

}  // namespace claa::cuda
