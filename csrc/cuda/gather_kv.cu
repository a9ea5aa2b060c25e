// gather_kv: copy the kept rows of keys and values in one launch.
//
// Memory bound: each kept row is read once and written once. Ascending positions keep the reads
// of neighbouring blocks close together in memory.

#include "csrc/cuda/gather.cuh"

namespace claa::cuda {
namespace {

// The first `heads` strips are keys, the others values.
template <class Word>
__global__ __launch_bounds__(kGatherThreads) void gather_kv_kernel(const GatherKvParams p,
                                                                   const uint32_t heads,
                                                                   const GatherPlan key_plan,
                                                                   const GatherPlan value_plan) {
  const uint32_t key_blocks = heads * key_plan.pieces;
  const bool is_key = blockIdx.x < key_blocks;
  const GatherPlan plan{is_key ? key_plan.log_team : value_plan.log_team,
                        is_key ? key_plan.pieces : value_plan.pieces,
                        is_key ? key_plan.blocks : value_plan.blocks};
  const uint32_t block = is_key ? blockIdx.x : blockIdx.x - key_blocks;
  const uint32_t head = block / plan.pieces, piece = block - head * plan.pieces;
  const uint32_t b = head / uint32_t(p.kv_heads), g = head - b * uint32_t(p.kv_heads);
  const RowSource source =
      is_key ? RowSource{.first = p.key + b * p.key_stride_b + g * p.key_stride_g,
                         .out = p.key_out + head * p.kept * p.key_row_bytes,
                         .stride = p.key_stride_n,
                         .row_bytes = p.key_row_bytes}
             : RowSource{.first = p.value + b * p.value_stride_b + g * p.value_stride_g,
                         .out = p.value_out + head * p.kept * p.value_row_bytes,
                         .stride = p.value_stride_n,
                         .row_bytes = p.value_row_bytes};
  const int64_t index = b * p.index_stride_b + g * p.index_stride_g;
  gather_rows<Word>(source, plan, piece, p.total, p.kept,
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
    const GatherPlan key_plan = plan_gather(p.kept, p.key_row_bytes, sizeof(Word));
    const GatherPlan value_plan = plan_gather(p.kept, p.value_row_bytes, sizeof(Word));
    const int64_t heads = p.batch * p.kv_heads;
    const dim3 grid = gather_grid(heads, key_plan.pieces + value_plan.pieces,
                                  max(key_plan.blocks, value_plan.blocks));
    gather_kv_kernel<Word>
        <<<grid, kGatherThreads, 0, stream>>>(p, uint32_t(heads), key_plan, value_plan);
    return launched();
  });
}

}  // namespace claa::cuda
