// select_topk: positions of the k best scores of each row, ascending.

#include "csrc/cuda/select.cuh"

namespace claa::cuda {

int64_t workspace_bytes(const SelectTopkParams& p) { return select::workspace_bytes(p); }

cudaError_t run(const SelectTopkParams& p, cudaStream_t stream) {
  return p.out_is_int32 ? select::run<int32_t>(p, stream) : select::run<int64_t>(p, stream);
}

}  // namespace claa::cuda
