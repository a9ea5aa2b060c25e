// The link kernels of hop_tokens: exp((cosine - 1) / temperature) of all tokens with all seeds, and
// one over the sum of each seed. One for tensor cores, one for anything else.

#pragma once

#include <cuda_pipeline.h>

#include "csrc/cuda/hop_tokens.cuh"

namespace claa::cuda::hop_tokens {

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
    float cosine = product * scale * seed.scale;
    cosine = cosine > 1.f ? 1.f : cosine < -1.f ? -1.f : cosine;  // a NaN stays
    return hidden ? 0.f : exp2_approx((cosine - 1.f) * beta);
  }
};

// By all blocks of a row, at their ends: the last of them joins the sums of all tiles. `parts` has
// room for kJoined<kThreads> floats.
template <int kThreads>
constexpr int kJoined = kThreads / (kGroup / 4) * kGroup;

template <int kThreads>
__device__ void join_sums(const Buffers& w, const LinkRow& at, float* parts) {
  __threadfence();
  __syncthreads();
  if (!__syncthreads_or(threadIdx.x == 0 &&
                        atomicAdd(w.tickets + at.row, 1u) == uint32_t(at.blocks - 1)))
    return;  // not the last block
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

// The seeds in shared memory, slice after slice: all of them, copied once in a few chunks, or a
// ring of chunks that all warps read at the same time.
template <bool kResident>
struct Panel {
  uint4* shared;
  const uint4* seeds;
  int slices;
  int chunk = 0, chunks;  // read so far, and in all, over the tiles of the block
  int next = 0;           // to be copied
  int source = 0;         // its slice

  __device__ Panel(uint4* shared, const uint4* seeds, int slices, int tiles)
      : shared(shared),
        seeds(seeds),
        slices(slices),
        chunks(kResident ? min(tiles, 1) * kQuarters : slices / kChunkSlices * tiles) {}

  __device__ int chunk_slices() const { return kResident ? slices / kQuarters : kChunkSlices; }

  __device__ void copy_chunk() {
    if (next < chunks) {
      const int words = chunk_slices() * kSliceWords;
      uint4* to = shared + (kResident ? next : next % kRing) * words;
      const uint4* from = seeds + source * kSliceWords;
      for (int i = threadIdx.x; i < words; i += kThreads)
        __pipeline_memcpy_async(to + i, from + i, sizeof(uint4));
    }
    __pipeline_commit();
    ++next;
    source += chunk_slices();
    if (source == slices) source = 0;
  }

  __device__ void begin() {
    for (int i = 0; i < (kResident ? kQuarters : kRing - 1); ++i) copy_chunk();
  }

  // Waits for the next chunk, and until no warp reads the one before it.
  __device__ void wait_for_chunk() {
    if constexpr (!kResident)
      __pipeline_wait_prior(kRing - 2);
    else if (chunk == 0)
      __pipeline_wait_prior(kQuarters - 1);
    else if (chunk == 1)
      __pipeline_wait_prior(kQuarters - 2);
    else if (chunk == 2)
      __pipeline_wait_prior(kQuarters - 3);
    else
      __pipeline_wait_prior(0);
    __syncthreads();
    if constexpr (!kResident) copy_chunk();
    ++chunk;
  }

  // The slices from `slice` on, kStepSlices of them; called for every step in turn.
  __device__ const uint4* step(int slice) {
    if (chunk < chunks && slice % chunk_slices() == 0) wait_for_chunk();
    if constexpr (kResident) return shared + slice * kSliceWords;
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
__device__ inline void write_links(const LinkRow& at, const Products& products,
                                   const FourTokens& tokens, const Seed* seeds, int j0,
                                   float* links, int64_t width, float* warp_sums) {
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
  join_sums<kThreads>(w, at, warp_sums[0][0]);
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
  join_sums<kThreads>(w, at, parts);
}

}  // namespace claa::cuda::hop_tokens
