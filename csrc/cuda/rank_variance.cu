// rank_variance: how much the ranks of the important tokens move between layers.
//
// CUB's stable segmented radix sort ranks all (layer, prompt) rows at once; one block per prompt
// then goes over its tokens. The sums are of integers and, per thread and then over threads, in a
// fixed order.

#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cub/device/device_segmented_radix_sort.cuh>

#include "csrc/cuda/common.cuh"

namespace claa::cuda {
namespace {

constexpr int kThreads = 256;

// Workspace: keys and positions before and after the sort, ranks, CUB's own.
struct Workspace {
  uint32_t *keys, *sorted_keys, *positions, *sorted_positions, *ranks;
  void* sort;
  size_t sort_bytes;
  int64_t bytes;

  explicit Workspace(const RankVarianceParams& p) {
    const int64_t n = round_up(p.layers * p.batch * p.context, 64);
    keys = static_cast<uint32_t*>(p.workspace);
    sorted_keys = keys + n;
    positions = sorted_keys + n;
    sorted_positions = positions + n;
    ranks = sorted_positions + n;
    sort = ranks + n;
    sort_bytes = 0;
    sort_rows(p, nullptr, nullptr);
    bytes = 5 * n * int64_t(sizeof(uint32_t)) + int64_t(sort_bytes);
  }

  struct RowBegin {
    int64_t context;
    __host__ __device__ int64_t operator()(int64_t row) const { return row * context; }
  };

  // With `storage` nullptr only sets sort_bytes.
  cudaError_t sort_rows(const RankVarianceParams& p, void* storage, cudaStream_t stream) {
    const auto begins = thrust::make_transform_iterator(thrust::make_counting_iterator<int64_t>(0),
                                                        RowBegin{p.context});
    return cub::DeviceSegmentedRadixSort::SortPairsDescending(
        storage, sort_bytes, keys, sorted_keys, positions, sorted_positions,
        p.layers * p.batch * p.context, p.layers * p.batch, begins, begins + 1, 0, 32, stream);
  }
};

__global__ void encode_kernel(const RankVarianceParams p, uint32_t* keys, uint32_t* positions) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.layers * p.batch * p.context) return;
  const int64_t row = i / p.context, j = i % p.context;
  const float* scores =
      p.scores + row / p.batch * p.scores_stride_l + row % p.batch * p.scores_stride_b;
  keys[i] = order_of(scores[j]);
  positions[i] = uint32_t(j);
}

__global__ void rank_kernel(const RankVarianceParams p, const uint32_t* sorted_positions,
                            uint32_t* ranks) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.layers * p.batch * p.context) return;
  ranks[i / p.context * p.context + sorted_positions[i]] = uint32_t(i % p.context + 1);
}

__global__ void variance_kernel(const RankVarianceParams p, const uint32_t* ranks) {
  __shared__ double totals[kThreads];
  __shared__ int64_t counts[kThreads];
  const int64_t b = blockIdx.x;
  double total = 0;
  int64_t count = 0;
  for (int64_t j = threadIdx.x; j < p.context; j += kThreads) {
    int64_t sum = 0, squares = 0;
    bool is_important = false;
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      const int64_t rank = ranks[(layer * p.batch + b) * p.context + j];
      sum += rank;
      squares += rank * rank;
      is_important |= rank <= p.k;
    }
    if (!is_important) continue;
    ++count;
    total += double(p.layers * squares - sum * sum) / double(p.layers * p.layers);
  }
  totals[threadIdx.x] = total;
  counts[threadIdx.x] = count;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      totals[threadIdx.x] += totals[threadIdx.x + half];
      counts[threadIdx.x] += counts[threadIdx.x + half];
    }
  }
  if (threadIdx.x == 0) p.out[b] = counts[0] ? float(totals[0] / double(counts[0])) : 0.f;
}

}  // namespace

int64_t workspace_bytes(const RankVarianceParams& p) { return Workspace(p).bytes; }

cudaError_t run(const RankVarianceParams& p, cudaStream_t stream) {
  Workspace workspace(p);
  const int64_t blocks = ceil_div(p.layers * p.batch * p.context, kThreads);
  encode_kernel<<<blocks, kThreads, 0, stream>>>(p, workspace.keys, workspace.positions);
  const cudaError_t status = workspace.sort_rows(p, workspace.sort, stream);
  if (status != cudaSuccess) return status;
  rank_kernel<<<blocks, kThreads, 0, stream>>>(p, workspace.sorted_positions, workspace.ranks);
  variance_kernel<<<p.batch, kThreads, 0, stream>>>(p, workspace.ranks);
  return launched();
}

}  // namespace claa::cuda
