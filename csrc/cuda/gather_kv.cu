// gather_kv: copy the kept rows of keys and values in one launch.
//
// Memory bound: each kept row is read once and written once. A thread moves a word of a key and the
// same word of its value, for one read of the position. Ascending positions keep the reads of
// neighbouring blocks close together in memory.

#include "csrc/cuda/gather.cuh"

namespace claa::cuda {
namespace {

template <class Word>
__global__ __launch_bounds__(kGatherThreads) void gather_kv_kernel(const GatherKvParams p,
                                                                   const GatherPlan plan) {
  const uint32_t head = blockIdx.x / plan.pieces, piece = blockIdx.x - head * plan.pieces;
  const uint32_t b = head / uint32_t(p.kv_heads), g = head - b * uint32_t(p.kv_heads);
  const RowSource sources[] = {{.first = p.key + b * p.key_stride_b + g * p.key_stride_g,
                                .out = p.key_out + head * p.kept * p.key_row_bytes,
                                .stride = p.key_stride_n,
                                .row_bytes = p.key_row_bytes},
                               {.first = p.value + b * p.value_stride_b + g * p.value_stride_g,
                                .out = p.value_out + head * p.kept * p.value_row_bytes,
                                .stride = p.value_stride_n,
                                .row_bytes = p.value_row_bytes}};
  const int64_t index = b * p.index_stride_b + g * p.index_stride_g;
  wait_for_kernels_ahead();
  gather_rows<Word>(sources, plan, piece, p.total, p.kept,
                    [&](int64_t i) { return p.index[index + i]; });
}

}  // namespace

int64_t workspace_bytes(const GatherKvParams&) { return 0; }

cudaError_t run(const GatherKvParams& p, cudaStream_t stream) {
  const uint64_t sizes = p.key_row_bytes | p.key_stride_b | p.key_stride_g | p.key_stride_n |
                         p.value_row_bytes | p.value_stride_b | p.value_stride_g |
                         p.value_stride_n | uint64_t(p.key) | uint64_t(p.value);
  return with_word(word_bytes(sizes), [&](auto word) {
    using Word = decltype(word);
    const GatherPlan plan(p.kept, max(p.key_row_bytes, p.value_row_bytes), sizeof(Word), 2);
    return launch_overlapping(gather_kv_kernel<Word>, plan.grid(p.batch * p.kv_heads),
                              kGatherThreads, stream, p, plan);
  });
}

}  // namespace claa::cuda
