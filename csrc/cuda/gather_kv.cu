// gather_kv: copy the kept rows of keys and values in one launch.
//
// Memory bound: each kept row is read once and written once. Ascending positions keep the reads
// of neighbouring blocks close together in memory.

#include "csrc/cuda/gather.cuh"

namespace claa::cuda {
namespace {

// Of each head the blocks [0, key_blocks) copy keys, the others values.
template <class Word>
__global__ __launch_bounds__(kGatherThreads) void gather_kv_kernel(const GatherKvParams p,
                                                                   int64_t key_blocks,
                                                                   int64_t value_blocks) {
  const int64_t head = blockIdx.x / (key_blocks + value_blocks);
  const int64_t block = blockIdx.x % (key_blocks + value_blocks);
  const int64_t b = head / p.kv_heads, g = head % p.kv_heads;
  const bool is_key = block < key_blocks;
  const RowSource source =
      is_key ? RowSource{.first = p.key + b * p.key_stride_b + g * p.key_stride_g,
                         .out = p.key_out + head * p.kept * p.key_row_bytes,
                         .stride = p.key_stride_n,
                         .row_bytes = p.key_row_bytes}
             : RowSource{.first = p.value + b * p.value_stride_b + g * p.value_stride_g,
                         .out = p.value_out + head * p.kept * p.value_row_bytes,
                         .stride = p.value_stride_n,
                         .row_bytes = p.value_row_bytes};
  const int64_t rows = block_rows(source.row_bytes, sizeof(Word));
  const int64_t begin = (is_key ? block : block - key_blocks) * rows;
  const int64_t index = b * p.index_stride_b + g * p.index_stride_g;
  gather_rows<Word>(source, p.total, begin, min(begin + rows, p.kept),
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
    const auto blocks = [&](int64_t row_bytes) {
      return row_bytes ? ceil_div(p.kept, block_rows(row_bytes, sizeof(Word))) : 0;
    };
    const int64_t key_blocks = blocks(p.key_row_bytes), value_blocks = blocks(p.value_row_bytes);
    const int64_t grid = p.batch * p.kv_heads * (key_blocks + value_blocks);
    gather_kv_kernel<Word><<<grid, kGatherThreads, 0, stream>>>(p, key_blocks, value_blocks);
    return launched();
  });
}

}  // namespace claa::cuda
