// gather_tokens: copy the kept rows of hidden states, position embeddings or position ids.
//
// Memory bound: each kept row is read once and written once.

#include "csrc/cuda/gather.cuh"

namespace claa::cuda {
namespace {

template <class Word>
__global__ __launch_bounds__(kGatherThreads) void gather_tokens_kernel(const GatherTokensParams p,
                                                                       const GatherPlan plan) {
  const uint32_t b = blockIdx.x / plan.pieces, piece = blockIdx.x - b * plan.pieces;
  const RowSource sources[] = {{.first = p.x + b * p.x_stride_b,
                                .out = p.out + b * p.kept * p.row_bytes,
                                .stride = p.x_stride_n,
                                .row_bytes = p.row_bytes}};
  wait_for_kernels_ahead();
  gather_rows<Word>(sources, plan, piece, p.total, p.kept,
                    [&](int64_t i) { return p.index[b * p.index_stride_b + i]; });
}

}  // namespace

int64_t workspace_bytes(const GatherTokensParams&) { return 0; }

cudaError_t run(const GatherTokensParams& p, cudaStream_t stream) {
  const uint64_t sizes = p.row_bytes | p.x_stride_b | p.x_stride_n | uint64_t(p.x);
  return with_word(word_bytes(sizes), [&](auto word) {
    using Word = decltype(word);
    const GatherPlan plan(p.kept, p.row_bytes, sizeof(Word), 1);
    return launch_overlapping(gather_tokens_kernel<Word>, plan.grid(p.batch), kGatherThreads,
                              stream, p, plan);
  });
}

}  // namespace claa::cuda
