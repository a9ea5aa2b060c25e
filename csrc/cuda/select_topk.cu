// select_topk: positions of the k best scores, ascending.
//
// Latency bound: a row is read once from memory. A cluster of up to kMaxCluster blocks shares a
// row; each block holds its part in shared memory as integers that grow with the score. Three
// histograms (11, 11, 10 bits), summed over the cluster through distributed shared memory, give
// the threshold and how many of the scores equal to it are wanted. Then every warp counts its own
// contiguous tokens, prefix sums over warps and blocks tell where each warp writes, and ballots
// write in token order: the output ascends without a sort, and a tie goes to the lower position.
// Counts are integers, so nothing depends on the order of atomics.
//
// Rows too long for the cluster's shared memory are read again in every pass. Without clusters
// (before sm_90) one block has a row to itself.

#include "csrc/cuda/cluster.cuh"
#include "csrc/cuda/common.cuh"

namespace claa::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBins = 2048;
constexpr int kMaxCluster = 8;
constexpr int64_t kTokensPerBlock = 8192;  // below, another block costs more than it helps

struct Shared {
  uint32_t bins[kBins];
  uint32_t warp_sums[2][kWarps];
  uint32_t block_sums[2];  // scores above and at the threshold
  uint32_t digit, rank;
};

// Inclusive sum over the block in thread order.
__device__ uint32_t block_prefix_sum(uint32_t value, uint32_t* warp_sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFullMask, value, step);
    if (lane >= step) value += other;
  }
  if (lane == kWarp - 1) warp_sums[warp] = value;
  __syncthreads();
  if (warp == 0) {
    uint32_t sum = warp_sums[lane];
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t other = __shfl_up_sync(kFullMask, sum, step);
      if (lane >= step) sum += other;
    }
    warp_sums[lane] = sum;
  }
  __syncthreads();
  return warp > 0 ? value + warp_sums[warp - 1] : value;
}

// Counts the digit (order >> shift) & mask of the tokens whose higher bits are `prefix`.
template <class Order>
__device__ void count_digits(Shared& shared, int n, int shift, uint32_t mask, uint32_t prefix,
                             int prefix_shift, Order order) {
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.bins[bin] = 0;
  __syncthreads();
#pragma unroll 4
  for (int i = threadIdx.x; i < (n + kWarp - 1) / kWarp * kWarp; i += kThreads) {
    const uint32_t value = i < n ? order(i) : 0;
    const bool counts = i < n && (prefix_shift == 32 || value >> prefix_shift == prefix);
    const uint32_t digit = value >> shift & mask;
    // Scores often agree in their high bits: a warp whose digits are all the same adds them at
    // once, where one atomic after the other on one address would take 32 turns.
    const unsigned counting = __ballot_sync(kFullMask, counts);
    if (!counting) continue;
    const uint32_t first = __shfl_sync(kFullMask, digit, __ffs(counting) - 1);
    if (__all_sync(kFullMask, !counts || digit == first)) {
      if (threadIdx.x % kWarp == 0) atomicAdd(&shared.bins[first], __popc(counting));
    } else if (counts) {
      atomicAdd(&shared.bins[digit], 1u);
    }
  }
}

// The digit of the wanted-th largest over the cluster; `wanted` becomes its rank within the digit.
template <bool kCluster>
__device__ uint32_t find_digit(Shared& shared, uint32_t& wanted) {
  const auto sum_bin = [&](int bin) {
    uint32_t sum = 0;
    for (unsigned rank = 0; rank < cluster_size<kCluster>(); ++rank)
      sum += shared_of<kCluster>(shared.bins, rank)[bin];
    return sum;
  };
  cluster_sync<kCluster>();
  // Thread 0 has the highest two digits.
  const int high = kBins - 1 - 2 * int(threadIdx.x);
  const uint32_t high_count = sum_bin(high), low_count = sum_bin(high - 1);
  const uint32_t through = block_prefix_sum(high_count + low_count, shared.warp_sums[0]);
  const uint32_t before = through - high_count - low_count;
  if (before < wanted && wanted <= through) {
    const bool in_high = wanted <= before + high_count;
    shared.digit = in_high ? high : high - 1;
    shared.rank = wanted - before - (in_high ? 0 : high_count);
  }
  cluster_sync<kCluster>();  // nobody clears its bins while another reads them
  wanted = shared.rank;
  return shared.digit;
}

template <class Index, bool kCluster, bool kResident>
__global__ __launch_bounds__(kThreads) void select_kernel(const SelectTopkParams p) {
  extern __shared__ uint32_t resident[];
  __shared__ Shared shared;
  const unsigned rank = cluster_rank<kCluster>(), blocks = cluster_size<kCluster>();
  const int64_t row = blockIdx.x / blocks, b = row / p.inner;
  const float* scores = p.scores + b * p.scores_stride_b + row % p.inner * p.scores_stride_inner;
  Index* out = static_cast<Index*>(p.out) + row * p.k;

  const auto [n_window, n_sinks, n_scored, n_padding, first_valid, first] = p.tiers(b);
  const int64_t candidates = p.context - first;

  const int64_t thread = int64_t(rank) * kThreads + threadIdx.x,
                threads = int64_t(blocks) * kThreads;
  for (int64_t i = thread; i < n_padding; i += threads) out[i] = Index(i);
  out += n_padding;
  for (int64_t i = thread; i < n_sinks; i += threads) out[i] = Index(first_valid + i);
  out += n_sinks;
  for (int64_t i = thread; i < n_window; i += threads)
    out[n_scored + i] = Index(p.context + p.window - n_window + i);
  if (n_scored == candidates) {
    for (int64_t i = thread; i < candidates; i += threads) out[i] = Index(first + i);
    return;  // the whole cluster
  }
  if (n_scored == 0) return;

  // This block's tokens, and of these each warp's: contiguous.
  const int64_t per_warp = round_up(ceil_div(candidates, int64_t(blocks) * kWarps), kWarp);
  const int64_t begin = min(int64_t(rank) * kWarps * per_warp, candidates);
  const int n = int(min(kWarps * per_warp, candidates - begin));
  scores += first + begin;
  if constexpr (kResident) {
#pragma unroll 8
    for (int i = threadIdx.x; i < n; i += kThreads) resident[i] = order_of(scores[i]);
  }
  const auto order = [&](int i) {
    if constexpr (kResident) return resident[i];
    return order_of(scores[i]);
  };

  uint32_t wanted = uint32_t(n_scored);
  count_digits(shared, n, 21, 2047, 0, 32, order);
  uint32_t prefix = find_digit<kCluster>(shared, wanted);
  count_digits(shared, n, 10, 2047, prefix, 21, order);
  prefix = prefix << 11 | find_digit<kCluster>(shared, wanted);
  count_digits(shared, n, 0, 1023, prefix, 10, order);
  const uint32_t threshold = prefix << 10 | find_digit<kCluster>(shared, wanted);
  const uint32_t ties = wanted;  // of the scores equal to the threshold, the first so many

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_begin = int(min(warp * per_warp, int64_t(n)));
  const int warp_end = int(min(warp_begin + per_warp, int64_t(n)));
  uint32_t above = 0, equal = 0;
#pragma unroll 4
  for (int i = warp_begin + lane; i < warp_end; i += kWarp) {
    const uint32_t value = order(i);
    above += value > threshold;
    equal += value == threshold;
  }
  above = __reduce_add_sync(kFullMask, above);
  equal = __reduce_add_sync(kFullMask, equal);
  if (lane == 0) {
    shared.warp_sums[0][warp] = above;
    shared.warp_sums[1][warp] = equal;
  }
  __syncthreads();
  // What comes before this warp: in its block, then in the blocks before.
  above = __reduce_add_sync(kFullMask, lane < warp ? shared.warp_sums[0][lane] : 0u);
  equal = __reduce_add_sync(kFullMask, lane < warp ? shared.warp_sums[1][lane] : 0u);
  if constexpr (kCluster) {
    if (warp < 2) {
      const uint32_t sum = __reduce_add_sync(kFullMask, shared.warp_sums[warp][lane]);
      if (lane == 0) shared.block_sums[warp] = sum;
    }
    cluster_sync<kCluster>();
    for (unsigned other = 0; other < rank; ++other) {
      const uint32_t* sums = shared_of<kCluster>(shared.block_sums, other);
      above += sums[0];
      equal += sums[1];
    }
    cluster_sync<kCluster>();  // a block's shared memory lives until all have read it
  }
  const unsigned lanes_before = (1u << lane) - 1;
  for (int i = warp_begin; i < warp_end; i += kWarp) {
    const bool exists = i + lane < warp_end;
    const uint32_t value = exists ? order(i + lane) : 0;
    const unsigned above_mask = __ballot_sync(kFullMask, exists && value > threshold);
    const unsigned equal_mask = __ballot_sync(kFullMask, exists && value == threshold);
    const uint32_t ties_before = equal + __popc(equal_mask & lanes_before);
    const bool is_kept =
        (above_mask >> lane & 1) || ((equal_mask >> lane & 1) && ties_before < ties);
    if (is_kept) {
      const uint32_t at = above + __popc(above_mask & lanes_before) + min(ties_before, ties);
      out[at] = Index(first + begin + i + lane);
    }
    above += __popc(above_mask);
    equal += __popc(equal_mask);
  }
}

template <class Index, bool kCluster, bool kResident>
cudaError_t launch(const SelectTopkParams& p, int blocks, int64_t shared_bytes,
                   cudaStream_t stream) {
  const auto kernel = select_kernel<Index, kCluster, kResident>;
  if (kResident) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(p.batch * p.inner * blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kResident ? shared_bytes : 0;
  config.stream = stream;
  cudaLaunchAttribute cluster[1];
  cluster[0].id = cudaLaunchAttributeClusterDimension;
  cluster[0].val.clusterDim = {unsigned(blocks), 1, 1};
  config.attrs = cluster;
  config.numAttrs = kCluster ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <class Index>
cudaError_t choose(const SelectTopkParams& p, cudaStream_t stream) {
  const bool has_clusters = device_attribute(cudaDevAttrClusterLaunch);
  int blocks = 1;
  while (has_clusters && blocks < kMaxCluster && blocks * kTokensPerBlock < p.context) blocks *= 2;
  const int64_t per_block = kWarps * round_up(ceil_div(p.context, int64_t(blocks) * kWarps), kWarp);
  const int64_t shared_bytes = per_block * int64_t(sizeof(uint32_t));
  const int64_t room =
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - int64_t(sizeof(Shared));
  const bool is_resident = shared_bytes <= room;
  if (blocks > 1)
    return is_resident ? launch<Index, true, true>(p, blocks, shared_bytes, stream)
                       : launch<Index, true, false>(p, blocks, shared_bytes, stream);
  return is_resident ? launch<Index, false, true>(p, blocks, shared_bytes, stream)
                     : launch<Index, false, false>(p, blocks, shared_bytes, stream);
}

}  // namespace

int64_t workspace_bytes(const SelectTopkParams&) { return 0; }

cudaError_t run(const SelectTopkParams& p, cudaStream_t stream) {
  return p.out_is_int32 ? choose<int32_t>(p, stream) : choose<int64_t>(p, stream);
}

}  // namespace claa::cuda
