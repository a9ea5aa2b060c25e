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
// | seed_kernel   | states of the seeds    | their directions, in the order of the tensor cores |
// | link kernels  | states                 | exp((cosine - 1) / temperature) of each seed and token, and one over the sum of each seed |
// | score_kernel  | these                  | the largest of each token, pooled |
//
// A cosine is at most 1, so no maximum has to be known before the exponentials. Products are those
// of the states as they are, which tensor cores multiply exactly; the mean comes off after that:
//   (s - m)(x - m) = s x - m (x - m) - m s
// The first hop measures m (x - m) and the length of x - m of each token while it has it. Without
// tensor cores (float32, rows that are not aligned) the mean comes off first.
//
// Tiles are counted from the last token, and every sum goes from tile to tile in that order: a row
// alone has the same bits as in a batch, with left padding or without.

#include <bit>

#include "csrc/cuda/overlap.cuh"
#include "csrc/cuda/product.cuh"

namespace claa::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTile = 128;                   // tokens
constexpr int kWarpTokens = kTile / kWarps;  // of a warp in the tensor core kernel
constexpr int kGroup = 64;                   // seeds that a block multiplies
constexpr int kSeedTiles = kGroup / 16;      // rows of one mma
constexpr int kSlice = 32;                   // channels that a lane's 16 bytes and its quad hold
constexpr int kSliceWords = kGroup * kSlice / 8;  // uint4 of a slice of the seeds
constexpr int kStepSlices = 2, kSteps = 4;  // loaded together, and how many such are in flight
constexpr int kChunkSlices = 4, kRing = 3;  // of seeds that do not fit in shared memory
constexpr int kSeedThreads = 128;
constexpr int kColumns = 32;   // vectors of channels that a block of sum_kernel adds, at most
constexpr int kMeanRows = 32;  // threads that share the tiles of one channel
constexpr int kScoreThreads = 512, kScored = 192;  // of a block of score_kernel, and its tokens

// A seed, for all blocks. Position -1: none.
struct Seed {
  int position;
  float dot, scale;  // m s, and one over the length of s - m
};

// What is kept in the workspace, from part to part.
struct Buffers {
  int64_t tiles, width, groups, seeds, slices;  // of a row; width: tokens, in whole tiles
  bool on_tensor_cores;
  float* sums;             // [batch, tiles, channels]
  float* mean;             // [batch, channels]
  float* token_dots;       // [batch, width]: m (x - m)
  float* token_scales;     // [batch, width]: one over the length of x - m
  float* links;            // [batch, seeds, width]
  float* link_sums;        // [batch, groups, tiles, kGroup]
  float* factors;          // [batch, seeds]
  float* rank;             // [batch, context]: what the next seeds are chosen by
  uint4* panel;            // [batch, groups, slices, kSliceWords]: the seeds, for tensor cores
  Seed* seed;              // [batch, seeds]
  int32_t* best;           // [batch, num_seeds]
  int32_t* counts;         // [hops, batch]
  uint32_t* tickets;       // [batch, groups]: blocks that have finished
  uint8_t* was_seed;       // [batch, context]
  char* select = nullptr;  // select_topk's own
  int64_t bytes;

  explicit Buffers(const HopTokensParams& p);

  // Tokens lie at the end of their tiles: token j is column j + padding().
  __device__ int padding(const HopTokensParams& p) const { return int(width - p.context); }
};

SelectTopkParams selection(const HopTokensParams& p, const Buffers& w) {
  const bool is_first = p.part <= 0;
  return {.scores = is_first ? p.scores : w.rank,
          .start = p.start,
          .counts = {w.counts + p.part * p.batch, true},
          .out = w.best,
          .workspace = w.select,
          .out_is_int32 = true,
          .batch = p.batch,
          .inner = 1,
          .context = p.context,
          .k = p.num_seeds,
          .window = 0,
          .num_sinks = 0,
          .scores_stride_b = is_first ? p.scores_stride_b : p.context,
          .scores_stride_inner = 0};
}

int64_t slices_of_piece(const HopTokensParams& p) { return ceil_div(p.dim, kSlice); }

// Shared memory of a block: the seeds, all of them or a ring of chunks, and the mean.
int64_t shared_bytes(int64_t slices, bool resident) {
  const int64_t kept = resident ? slices : kRing * kChunkSlices;
  return kept * kSliceWords * int64_t(sizeof(uint4)) + slices * kSlice * int64_t(sizeof(float));
}
bool fits(int64_t bytes) {
  constexpr int64_t kStatic = 8 << 10;
  return bytes + kStatic <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

Buffers::Buffers(const HopTokensParams& p) {
  tiles = ceil_div(p.context, kTile);
  width = tiles * kTile;
  groups = ceil_div(p.num_seeds, kGroup);
  seeds = groups * kGroup;
  slices = round_up(p.pieces * slices_of_piece(p), kStepSlices * kSteps);
  on_tensor_cores = rows_are_aligned(p.dtype, p.dim, p.states, p.states_stride_b, p.states_stride_g,
                                     p.states_stride_n) &&
                    fits(shared_bytes(slices, false));
  char* next = static_cast<char*>(p.workspace);
  const auto take = [&](auto*& array, int64_t n) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
    next += round_up(n * int64_t(sizeof(*array)), 256);
  };
  take(sums, p.batch * tiles * p.channels());
  take(mean, p.batch * p.channels());
  take(token_dots, p.batch * width);
  take(token_scales, p.batch * width);
  take(links, p.batch * seeds * width);
  take(link_sums, p.batch * groups * tiles * kGroup);
  take(factors, p.batch * seeds);
  take(rank, p.batch * p.context);
  take(panel, on_tensor_cores ? p.batch * groups * slices * kSliceWords : 0);
  take(seed, p.batch * seeds);
  take(best, p.batch * p.num_seeds);
  take(counts, p.hops * p.batch);
  take(tickets, p.batch * groups);
  take(was_seed, p.batch * p.context);
  take(select, workspace_bytes(selection(p, *this)));
  bytes = next - static_cast<char*>(p.workspace);
}

// ---------------------------------------------------------------------------------- mean

// 16 bytes that are read once, if they exist; else zeros. Without a branch, so that many loads are
// on their way before the first is used.
__device__ inline uint4 load_streaming_if(bool exists, const void* from) {
  uint4 v{};
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ne.b32 exists, %5, 0;\n"
      "@exists ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(int(exists)));
  return v;
}

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

// Block: a tile of a row, and `columns` neighbouring vectors of channels, which share the threads.
template <class T, int kVector>
__global__ __launch_bounds__(kThreads) void sum_kernel(const HopTokensParams p, const Buffers w,
                                                       int columns) {
  constexpr int kAtOnce = 8;
  __shared__ float parts[kThreads * kVector];
  wait_for_kernels_ahead();
  const int64_t b = blockIdx.x / uint32_t(w.tiles), tile = blockIdx.x - b * w.tiles;
  const int end = int(p.context - tile * kTile);
  const int begin = max(end - kTile, int(min(p.first_valid(b), int64_t(end))));
  const int column = threadIdx.x % columns, lane = threadIdx.x / columns;
  const int lanes = kThreads / columns, per_piece = int(p.dim) / kVector;
  const int vector = int(blockIdx.y) * columns + column;
  const bool exists = vector < int(p.pieces) * per_piece;
  float sum[kVector] = {};
  if (exists) {
    const T* states = static_cast<const T*>(p.states) + b * p.states_stride_b +
                      vector / per_piece * p.states_stride_g + vector % per_piece * kVector;
    for (int first = lane; first < kTile; first += lanes * kAtOnce) {
      Channels<T, kVector> x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int j = end - 1 - (first + i * lanes);
        x[i].load_if(j >= begin, states + j * p.states_stride_n);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) x[i].add_to(sum);
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) parts[i * kThreads + threadIdx.x] = sum[i];
  if (blockIdx.y == 0)
    for (int j = end - 1 - int(threadIdx.x); j >= max(end - kTile, 0); j -= kThreads)
      w.was_seed[b * p.context + j] = 0;
  __syncthreads();
  if (lane > 0 || !exists) return;
  float* out = w.sums + (b * w.tiles + tile) * p.channels() + vector * kVector;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    float total = 0.f;
    for (int l = 0; l < lanes; ++l) total += parts[i * kThreads + l * columns + column];
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

// Eight channels of a state.
template <class T>
__device__ void unpack(const uint4& words, float (&x)[8]) {
  T item[8];
  memcpy(item, &words, sizeof(words));
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = to_float(item[i]);
}

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

// Block: a seed. With kPacks the seed goes into the panel: the A fragments of its slices, as in
// product.cuh.
template <class T, bool kPacks>
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
  if constexpr (kPacks) {
    const int per_piece = int(ceil_div(p.dim, kSlice)), slices = int(p.pieces) * per_piece;
    auto* words =
        reinterpret_cast<uint32_t*>(w.panel + (b * w.groups + s / kGroup) * w.slices * kSliceWords);
    for (int i = threadIdx.x; i < w.slices * 4; i += kSeedThreads) {
      const int slice = i / 4, piece = slice / per_piece;
      const int d = slice % per_piece * kSlice + i % 4 * 8;
      uint4 octet{};
      if (position >= 0 && slice < slices && d < p.dim) {
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
      const int lane = in_group % 8 * 4 + i % 4, is_lower = in_group / 8 % 2;
      uint32_t* to =
          words + (slice * kSliceWords + in_group / 16 * 2 * kWarp + lane) * 4 + is_lower;
      to[0] = octet.x;
      to[2] = octet.y;
      to[4 * kWarp] = octet.z;
      to[4 * kWarp + 2] = octet.w;
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

// ---------------------------------------------------------------------------------- links

// What the link kernels need to know of their row: of `blocks` blocks.
struct LinkRow {
  int64_t row, b;  // row: of [batch, groups]
  int block, blocks, first, gap, tiles;
  float beta;

  __device__ LinkRow(const HopTokensParams& p, const Buffers& w, int blocks)
      : row(blockIdx.x / uint32_t(blocks)), blocks(blocks) {
    b = uint32_t(row) / uint32_t(w.groups);
    block = int(blockIdx.x - row * blocks);
    first = int(p.first_valid(b));
    gap = int(min(p.gap, p.context));
    tiles = int(ceil_div(p.context - first, kTile));
    beta = kLog2E / p.temperature;
  }

  __device__ bool is_first_group(const Buffers& w) const { return row == b * w.groups; }

  // exp((cosine - 1) / temperature); 0, and only then, where a link does not count.
  __device__ float link(float product, float scale, const Seed& seed, int j) const {
    const bool hidden = seed.position < 0 || j < first || abs(j - seed.position) <= gap;
    return hidden ? 0.f : exp2_approx((product * (scale * seed.scale) - 1.f) * beta);
  }
};

// By all blocks of a row, at their ends: the last of them joins the sums of all tiles. `parts` has
// room for 16 * kGroup floats.
__device__ void join_sums(const Buffers& w, const LinkRow& at, float* parts) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(w.tickets + at.row, 1u) == uint32_t(at.blocks - 1);
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  constexpr int kQuads = kGroup / 4, kParts = kThreads / kQuads;
  const int quad = threadIdx.x % kQuads, part = threadIdx.x / kQuads;
  const auto* sums =
      reinterpret_cast<const float4*>(w.link_sums + at.row * w.tiles * kGroup) + quad;
  float4 sum{};
#pragma unroll 8
  for (int tile = part; tile < at.tiles; tile += kParts) {
    const float4 of_tile = __ldcg(sums + tile * kQuads);
    sum.x += of_tile.x;
    sum.y += of_tile.y;
    sum.z += of_tile.z;
    sum.w += of_tile.w;
  }
  reinterpret_cast<float4*>(parts)[part * kQuads + quad] = sum;
  __syncthreads();
  if (threadIdx.x >= kGroup) return;
  float total = 0.f;
  for (int i = 0; i < kParts; ++i) total += parts[i * kGroup + threadIdx.x];
  w.factors[at.row * kGroup + threadIdx.x] = total == 0.f ? 0.f : 1.f / total;
}

__device__ inline void copy_async(uint4* to, const uint4* from) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
      "l"(from)
      : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The seeds in shared memory, slice after slice: all of them, or a ring of chunks that all warps
// read at the same time.
template <bool kResident>
struct Panel {
  uint4* shared;
  const uint4* seeds;
  int slices;
  int chunk = 0, chunks;  // read so far, and in all, over the tiles of the block
  int next = 0;           // to be copied
  int source = 0;         // its slice

  __device__ Panel(uint4* shared, const uint4* seeds, int slices, int tiles)
      : shared(shared), seeds(seeds), slices(slices), chunks(slices / kChunkSlices * tiles) {}

  __device__ void copy_chunk() {
    if (next < chunks) {
      uint4* to = shared + next % kRing * (kChunkSlices * kSliceWords);
      const uint4* from = seeds + source * kSliceWords;
      for (int i = threadIdx.x; i < kChunkSlices * kSliceWords; i += kThreads)
        copy_async(to + i, from + i);
    }
    commit_copies();
    ++next;
    source = source + kChunkSlices == slices ? 0 : source + kChunkSlices;
  }

  __device__ void begin() {
    if constexpr (kResident) {
      for (int i = threadIdx.x; i < slices * kSliceWords; i += kThreads)
        copy_async(shared + i, seeds + i);
      commit_copies();
    } else {
      for (int i = 0; i < kRing - 1; ++i) copy_chunk();
    }
  }

  // Before the first slice is read.
  __device__ void wait() {
    wait_for_copies<0>();
    __syncthreads();
  }

  // The slices from `slice` on, kStepSlices of them; called for every step in turn.
  __device__ const uint4* step(int slice) {
    if constexpr (kResident) return shared + slice * kSliceWords;
    if (slice % kChunkSlices == 0) {
      wait_for_copies<kRing - 2>();
      __syncthreads();  // the chunk is there for all, and none reads the one before it
      copy_chunk();
      ++chunk;
    }
    return shared + ((chunk - 1) % kRing * kChunkSlices + slice % kChunkSlices) * kSliceWords;
  }
};

// A lane's way through the states of its warp's tokens, tile after tile. Lane 4r + c reads the
// channels 8c to 8c + 7 of each slice of two tokens, so placed that it then has the products of
// the tokens 4c to 4c + 3 of the warp.
template <class T>
struct TokenReader {
  const HopTokensParams& p;
  const LinkRow& at;
  const T* states;  // of the row
  const T* rows[2];
  int slices, slices_read, tile, slice = 0, d = 0;
  int64_t piece = 0;  // offset of the piece

  __device__ TokenReader(const HopTokensParams& p, const LinkRow& at, int slices)
      : p(p),
        at(at),
        states(static_cast<const T*>(p.states) + at.b * p.states_stride_b),
        slices(slices),
        slices_read(int(p.pieces) * int(ceil_div(p.dim, kSlice))),
        tile(at.block) {
    find_rows();
  }

  __device__ void find_rows() {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, r = lane / 4;
    const int begin = int(p.context) - (tile + 1) * kTile + warp * kWarpTokens;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = begin + r / 2 * 4 + half * 2 + r % 2;
      rows[half] = states + max(j, at.first) * p.states_stride_n + lane % 4 * 8;
    }
  }

  __device__ void load(uint4 (&to)[kStepSlices][2]) {
#pragma unroll
    for (int i = 0; i < kStepSlices; ++i) {
      const bool exists =
          tile < at.tiles && slice + i < slices_read && d + int(threadIdx.x) % 4 * 8 < int(p.dim);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        to[i][half] = load_streaming_if(exists, rows[half] + piece + d);
      d += kSlice;
      if (d >= int(p.dim)) {
        d = 0;
        piece += p.states_stride_g;
      }
    }
    slice += kStepSlices;
    if (slice < slices) return;
    slice = d = 0;
    piece = 0;
    tile += at.blocks;
    if (tile < at.tiles) find_rows();
  }
};

// Products of a warp's tokens with all seeds: sum[m][half] has rows 16m and up, and the tokens as
// product.cuh says, in TokenReader's order.
struct Products {
  float sum[kSeedTiles][2][4];

  template <class T>
  __device__ void add(const uint4* panel, const uint4 (&token)[kStepSlices][2]) {
    const uint4* fragments = panel + threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kStepSlices; ++i) {
#pragma unroll
      for (int m = 0; m < kSeedTiles; ++m) {
        const uint4 first = fragments[(i * kSeedTiles + m) * 2 * kWarp];
        const uint4 second = fragments[((i * kSeedTiles + m) * 2 + 1) * kWarp];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma(sum[m][half], first, token[i][half].x, token[i][half].y, T{});
          mma(sum[m][half], second, token[i][half].z, token[i][half].w, T{});
        }
      }
    }
  }
};

// m (x - m), and the squared length of x - m, of the two tokens that a lane reads: its part of
// their channels, then all.
struct Lengths {
  float dot[2] = {}, square[2] = {};

  // `mean`: of the step's slices.
  template <class T>
  __device__ void add(const float* mean, const uint4 (&token)[kStepSlices][2]) {
#pragma unroll
    for (int i = 0; i < kStepSlices; ++i) {
      const auto* fours =
          reinterpret_cast<const float4*>(mean + i * kSlice + int(threadIdx.x) % 4 * 8);
      const float4 low = fours[0], high = fours[1];
      const float m[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[8];
        unpack<T>(token[i][half], x);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float centred = x[j] - m[j];
          square[half] += centred * centred;
          dot[half] += m[j] * centred;
        }
      }
    }
  }

  __device__ void join() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        dot[half] += __shfl_xor_sync(kFullMask, dot[half], lanes);
        square[half] += __shfl_xor_sync(kFullMask, square[half], lanes);
      }
    }
  }
};

// The dots and scales of the tokens 4c to 4c + 3 of a warp, from memory, or from the lanes that
// have just measured them, who then write them to memory.
struct FourTokens {
  float dot[4], scale[4];

  __device__ void load(const float* dots, const float* scales) {
    const auto d = *reinterpret_cast<const float4*>(dots);
    const auto s = *reinterpret_cast<const float4*>(scales);
    dot[0] = d.x, dot[1] = d.y, dot[2] = d.z, dot[3] = d.w;
    scale[0] = s.x, scale[1] = s.y, scale[2] = s.z, scale[3] = s.w;
  }

  __device__ void take(Lengths& measured) {
    measured.join();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int lane = (threadIdx.x % 4 * 2 + i % 2) * 4;
      dot[i] = __shfl_sync(kFullMask, measured.dot[i / 2], lane);
      const float square = __shfl_sync(kFullMask, measured.square[i / 2], lane);
      scale[i] = square == 0.f ? 0.f : 1.f / sqrtf(square);
    }
  }

  __device__ void store(float* dots, float* scales) const {
    *reinterpret_cast<float4*>(dots) = make_float4(dot[0], dot[1], dot[2], dot[3]);
    *reinterpret_cast<float4*>(scales) = make_float4(scale[0], scale[1], scale[2], scale[3]);
  }
};

// Writes the links of a warp's tokens, the first of which is j0, and the warp's sums of each seed.
__device__ void write_links(const LinkRow& at, const Products& products, const FourTokens& tokens,
                            const Seed* seeds, int j0, float* links, int64_t width,
                            float* warp_sums) {
  const int r = threadIdx.x % kWarp / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < kSeedTiles; ++m) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int s = m * 16 + lower * 8 + r;
      const Seed seed = seeds[s];
      float link[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float product = products.sum[m][i / 2][lower * 2 + i % 2] - tokens.dot[i] - seed.dot;
        link[i] = at.link(product, tokens.scale[i], seed, j0 + 4 * c + i);
      }
      *reinterpret_cast<float4*>(links + s * width + 4 * c) =
          make_float4(link[0], link[1], link[2], link[3]);
      float sum = (link[0] + link[1]) + (link[2] + link[3]);
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
      if (c == 0) warp_sums[s] = sum;
    }
  }
}

// Blocks take the tiles of a row in turn. kFirstHop: measures the tokens too.
template <class T, bool kFirstHop, bool kResident>
__global__ __launch_bounds__(kThreads, 1) void link_kernel(const HopTokensParams p, const Buffers w,
                                                           int blocks) {
  extern __shared__ __align__(16) char dynamic[];
  __shared__ __align__(16) float warp_sums[2][kWarps][kGroup];
  __shared__ Seed seeds[kGroup];
  wait_for_kernels_ahead();
  const LinkRow at(p, w, blocks);
  const int slices = int(w.slices), warp = threadIdx.x / kWarp;
  auto* shared = reinterpret_cast<uint4*>(dynamic);
  auto* mean =
      reinterpret_cast<float*>(shared + (kResident ? slices : kRing * kChunkSlices) * kSliceWords);
  const int my_tiles = at.block < at.tiles ? (at.tiles - at.block - 1) / blocks + 1 : 0;
  Panel<kResident> panel(shared, w.panel + at.row * slices * kSliceWords, slices, my_tiles);
  TokenReader<T> reader(p, at, slices);
  uint4 tokens[kSteps][kStepSlices][2];
#pragma unroll
  for (int i = 0; i < kSteps - 1; ++i) reader.load(tokens[i]);
  panel.begin();
  if (threadIdx.x < kGroup) seeds[threadIdx.x] = w.seed[at.row * kGroup + threadIdx.x];
  if constexpr (kFirstHop) {
    const int per_piece = int(ceil_div(p.dim, kSlice));
    for (int i = threadIdx.x; i < slices * kSlice; i += kThreads) {
      const int piece = i / kSlice / per_piece, d = i - piece * per_piece * kSlice;
      const bool exists = piece < p.pieces && d < p.dim;
      mean[i] = exists ? w.mean[(at.b * p.pieces + piece) * p.dim + d] : 0.f;
    }
  }
  panel.wait();

  for (int tile = at.block, turn = 0; tile < at.tiles; tile += blocks, turn ^= 1) {
    Products products{};
    [[maybe_unused]] Lengths lengths;
    for (int slice = 0; slice < slices; slice += kSteps * kStepSlices) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        reader.load(tokens[(i + kSteps - 1) % kSteps]);
        const int here = slice + i * kStepSlices;
        products.add<T>(panel.step(here), tokens[i]);
        if constexpr (kFirstHop) lengths.add<T>(mean + here * kSlice, tokens[i]);
      }
    }
    const int column = int(w.width) - (tile + 1) * kTile + warp * kWarpTokens;
    const int64_t mine = at.b * w.width + column + threadIdx.x % 4 * 4;
    FourTokens measured;
    if constexpr (kFirstHop) {
      measured.take(lengths);
      if (at.is_first_group(w) && threadIdx.x % kWarp < 4)
        measured.store(w.token_dots + mine, w.token_scales + mine);
    } else {
      measured.load(w.token_dots + mine, w.token_scales + mine);
    }
    write_links(at, products, measured, seeds, column - w.padding(p),
                w.links + at.row * kGroup * w.width + column, w.width, warp_sums[turn][warp]);
    __syncthreads();
    if (threadIdx.x < kGroup) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += warp_sums[turn][i][threadIdx.x];
      w.link_sums[(at.row * w.tiles + tile) * kGroup + threadIdx.x] = sum;
    }
  }
  join_sums(w, at, warp_sums[0][0]);
}

// The same for a lane's tokens, every 32nd of the tile, and the seeds of its warp.
template <bool kFirstHop, int kSeeds, int kTokens>
__device__ void write_plain_links(const HopTokensParams& p, const Buffers& w, const LinkRow& at,
                                  const float (&products)[kSeeds][kTokens], float square,
                                  const Seed* seeds, float* parts) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int column = int(w.width) - (at.block + 1) * kTile;
  float* scales = w.token_scales + at.b * w.width + column;
  if constexpr (kFirstHop) {
    parts[threadIdx.x] = square;
    __syncthreads();
    if (threadIdx.x < kTile) {
      const float whole = parts[threadIdx.x] + parts[threadIdx.x + kTile];
      const float scale = whole == 0.f ? 0.f : 1.f / sqrtf(whole);
      parts[kThreads + threadIdx.x] = scale;
      if (at.is_first_group(w)) scales[threadIdx.x] = scale;
    }
    __syncthreads();
    scales = parts + kThreads;
  }
#pragma unroll
  for (int s = 0; s < kSeeds; ++s) {
    const int64_t seed = warp * kSeeds + s;
    float* links = w.links + (at.row * kGroup + seed) * w.width + column;
    float sum = 0.f;
#pragma unroll
    for (int i = lane; i < kTile; i += kWarp) {
      const float link =
          at.link(products[s][i / kWarp], scales[i], seeds[seed], column - w.padding(p) + i);
      links[i] = link;
      sum += link;
    }
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
      sum += __shfl_xor_sync(kFullMask, sum, lanes);
    if (lane == 0) w.link_sums[(at.row * w.tiles + at.block) * kGroup + seed] = sum;
  }
}

// Any dtype, any strides: ordinary multiplications, one tile a block. A warp has 8 seeds, a lane
// every 32nd token.
template <class T, bool kFirstHop>
__global__ __launch_bounds__(kThreads) void plain_link_kernel(const HopTokensParams p,
                                                              const Buffers w) {
  constexpr int kSeeds = kGroup / kWarps, kTokens = kTile / kWarp;
  __shared__ __align__(16) float seed_chunk[kSlice][kGroup + 4];
  __shared__ float token_chunk[kSlice][kTile + 1];
  __shared__ __align__(16) float parts[2 * kWarps * kGroup];
  __shared__ Seed seeds[kGroup];
  wait_for_kernels_ahead();
  const LinkRow at(p, w, int(w.tiles));
  const int tile = at.block, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (threadIdx.x < kGroup) seeds[threadIdx.x] = w.seed[at.row * kGroup + threadIdx.x];
  if (tile < at.tiles) {
    const int j0 = int(p.context) - (tile + 1) * kTile, dim = int(p.dim);
    const T* states = static_cast<const T*>(p.states) + at.b * p.states_stride_b;
    const float* mean = w.mean + at.b * p.channels();
    float sum[kSeeds][kTokens] = {};
    [[maybe_unused]] float square = 0.f;
    for (int begin = 0; begin < p.channels(); begin += kSlice) {
      __syncthreads();
      const int channel = begin + lane, piece = channel / dim;
      const bool exists = channel < p.channels();
      const T* from = states + piece * p.states_stride_g + channel - piece * dim;
      const float m = exists ? mean[channel] : 0.f;
      for (int s = warp; s < kGroup; s += kWarps)
        seed_chunk[lane][s] =
            exists ? to_float(from[max(seeds[s].position, 0) * p.states_stride_n]) - m : 0.f;
#pragma unroll 8
      for (int i = warp; i < kTile; i += kWarps)
        token_chunk[lane][i] =
            exists ? to_float(from[max(j0 + i, at.first) * p.states_stride_n]) - m : 0.f;
      __syncthreads();
      float part[kSeeds][kTokens] = {};
#pragma unroll 4
      for (int k = 0; k < kSlice; ++k) {
        float x[kTokens];
#pragma unroll
        for (int i = 0; i < kTokens; ++i) x[i] = token_chunk[k][lane + i * kWarp];
#pragma unroll
        for (int s = 0; s < kSeeds; ++s)
#pragma unroll
          for (int i = 0; i < kTokens; ++i) part[s][i] += seed_chunk[k][warp * kSeeds + s] * x[i];
      }
#pragma unroll
      for (int i = 0; i < kSeeds * kTokens; ++i)
        sum[i / kTokens][i % kTokens] += part[i / kTokens][i % kTokens];
      if constexpr (kFirstHop) {  // two threads for each token
#pragma unroll
        for (int k = 0; k < kSlice / 2; ++k) {
          const float x = token_chunk[threadIdx.x / kTile * (kSlice / 2) + k][threadIdx.x % kTile];
          square += x * x;
        }
      }
    }
    write_plain_links<kFirstHop>(p, w, at, sum, square, seeds, parts);
  }
  join_sums(w, at, parts);
}

// ---------------------------------------------------------------------------------- scores

// Block: kScored tokens of a row. The best links are found for a chunk of tokens at a time, and
// added to the pools that they belong to.
__global__ __launch_bounds__(kScoreThreads) void score_kernel(const HopTokensParams p,
                                                              const Buffers w) {
  constexpr int kParts = 8, kQuads = kScoreThreads / kParts, kChunk = 4 * kQuads;
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
  const int columns = int(std::bit_ceil(uint64_t(min(vectors, int64_t(kColumns)))));
  const dim3 blocks(unsigned(p.batch * w.tiles), unsigned(ceil_div(vectors, columns)));
  return launch_overlapping(sum_kernel<T, kVector>, blocks, kThreads, stream, p, w, columns);
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
  const dim3 blocks(unsigned(p.batch * w.seeds));
  if constexpr (sizeof(T) == 2) {
    if (w.on_tensor_cores)
      return launch_overlapping(seed_kernel<T, true>, blocks, kSeedThreads, stream, p, w);
  }
  return launch_overlapping(seed_kernel<T, false>, blocks, kSeedThreads, stream, p, w);
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
