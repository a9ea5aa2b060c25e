// rank_variance: how much the ranks of the important tokens move between layers.
//
// One stable radix sort (CUB's) ranks the tokens of all (layer, prompt) rows: a key has the row
// above the order of the score, so the rows come out one after the other. Then blocks of tokens
// are summed, and the blocks of a prompt: integers, and sums of doubles in a fixed order.

#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "csrc/cuda/common.cuh"

namespace claa::cuda {
namespace {

constexpr int kThreads = 256;

// Over tokens in some layer's top k: the sum of their variances, and how many they are.
struct Sum {
  double variances;
  int64_t tokens;
};

// The blocks of a row of tokens.
__host__ __device__ int64_t row_blocks(const RankVarianceParams& p) {
  return ceil_div(p.context, kThreads);
}

// Workspace: keys and positions, twice each for the sort; the blocks' sums; CUB's own.
struct Workspace {
  cub::DoubleBuffer<uint64_t> keys;
  cub::DoubleBuffer<uint32_t> positions;
  Sum* sums;
  void* sort_storage;
  size_t sort_bytes = 0;
  int64_t bytes;

  explicit Workspace(const RankVarianceParams& p) {
    const int64_t n = round_up(p.layers * p.batch * p.context, 64);
    const int64_t n_sums = round_up(p.batch * row_blocks(p), 16);
    auto* first_keys = static_cast<uint64_t*>(p.workspace);
    auto* first_positions = reinterpret_cast<uint32_t*>(first_keys + 2 * n);
    keys = {first_keys, first_keys + n};
    positions = {first_positions, first_positions + n};
    sums = reinterpret_cast<Sum*>(first_positions + 2 * n);
    sort_storage = sums + n_sums;
    sort(p, nullptr, nullptr);
    bytes = 2 * n * int64_t(sizeof(uint64_t) + sizeof(uint32_t)) + n_sums * int64_t(sizeof(Sum)) +
            int64_t(sort_bytes);
  }

  // With `storage` nullptr only sets sort_bytes.
  cudaError_t sort(const RankVarianceParams& p, void* storage, cudaStream_t stream) {
    const int64_t rows = p.layers * p.batch;
    return cub::DeviceRadixSort::SortPairs(storage, sort_bytes, keys, positions, rows * p.context,
                                           0, 32 + std::bit_width(uint64_t(rows - 1)), stream);
  }
};

// A thread's token of a row.
struct RowToken {
  int64_t row, token;

  __device__ explicit RowToken(const RankVarianceParams& p) {
    const uint32_t blocks = uint32_t(row_blocks(p));
    row = blockIdx.x / blocks;
    token = int64_t(blockIdx.x % blocks) * kThreads + threadIdx.x;
  }
};

__global__ void encode_kernel(const RankVarianceParams p, uint64_t* keys, uint32_t* positions) {
  const auto [row, j] = RowToken(p);
  if (j >= p.context) return;
  const int64_t layer = uint32_t(row) / uint32_t(p.batch), b = row - layer * p.batch;
  const float score = p.scores[layer * p.scores_stride_l + b * p.scores_stride_b + j];
  keys[row * p.context + j] = uint64_t(row) << 32 | uint32_t(~order_of(score));  // the best first
  positions[row * p.context + j] = uint32_t(j);
}

__global__ void rank_kernel(const RankVarianceParams p, const uint32_t* positions,
                            uint32_t* ranks) {
  const auto [row, i] = RowToken(p);
  if (i < p.context) ranks[row * p.context + positions[row * p.context + i]] = uint32_t(i + 1);
}

// The sum over the threads of a block, for its first thread. The order of a double sum shows in its
// last bits, so the tree is ours and fixed, not cub::BlockReduce's.
__device__ Sum sum_of_block(Sum mine) {
  __shared__ Sum sums[kThreads];
  sums[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      sums[threadIdx.x].variances += sums[threadIdx.x + half].variances;
      sums[threadIdx.x].tokens += sums[threadIdx.x + half].tokens;
    }
  }
  return sums[threadIdx.x];
}

__global__ void variance_kernel(const RankVarianceParams p, const uint32_t* ranks, Sum* sums) {
  const auto [b, j] = RowToken(p);
  Sum mine{0, 0};
  if (j < p.context) {
    int64_t sum = 0, squares = 0;
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      const int64_t rank = ranks[(layer * p.batch + b) * p.context + j];
      sum += rank;
      squares += rank * rank;
      mine.tokens |= rank <= p.k;
    }
    if (mine.tokens)
      mine.variances = double(p.layers * squares - sum * sum) / double(p.layers * p.layers);
  }
  const Sum of_block = sum_of_block(mine);
  if (threadIdx.x == 0) sums[blockIdx.x] = of_block;
}

__global__ void mean_kernel(const RankVarianceParams p, const Sum* sums) {
  Sum mine{0, 0};
  for (int64_t i = threadIdx.x; i < row_blocks(p); i += kThreads) {
    const Sum& of_block = sums[blockIdx.x * row_blocks(p) + i];
    mine.variances += of_block.variances;
    mine.tokens += of_block.tokens;
  }
  const Sum all = sum_of_block(mine);
  if (threadIdx.x == 0)
    p.out[blockIdx.x] = float(all.variances / double(max<int64_t>(all.tokens, 1)));
}

}  // namespace

int64_t workspace_bytes(const RankVarianceParams& p) { return Workspace(p).bytes; }

cudaError_t run(const RankVarianceParams& p, cudaStream_t stream) {
  Workspace w(p);
  const auto blocks = unsigned(p.layers * p.batch * row_blocks(p));
  encode_kernel<<<blocks, kThreads, 0, stream>>>(p, w.keys.Current(), w.positions.Current());
  const cudaError_t status = w.sort(p, w.sort_storage, stream);
  if (status != cudaSuccess) return status;
  uint32_t* ranks = w.positions.Alternate();
  rank_kernel<<<blocks, kThreads, 0, stream>>>(p, w.positions.Current(), ranks);
  variance_kernel<<<unsigned(p.batch * row_blocks(p)), kThreads, 0, stream>>>(p, ranks, w.sums);
  mean_kernel<<<unsigned(p.batch), kThreads, 0, stream>>>(p, w.sums);
  return launched();
}

}  // namespace claa::cuda
