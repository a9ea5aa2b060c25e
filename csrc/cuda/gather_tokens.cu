// gather_tokens: copy the kept rows of hidden states, position embeddings or position ids.
//
// Memory bound: each kept row is read once and written once.

#include "csrc/cuda/gather.cuh"

namespace claa::cuda {
namespace {

template <class Word>
__global__ __launch_bounds__(kGatherThreads) void gather_tokens_kernel(const GatherTokensParams p,
                                                                       int64_t blocks) {
  const int64_t b = blockIdx.x / blocks;
  const int64_t rows = block_rows(p.row_bytes, sizeof(Word));
  const int64_t begin = blockIdx.x % blocks * rows;
  gather_rows<Word>({.first = p.x + b * p.x_stride_b,
                     .out = p.out + b * p.kept * p.row_bytes,
                     .stride = p.x_stride_n,
                     .row_bytes = p.row_bytes},
                    p.total, begin, min(begin + rows, p.kept),
                    [&](int64_t i) { return p.index[b * p.index_stride_b + i]; });
}

}  // namespace

int64_t workspace_bytes(const GatherTokensParams&) { return 0; }

cudaError_t run(const GatherTokensParams& p, cudaStream_t stream) {
  const uint64_t sizes = p.row_bytes | p.x_stride_b | p.x_stride_n | uint64_t(p.x);
  return with_word(word_bytes(sizes), [&](auto word) {
    using Word = decltype(word);
    const int64_t blocks = ceil_div(p.kept, block_rows(p.row_bytes, sizeof(Word)));
    gather_tokens_kernel<Word><<<p.batch * blocks, kGatherThreads, 0, stream>>>(p, blocks);
    return launched();
  });
}

}  // namespace claa::cuda
