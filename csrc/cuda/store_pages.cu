// store_pages: write rows into the slots of an engine's pages.
//
// Memory bound: each row is read once and written once. A thread moves kGatherWords words, of as
// many rows: the gathers the other way round.

#include "csrc/cuda/gather.cuh"

namespace claa::cuda {
namespace {

template <class Word>
__global__ __launch_bounds__(kGatherThreads) void store_pages_kernel(const StorePagesParams p,
                                                                     const GatherPlan plan) {
  const int lane = threadIdx.x & ((1 << plan.log_team) - 1);
  const int step = kGatherThreads >> plan.log_team;
  const int64_t byte = ((int64_t(blockIdx.x) << plan.log_team) + lane) * int64_t(sizeof(Word));
  wait_for_kernels_ahead();
  if (byte >= p.pages.row_bytes) return;
  for (int64_t block = blockIdx.y; block < plan.blocks; block += gridDim.y) {
    const int64_t row = block * step * kGatherWords + (threadIdx.x >> plan.log_team);
    Word words[kGatherWords];
    int64_t to[kGatherWords];
#pragma unroll
    for (int i = 0; i < kGatherWords; ++i) {
      const int64_t from = row + i * step;
      const int64_t slot = from < p.count ? p.slots[from] : -1;
      assert(slot >= -1 && slot < p.num_pages * p.block);
      const uint32_t page = uint32_t(slot) / uint32_t(p.block);
      to[i] = slot < 0 ? -1 : p.pages.offset({.page = page, .row = slot - page * p.block});
      if (slot >= 0) words[i] = *reinterpret_cast<const Word*>(p.x + from * p.x_stride + byte);
    }
#pragma unroll
    for (int i = 0; i < kGatherWords; ++i)
      if (to[i] >= 0) *reinterpret_cast<Word*>(p.pages.first + to[i] + byte) = words[i];
  }
}

}  // namespace

int64_t workspace_bytes(const StorePagesParams&) { return 0; }

cudaError_t run(const StorePagesParams& p, cudaStream_t stream) {
  const PagedRows& rows = p.pages;
  const uint64_t sizes = rows.row_bytes | rows.page_stride | rows.row_stride |
                         uint64_t(rows.first) | uint64_t(p.x) | p.x_stride;
  return with_word(word_bytes(sizes), [&](auto word) {
    using Word = decltype(word);
    const GatherPlan plan(p.count, rows.row_bytes, sizeof(Word), 1);
    return launch_overlapping(store_pages_kernel<Word>, plan.grid(1), kGatherThreads, stream, p,
                              plan);
  });
}

}  // namespace claa::cuda
