// select_topk_packed: positions of the best scores of requests of several lengths, packed.
//
// The kernel of select_topk; lengths and counts are read on the device. The team is that of the
// longest request, which alone the host knows: blocks that a shorter one leaves without tokens take
// part in the exchange of counts and cost what that costs.

#include "csrc/cuda/select.cuh"

namespace claa::cuda {

int64_t workspace_bytes(const SelectTopkPackedParams& p) { return select::workspace_bytes(p); }

cudaError_t run(const SelectTopkPackedParams& p, cudaStream_t stream) {
  if (p.rows() > 0) return select::run<int32_t>(p, stream);
  return cudaMemsetAsync(p.out, 0xff, p.packed.capacity * 4, stream);  // every byte of -1
}

}  // namespace claa::cuda
