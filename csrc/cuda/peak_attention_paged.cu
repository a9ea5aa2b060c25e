// peak_attention_paged: the kernels of peak_attention (softmax.cu, peak_attention.cu), with keys
// out of pages and the length of each prompt out of device memory.
//
// Grids are as large as the longest prompt may need; blocks that have no keys end at once. A block
// owns its entries of `running`, so it reads, joins and writes them without atomics.

#include "csrc/cuda/peak_attention.cuh"

namespace claa::cuda {

int64_t workspace_bytes(const PeakAttentionPagedParams& p) {
  return softmax_bytes(attention_of_queries(p, p.queries, p.query_stride_t));
}

cudaError_t run(const PeakAttentionPagedParams& p, cudaStream_t stream) {
  return run_peaks({.attention = attention_of_queries(p, p.queries, p.query_stride_t),
                    .running = p.running,
                    .out = p.running,
                    .running_stride_b = p.running_stride_b,
                    .running_stride_t = p.running_stride_t,
                    .out_stride_b = p.running_stride_b,
                    .out_stride_t = p.running_stride_t,
                    .normalizers = nullptr},
                   stream);
}

}  // namespace claa::cuda
