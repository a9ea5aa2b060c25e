// hop_tokens: scores of the tokens that a chain of facts leads to, hop by hop.
//
// Memory bound: the states are read once for their mean and once for each hop; a pass of 1024
// bfloat16 channels over 128k tokens is 268 MB. The first part takes two launches, a hop four:
//
// | launch        | reads                  | writes |
// |---------------|------------------------|--------|
// | sum_kernel    | states                 | the sum of each tile of tokens |
// | mean_kernel   | sums of tiles          | the mean state, how many seeds each hop has |
// | select_topk   | scores, or the hop's   | positions of the seeds |
// | seed_kernel   | states of the seeds    | the same in the order of the tensor cores, their lengths |
// | link kernels  | states                 | exp((cosine - 1) / temperature) of each seed and token, one over their sums |
// | score_kernel  | these                  | the largest link of each token, pooled |
//
// A cosine is at most 1, so no maximum has to be known before the exponentials. Products are those
// of the states as they are, which tensor cores multiply exactly; the mean comes off after that:
//   (s - m)(x - m) = s x - m (x - m) - m s
// The error of a cosine is that of a product times |s| |x| / (|s - m| |x - m|). The first hop
// measures m (x - m) and the length of x - m of each token while it has it. Without tensor cores
// (float32, rows that are not aligned) the mean comes off first.
//
// Tiles are counted from the last token, and every sum goes from tile to tile in that order: a row
// alone has the same bits as in a batch, with left padding or without.

#include "csrc/cuda/hop_tokens_links.cuh"

namespace claa::cuda {
namespace {

using namespace hop_tokens;

constexpr int kColumns = 32;   // vectors of channels that a block of sum_kernel adds
constexpr int kMeanRows = 32;  // threads that share the tiles of one channel
constexpr int kSeedThreads = 128;
constexpr int kScoreThreads = 512, kScored = 52;  // of a block of score_kernel, and its tokens

// ---------------------------------------------------------------------------------- mean

// kVector channels of a state: 16 bytes, or the bits of a float.
template <class T, int kVector>
struct Channels {
  uint4 words;

  __device__ void load_if(bool exists, const T* from) {
    if constexpr (kVector == 1)
      words.x = exists ? __float_as_uint(to_float(*from)) : 0;
    else
      words = load_streaming_if(exists, from);
  }
  __device__ void add_to(float (&sum)[kVector]) const {
    if constexpr (kVector == 1) {
      sum[0] += __uint_as_float(words.x);
    } else {
      T item[kVector];
      memcpy(item, &words, sizeof(words));
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] += to_float(item[i]);
    }
  }
};

// Block: a tile of a row, and kColumns vectors of channels. Lane i of a column has every kLanes-th
// token from the last but i on: the same ones whatever kVector is.
template <class T, int kVector>
__global__ __launch_bounds__(kThreads) void sum_kernel(const HopTokensParams p, const Buffers w) {
  constexpr int kLanes = kThreads / kColumns, kAtOnce = kTile / kLanes;
  __shared__ float parts[kThreads * kVector];
  wait_for_kernels_ahead();
  const int64_t b = blockIdx.x / uint32_t(w.tiles), tile = blockIdx.x - b * w.tiles;
  const int end = int(p.context - tile * kTile);
  const int begin = max(end - kTile, int(min(p.first_valid(b), int64_t(end))));
  const int column = threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  const int vector = int(blockIdx.y) * kColumns + column, per_piece = int(p.dim) / kVector;
  const bool exists = vector < int(p.pieces) * per_piece;
  const T* states = static_cast<const T*>(p.states) + b * p.states_stride_b +
                    vector / per_piece * p.states_stride_g + vector % per_piece * kVector;
  Channels<T, kVector> x[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int j = end - 1 - (lane + i * kLanes);
    x[i].load_if(exists && j >= begin, states + j * p.states_stride_n);
  }
  float sum[kVector] = {};
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) x[i].add_to(sum);
#pragma unroll
  for (int i = 0; i < kVector; ++i) parts[i * kThreads + threadIdx.x] = sum[i];
  const int j = end - 1 - int(threadIdx.x);
  if (blockIdx.y == 0 && threadIdx.x < kTile && j >= 0) w.was_seed[b * p.context + j] = 0;
  __syncthreads();
  if (lane > 0 || !exists) return;
  float* out = w.sums + (b * w.tiles + tile) * p.channels() + vector * kVector;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    float total = 0.f;
#pragma unroll
    for (int l = 0; l < kLanes; ++l) total += parts[i * kThreads + l * kColumns + column];
    out[i] = total;
  }
}

// Block: kWarp channels of a row.
__global__ __launch_bounds__(kWarp* kMeanRows) void mean_kernel(const HopTokensParams p,
                                                                const Buffers w) {
  __shared__ float parts[kMeanRows][kWarp];
  wait_for_kernels_ahead();
  const uint32_t blocks = uint32_t(ceil_div(p.channels(), kWarp));
  const int64_t b = blockIdx.x / blocks;
  const int64_t channel = blockIdx.x % blocks * kWarp + threadIdx.x % kWarp;
  const int part = threadIdx.x / kWarp;
  const int64_t tokens = p.context - p.first_valid(b);
  const int tiles = int(ceil_div(tokens, kTile));
  float sum = 0.f;
  if (channel < p.channels()) {
    const float* sums = w.sums + b * w.tiles * p.channels() + channel;
#pragma unroll 8
    for (int tile = part; tile < tiles; tile += kMeanRows) sum += sums[tile * p.channels()];
  }
  parts[part][threadIdx.x % kWarp] = sum;
  if (blockIdx.x % blocks == 0)
    for (int64_t hop = threadIdx.x; hop < p.hops; hop += blockDim.x)
      w.counts[hop * p.batch + b] = int32_t(p.seeds_of(hop, tokens));
  __syncthreads();
  if (part > 0 || channel >= p.channels()) return;
  float total = 0.f;
  for (int i = 0; i < kMeanRows; ++i) total += parts[i][threadIdx.x];
  w.mean[b * p.channels() + channel] = total / float(max(tokens, int64_t(1)));
}

// ---------------------------------------------------------------------------------- seeds

// The sum over the threads of a block, for all of them.
__device__ float sum_of_block(float mine, float* parts) {
  __syncthreads();
  parts[threadIdx.x] = mine;
  for (int half = kSeedThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  __syncthreads();
  return parts[0];
}

// How the seeds are laid out for the link kernel: not at all, as A fragments of its slices
// (product.cuh), or as tiles of 64 seeds (hopper/wgmma.cuh).
enum class Form { none, slices, panels };

// Where octet i of a seed goes.
template <Form kForm>
__device__ void store_octet(uint4* group, int in_group, int i, const uint4& octet) {
  if constexpr (kForm == Form::panels) {
    group[i / 8 * kPanelWords + in_group * 8 + (i % 8 ^ in_group % 8)] = octet;
  } else {
    const int lane = in_group % 8 * 4 + i % 4, is_lower = in_group / 8 % 2;
    auto* to = reinterpret_cast<uint32_t*>(group + i / 4 * kSliceWords + in_group / 16 * 2 * kWarp +
                                           lane) +
               is_lower;
    to[0] = octet.x;
    to[2] = octet.y;
    to[4 * kWarp] = octet.z;
    to[4 * kWarp + 2] = octet.w;
  }
}

// Block: a seed.
template <class T, Form kForm>
__global__ __launch_bounds__(kSeedThreads) void seed_kernel(const HopTokensParams p,
                                                            const Buffers w) {
  __shared__ float parts[kSeedThreads];
  wait_for_kernels_ahead();
  const int64_t b = blockIdx.x / uint32_t(w.seeds);
  const int s = blockIdx.x % uint32_t(w.seeds), in_group = s % kGroup;
  const int position = s < p.num_seeds ? w.best[b * p.num_seeds + s] : -1;
  const T* state = static_cast<const T*>(p.states) + b * p.states_stride_b +
                   max(position, 0) * p.states_stride_n;
  const float* mean = w.mean + b * p.channels();
  float square = 0.f, dot = 0.f;
  if constexpr (kForm != Form::none) {
    constexpr int kOctets = (kForm == Form::panels ? kPanelChannels : kSlice) / 8;
    const int per_piece = int(ceil_div(p.dim, kOctets * 8)) * kOctets;
    const int octets = int(kForm == Form::panels ? w.panels : w.slices) * kOctets;
    uint4* group = w.panel + (b * w.groups + s / kGroup) * octets * kGroup;
    for (int i = threadIdx.x; i < octets; i += kSeedThreads) {
      const int piece = i / per_piece, d = i % per_piece * 8;
      uint4 octet{};
      if (position >= 0 && piece < p.pieces && d < p.dim) {
        octet = *reinterpret_cast<const uint4*>(state + piece * p.states_stride_g + d);
        float x[8];
        unpack<T>(octet, x);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float m = mean[piece * p.dim + d + j];
          square += (x[j] - m) * (x[j] - m);
          dot += m * x[j];
        }
      }
      store_octet<kForm>(group, in_group, i, octet);
    }
  } else if (position >= 0) {
    for (int i = threadIdx.x; i < p.channels(); i += kSeedThreads) {
      const int dim = int(p.dim), piece = i / dim;
      const float x = to_float(state[piece * p.states_stride_g + i - piece * dim]) - mean[i];
      square += x * x;
    }
  }
  square = sum_of_block(square, parts);
  dot = sum_of_block(dot, parts);
  if (threadIdx.x > 0) return;
  w.seed[b * w.seeds + s] = {position, dot, square == 0.f ? 0.f : 1.f / sqrtf(square)};
  if (position >= 0) w.was_seed[b * p.context + position] = 1;
  if (in_group == 0) w.tickets[b * w.groups + s / kGroup] = 0;
}

// ---------------------------------------------------------------------------------- scores

// Block: kScored tokens of a row. The best links are found for a chunk of tokens at a time, and
// added to the pools that they belong to.
__global__ __launch_bounds__(kScoreThreads) void score_kernel(const HopTokensParams p,
                                                              const Buffers w) {
  constexpr int kParts = 32, kQuads = kScoreThreads / kParts, kChunk = 4 * kQuads;
  constexpr int kEach = kGroup / kParts;  // seeds whose links a thread loads at once
  __shared__ __align__(16) float parts[kParts][kChunk];
  wait_for_kernels_ahead();
  const uint32_t blocks = uint32_t(ceil_div(p.context, kScored));
  const int64_t b = blockIdx.x / blocks;
  const int begin = int(blockIdx.x % blocks) * kScored, j = begin + int(threadIdx.x);
  const int end = int(min(int64_t(begin + kScored), p.context));
  const int first = int(p.first_valid(b)), padding = w.padding(p);
  const int half = int(min(p.kernel_size / 2, p.context));
  const int from = max(j - half, first), to = min(j + half + 1, int(p.context));
  const int quad = threadIdx.x % kQuads, part = threadIdx.x / kQuads;
  float pooled = 0.f;
  const int last = end > first ? min(end + half, int(p.context)) : 0;
  for (int chunk = (max(begin - half, first) + padding) / 4 * 4; chunk < last + padding;
       chunk += kChunk) {
    const int column = chunk + quad * 4;
    float best[4] = {};
    for (int64_t s = part; s < w.seeds && column < last + padding; s += kGroup) {
      float4 link[kEach];
      float factor[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t seed = b * w.seeds + s + i * kParts;
        link[i] = *reinterpret_cast<const float4*>(w.links + seed * w.width + column);
        factor[i] = w.factors[seed];
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float of_token[4] = {link[i].x, link[i].y, link[i].z, link[i].w};
#pragma unroll
        for (int t = 0; t < 4; ++t)
          best[t] = max_or_nan(best[t], of_token[t] == 0.f ? 0.f : of_token[t] * factor[i]);
      }
    }
    __syncthreads();
    *reinterpret_cast<float4*>(parts[part] + quad * 4) =
        make_float4(best[0], best[1], best[2], best[3]);
    __syncthreads();
    if (threadIdx.x < kChunk) {
      float largest = parts[0][threadIdx.x];
#pragma unroll
      for (int i = 1; i < kParts; ++i) largest = max_or_nan(largest, parts[i][threadIdx.x]);
      parts[0][threadIdx.x] = largest;
    }
    __syncthreads();
    if (j >= end) continue;
    const int offset = padding - chunk;  // of a token in the chunk
    for (int i = max(from + offset, 0); i < min(to + offset, kChunk); ++i) {
      const float link = parts[0][i];
      pooled = p.pool_mode == PoolMode::max ? max_or_nan(pooled, link) : pooled + link;
    }
  }
  if (j >= end) return;
  if (p.pool_mode == PoolMode::avg) pooled /= float(p.kernel_size);
  if (j < first) pooled = 0.f;
  p.out[(b * p.hops + p.part) * p.context + j] = pooled;
  w.rank[b * p.context + j] = w.was_seed[b * p.context + j] ? -1.f : pooled;
}

// ---------------------------------------------------------------------------------- launches

// A launch with dynamic shared memory that overlaps the kernel ahead.
template <class... Params>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int64_t shared_bytes,
                   cudaStream_t stream, std::type_identity_t<Params>... params) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[1];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  let_overlap(config);
  return cudaLaunchKernelEx(&config, kernel, params...);
}

template <class T, int kVector>
cudaError_t sum_states(const HopTokensParams& p, const Buffers& w, cudaStream_t stream) {
  const int64_t vectors = p.channels() / kVector;
  const dim3 blocks(unsigned(p.batch * w.tiles), unsigned(ceil_div(vectors, kColumns)));
  return launch_overlapping(sum_kernel<T, kVector>, blocks, kThreads, stream, p, w);
}

template <class T>
cudaError_t find_mean(const HopTokensParams& p, const Buffers& w, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool is_aligned =
      p.dim % kVector == 0 && uint64_t(p.states) % 16 == 0 &&
      (p.states_stride_b | p.states_stride_g | p.states_stride_n) % kVector == 0;
  const cudaError_t status =
      is_aligned ? sum_states<T, kVector>(p, w, stream) : sum_states<T, 1>(p, w, stream);
  if (status != cudaSuccess) return status;
  const int64_t blocks = p.batch * ceil_div(p.channels(), kWarp);
  return launch_overlapping(mean_kernel, dim3(unsigned(blocks)), kWarp * kMeanRows, stream, p, w);
}

template <class T, bool kFirstHop>
cudaError_t find_links(const HopTokensParams& p, const Buffers& w, cudaStream_t stream) {
  const int64_t rows = p.batch * w.groups;
  if (w.on_hopper) return hopper::find_links(p, w, stream);
  if constexpr (sizeof(T) == 2) {
    if (w.on_tensor_cores) {
      const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
      const int64_t blocks = min(ceil_div(multiprocessors, rows), w.tiles);
      const bool resident = fits(shared_bytes(w.slices, true));
      return launch(resident ? link_kernel<T, kFirstHop, true> : link_kernel<T, kFirstHop, false>,
                    rows * blocks, shared_bytes(w.slices, resident), stream, p, w, int(blocks));
    }
  }
  return launch(plain_link_kernel<T, kFirstHop>, rows * w.tiles, 0, stream, p, w);
}

template <class T>
cudaError_t find_seeds(const HopTokensParams& p, const Buffers& w, cudaStream_t stream) {
  auto kernel = seed_kernel<T, Form::none>;
  if constexpr (sizeof(T) == 2) {
    if (w.on_hopper)
      kernel = seed_kernel<T, Form::panels>;
    else if (w.on_tensor_cores)
      kernel = seed_kernel<T, Form::slices>;
  }
  return launch_overlapping(kernel, dim3(unsigned(p.batch * w.seeds)), kSeedThreads, stream, p, w);
}

template <class T>
cudaError_t hop(const HopTokensParams& p, const Buffers& w, cudaStream_t stream) {
  cudaError_t status = run(selection(p, w), stream);
  if (status == cudaSuccess) status = find_seeds<T>(p, w, stream);
  if (status == cudaSuccess)
    status = p.part == 0 ? find_links<T, true>(p, w, stream) : find_links<T, false>(p, w, stream);
  if (status != cudaSuccess) return status;
  const dim3 blocks(unsigned(p.batch * ceil_div(p.context, kScored)));
  return launch_overlapping(score_kernel, blocks, kScoreThreads, stream, p, w);
}

}  // namespace

int64_t workspace_bytes(const HopTokensParams& p) { return Buffers(p).bytes; }

cudaError_t run(const HopTokensParams& p, cudaStream_t stream) {
  const Buffers w(p);
  return with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    return p.part == HopTokensParams::kMean ? find_mean<T>(p, w, stream) : hop<T>(p, w, stream);
  });
}

}  // namespace claa::cuda
