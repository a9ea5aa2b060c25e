// Window scores on Hopper: which of two kernels does the work.
//
// Neither knows the batch nor the number of heads, so a row has the same bits in any batch.

#include "csrc/cuda/hopper/scores.cuh"

#include "csrc/cuda/hopper/launch.cuh"

namespace claa::cuda::hopper {

bool takes(const WindowScores& s) {
  const WindowAttention& a = s.attention;
  if (!device_fits() || !keys_fit(a) || !queries_fit(a)) return false;
  // TMA brings the queries of a group at once: no head may stand for several.
  if (a.query_stride_h == 0 && a.group() != 1) return false;
  if (a.softcap != 0.f || a.sliding_window || !(a.scale > 0.f)) return false;
  return narrow::takes(s) || wide::takes(s);
}

int64_t workspace_bytes(const WindowScores& s) {
  return narrow::takes(s) ? narrow::workspace_bytes(s) : wide::workspace_bytes(s);
}

cudaError_t run(const WindowScores& s, cudaStream_t stream) {
  return narrow::takes(s) ? narrow::run(s, stream) : wide::run(s, stream);
}

}  // namespace claa::cuda::hopper
