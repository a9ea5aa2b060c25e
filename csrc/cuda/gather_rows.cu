// gather_rows: copy the kept rows of a packed batch.
//
// Memory bound: each kept row is read once and written once.

#include "csrc/cuda/gather.cuh"

namespace claa::cuda {
namespace {

template <class Word>
__global__ __launch_bounds__(kGatherThreads) void gather_rows_kernel(const GatherRowsParams p,
                                                                     const GatherPlan plan) {
  const RowSource sources[] = {
      {.first = p.x, .out = p.out, .stride = p.x_stride, .row_bytes = p.row_bytes}};
  wait_for_kernels_ahead();
  gather_rows<Word>(sources, plan, blockIdx.x, p.total, p.kept,
                    [&](int64_t i) { return p.index[i]; });
}

}  // namespace

int64_t workspace_bytes(const GatherRowsParams&) { return 0; }

cudaError_t run(const GatherRowsParams& p, cudaStream_t stream) {
  const uint64_t sizes = p.row_bytes | p.x_stride | uint64_t(p.x) | uint64_t(p.out);
  return with_word(word_bytes(sizes), [&](auto word) {
    using Word = decltype(word);
    const GatherPlan plan(p.kept, p.row_bytes, sizeof(Word), 1);
    return launch_overlapping(gather_rows_kernel<Word>, plan.grid(1), kGatherThreads, stream, p,
                              plan);
  });
}

}  // namespace claa::cuda
