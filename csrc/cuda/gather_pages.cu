// gather_pages: copy the kept rows of each request out of an engine's pages.
//
// Memory bound: each kept row is read once and written once. Three dependent reads: the request's
// limits and the position, the page, the row.

#include <climits>

#include "csrc/cuda/gather.cuh"

namespace claa::cuda {
namespace {

template <class Word>
__global__ __launch_bounds__(kGatherThreads) void gather_pages_kernel(const GatherPagesParams p,
                                                                      const GatherPlan plan) {
  // The positions of its rows count bytes.
  const RowSource sources[] = {
      {.first = p.pages.first, .out = p.out, .stride = 1, .row_bytes = p.pages.row_bytes}};
  wait_for_kernels_ahead();
  gather_rows<Word>(sources, plan, blockIdx.x, LLONG_MAX, p.packed.capacity, [&](int64_t i) {
    const int64_t token = p.index[i], request = p.packed.request_of(i);
    if (request < 0 || token == -1) return int64_t(-1);
    assert(p.table.holds(token));
    const PageTable::Place place = p.table.place_of(request, token);
    assert(p.table.exists(place.page));
    return p.pages.offset(place);
  });
}

}  // namespace

int64_t workspace_bytes(const GatherPagesParams&) { return 0; }

cudaError_t run(const GatherPagesParams& p, cudaStream_t stream) {
  const PagedRows& rows = p.pages;
  const uint64_t sizes =
      rows.row_bytes | rows.page_stride | rows.row_stride | uint64_t(rows.first) | uint64_t(p.out);
  return with_word(word_bytes(sizes), [&](auto word) {
    using Word = decltype(word);
    const GatherPlan plan(p.packed.capacity, rows.row_bytes, sizeof(Word), 1);
    return launch_overlapping(gather_pages_kernel<Word>, plan.grid(1), kGatherThreads, stream, p,
                              plan);
  });
}

}  // namespace claa::cuda
