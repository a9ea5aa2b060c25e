// The second step of peak_attention, when the softmax is known.

#pragma once

#include "csrc/cuda/attention.cuh"

namespace claa::cuda {

struct PeakEmit {
  WindowAttention attention;  // its window: the queries
  const float* running;       // [batch, queries, total], may be nullptr
  float* out;                 // [batch, queries, total]
  int64_t running_stride_b, running_stride_t;
  const float2* columns;  // of the softmax
};

// The step on Hopper (hopper_peak.cu). `takes`: whether the device, the sizes and the strides are
// such that its instructions can do the work.
namespace hopper {
#ifdef CLAA_HOPPER
bool takes(const PeakEmit& p);
#else
inline bool takes(const PeakEmit&) { return false; }
#endif
cudaError_t run(const PeakEmit& p, cudaStream_t stream);
}  // namespace hopper

}  // namespace claa::cuda
