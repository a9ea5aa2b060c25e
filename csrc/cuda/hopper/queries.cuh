// The query rows of a key head in shared memory, and their logsumexp.

#pragma once

#include "csrc/cuda/hopper/scores.cuh"

namespace claa::cuda::hopper {

// One thread calls `load` when no thread uses the queries before; all who multiply then wait.
template <int kDim, int kRows>
struct Queries {
  char* rows;
  Barrier* full;
  int bg = -1;         // whose they are, or will be
  uint32_t phase = 0;  // of the last load that was begun; the first is the producer's

  // Has TMA bring the rows of a range's key head.
  __device__ __forceinline__ void load(const ScoreParams& p, const CUtensorMap& map,
                                       const KeyRange& range) const {
    full->arrive_and_expect_tx(p.query_rows() * kDim * 2);
    load_queries<kDim, kRows>(p.attention(), map, rows, *full, range.b, range.g * p.group, 0);
  }
  __device__ __forceinline__ void wait() const { full->wait(phase); }

  // Padding rows are zero: TMA writes only the rows of the group. By the threads that multiply.
  __device__ __forceinline__ void clear_padding_rows(const ScoreParams& p, int thread) const {
#pragma unroll 1
    for (int i = p.query_rows() * 8 + thread; i < kRows * 8; i += kScoreConsumers) {
#pragma unroll
      for (int panel = 0; panel < kDim / kPanelItems; ++panel)
        reinterpret_cast<uint4*>(rows + panel * kRows * kRowBytes)[i] = {};
    }
    cutlass::arch::fence_view_async_shared();  // wgmma reads through another proxy
  }
};

// The negative logsumexp of a query row, -infinity of a padding row.
__device__ __forceinline__ float minus_lse_of(const WindowAttention& a, const KeyRange& range,
                                              int row) {
  return -normalizer_of_lse<FastExp>(a, range.b, range.g, QueryRow(a, row)).x;
}
__device__ __forceinline__ float minus_lse_of(const WindowAttention& a, const KeyRange& range,
                                              int row, const SoftmaxPartial& partial) {
  return -normalizer_of_partial<FastExp>(a, range.g, QueryRow(a, row), partial).x;
}

// The first key that is not left padding.
__device__ __forceinline__ int first_valid_key(const WindowAttention& a, const KeyRange& range) {
  return Visibility::near(a.start.data ? a.start[range.b] : 0);
}

}  // namespace claa::cuda::hopper
