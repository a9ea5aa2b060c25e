// The softmax of query columns over all keys, without the probabilities: measure, then join.
//
//   measure  a warp reads a chunk of keys, 16 or 32 at a time, and keeps for up to kColumnTiles
//            tiles of columns each column's largest logit and sum of exponentials in registers;
//            warps that share a chunk and differ in columns find the keys in the L1 cache
//   join     a block per kJoinColumns columns goes over the chunks
//
// Reads every key once from memory. Chunks depend on the number of keys alone, and are joined in an
// order that depends on their number alone: a prompt gives the same bits in any batch.

#include "csrc/cuda/attention.cuh"

namespace claa::cuda {
namespace {

constexpr int kColumnTiles = 4;
constexpr int kJoinColumns = 8;  // of a block: as many segments of chunks as columns allow

struct Plan {
  bool is_hopper;
  int64_t chunk, chunks;  // keys of a chunk; chunks of a head
  int64_t columns;
  int64_t measures, bytes;

  explicit Plan(const WindowAttention& a) {
    is_hopper = hopper::measures(a);
    chunk = min(int64_t(256), round_up(ceil_div(a.total, 256), 2 * kTileKeys));
    chunks = is_hopper ? hopper::measure_parts(a) : ceil_div(a.total, chunk);
    columns = group_columns(a);
    measures = a.batch * a.kv_heads * columns;  // the results come first in the workspace
    bytes = measures * (1 + chunks) * int64_t(sizeof(float2));
  }
};

struct MeasureParams {
  WindowAttention attention;
  Measure* measures;  // [batch * kv_heads, chunks, columns]
  int chunk;          // keys
  int chunks, chunk_blocks;
  int warp_tiles;    // tiles of columns of a warp
  int column_warps;  // warps of a block that share a chunk, a power of 2
  int spans;         // blocks that share a chunk
  bool is_causal;
};

// kPlain: no softcap, and queries that 16-byte loads may take.
template <class Product, int kKeyTiles, bool kPlain>
__global__ __launch_bounds__(kAttentionThreads,
                             Product::kBlocks) void measure_kernel(const MeasureParams p) {
  using T = typename Product::Type;
  using Math = typename Product::Math;
  constexpr int kStep = kKeyTiles * kTileKeys;
  // With one tile of keys the next one is on its way during this product; two leave no registers.
  constexpr bool kPrefetch = kKeyTiles == 1 && Product::kIsFast;
  extern __shared__ uint4 queries[];
  const WindowAttention& a = p.attention;
  const int span = int(blockIdx.x % unsigned(p.spans));
  const int chunk_block = int(blockIdx.x / unsigned(p.spans) % unsigned(p.chunk_blocks));
  const unsigned bg = blockIdx.x / unsigned(p.spans) / unsigned(p.chunk_blocks);
  const int64_t b = bg / unsigned(a.kv_heads), g = bg % unsigned(a.kv_heads);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  const int columns = group_columns(a), tiles = columns / kTileColumns;
  const int first_tile = span * p.column_warps * p.warp_tiles;
  const int warp_tile = first_tile + warp % p.column_warps * p.warp_tiles;
  const int n_tiles = min(p.warp_tiles, tiles - warp_tile);  // may be negative
  const int chunk = chunk_block * (kAttentionWarps / p.column_warps) + warp / p.column_warps;

  const int64_t base = int64_t(chunk) * p.chunk;  // keys count from here
  const Visibility visible(a, b, base, p.is_causal);
  const Rows<T> keys = key_rows<T>(a, b, g, base);
  const int end = min(p.chunk, visible.end);
  const auto load = [&](Product(&to)[kKeyTiles], int k) {
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i)
      to[i].template load_keys<false>(keys, k + i * kTileKeys, end);
  };
  int k = max(visible.first(), 0) / kStep * kStep;
  Product current[kKeyTiles];
  if (k < end && n_tiles > 0) load(current, k);

  Product::template load_queries<kPlain>(
      queries, min(p.column_warps * p.warp_tiles, tiles - first_tile), query_rows<T>(a, b, g),
      [&](int column) { return Column(a, first_tile * kTileColumns + column).query_offset(a); });
  __syncthreads();
  if (chunk >= p.chunks || n_tiles <= 0) return;

  float largest[kColumnTiles][2], total[kColumnTiles][2];  // of columns lane / 4 and lane / 4 + 8
#pragma unroll
  for (int t = 0; t < kColumnTiles * 2; ++t) {
    largest[t / 2][t % 2] = kLowest;
    total[t / 2][t % 2] = 0.f;
  }

  for (; k < end; k += kStep) {
    Product next[kKeyTiles];
    if (kPrefetch && k + kStep < end) load(next, k + kStep);
    const bool all_see = (kPlain || a.softcap == 0.f) && visible.all_see(k, k + kStep);
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
      if (t >= n_tiles) continue;
      float z[kKeyTiles][2][4];
      Product::multiply(current, queries, warp_tile - first_tile + t, int(a.dim), z);
      if (all_see) {
        scale_logits<Math>(a, z);
      } else {
        mask_logits<Math, !kPlain>(a, visible, (warp_tile + t) * kTileColumns, k, z);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float before = largest[t][row];
        float top = before, sum = 0.f;
#pragma unroll
        for (int i = 0; i < kKeyTiles * 4; ++i)
          top = fmaxf(top, z[i / 4][i / 2 % 2][row * 2 + i % 2]);
#pragma unroll
        for (int i = 0; i < kKeyTiles * 4; ++i)
          sum += Math::exp(z[i / 4][i / 2 % 2][row * 2 + i % 2] - top);
        total[t][row] = total[t][row] * Math::exp(before - top) + sum;
        largest[t][row] = top;
      }
    }
    if constexpr (kPrefetch) {
      current[0] = next[0];
    } else if (k + kStep < end) {
      load(current, k + kStep);
    }
  }

  Measure* out = p.measures + (int64_t(bg) * p.chunks + chunk) * columns + warp_tile * kTileColumns;
#pragma unroll
  for (int t = 0; t < kColumnTiles; ++t) {
    if (t >= n_tiles) continue;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      Measure measure{largest[t][row], total[t][row]};
      measure.join_lanes<Math>(1);
      measure.join_lanes<Math>(2);
      if (lane % 4 == row) out[t * kTileColumns + row * 8 + lane / 4] = measure;
    }
  }
}

template <class Math>
__global__ __launch_bounds__(kAttentionThreads) void join_kernel(const WindowAttention a,
                                                                 const Measure* measures,
                                                                 int64_t chunks, float2* out) {
  __shared__ Measure of_warp[kAttentionWarps][kJoinColumns];
  constexpr int kSegments = kAttentionThreads / kJoinColumns;
  const int columns = group_columns(a), blocks = columns / kJoinColumns;
  const int64_t bg = blockIdx.x / blocks;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int in_block = threadIdx.x % kJoinColumns;
  const int column = int(blockIdx.x % blocks) * kJoinColumns + in_block;

  measures += bg * chunks * columns + column;
  Measure measure{kLowest, 0.f};
#pragma unroll 4
  for (int64_t chunk = threadIdx.x / kJoinColumns; chunk < chunks; chunk += kSegments)
    measure.join<Math>(measures[chunk * columns]);
#pragma unroll
  for (int step = kJoinColumns; step < kWarp; step *= 2) measure.join_lanes<Math>(step);
  if (lane < kJoinColumns) of_warp[warp][in_block] = measure;
  __syncthreads();
  if (threadIdx.x >= kJoinColumns) return;
  for (int i = 1; i < kAttentionWarps; ++i) measure.join<Math>(of_warp[i][in_block]);

  out[bg * columns + column] =
      column_of_measure<Math>(a, bg % a.kv_heads, Column(a, column), measure);
}

template <class Product, int kKeyTiles, bool kPlain>
cudaError_t measure(MeasureParams p, cudaStream_t stream) {
  const WindowAttention& a = p.attention;
  const int64_t tile_bytes = Product::tile_bytes(a.dim);
  const int tiles = group_columns(a) / kTileColumns;
  p.warp_tiles = int(max(int64_t(1), min(int64_t(kColumnTiles), kQueryBytes / tile_bytes)));
  p.column_warps = 1;
  while (p.column_warps < kAttentionWarps && p.column_warps * p.warp_tiles < tiles &&
         2 * p.column_warps * p.warp_tiles * tile_bytes <= kQueryBytes)
    p.column_warps *= 2;
  const int block_tiles = p.column_warps * p.warp_tiles;
  p.spans = int(ceil_div(tiles, block_tiles));
  p.chunk_blocks = int(ceil_div(p.chunks, kAttentionWarps / p.column_warps));
  return launch_attention(measure_kernel<Product, kKeyTiles, kPlain>,
                          a.batch * a.kv_heads * p.chunk_blocks * p.spans,
                          min(block_tiles, tiles) * tile_bytes, stream, p);
}

}  // namespace

int64_t softmax_bytes(const WindowAttention& a) { return Plan(a).bytes; }

const float2* softmax_columns(const WindowAttention& a) {
  return static_cast<const float2*>(a.workspace);
}

cudaError_t run_softmax(const WindowAttention& a, bool is_causal, cudaStream_t stream) {
  const Plan plan(a);
  float2* results = static_cast<float2*>(a.workspace);
  Measure* measures = reinterpret_cast<Measure*>(results + plan.measures);
  const MeasureParams p{.attention = a,
                        .measures = measures,
                        .chunk = int(plan.chunk),
                        .chunks = int(plan.chunks),
                        .chunk_blocks = 0,
                        .warp_tiles = 0,
                        .column_warps = 0,
                        .spans = 0,
                        .is_causal = is_causal};
  return with_product(a.dtype, a.dim, keys_are_aligned(a), [&](auto product) {
    using Product = decltype(product);
    const int columns = group_columns(a);
    const auto measured = [&] {
      if (plan.is_hopper) return hopper::run_measures(a, is_causal, measures, stream);
      if constexpr (Product::kIsFast) {
        if (a.softcap == 0.f && queries_are_aligned(a))
          return columns > kColumnTiles * kTileColumns ? measure<Product, 2, true>(p, stream)
                                                       : measure<Product, 1, true>(p, stream);
      }
      return measure<Product, 1, false>(p, stream);
    };
    const cudaError_t status = measured();
    if (status != cudaSuccess) return status;
    join_kernel<typename Product::Math>
        <<<unsigned(a.batch * a.kv_heads * columns / kJoinColumns), kAttentionThreads, 0, stream>>>(
            a, measures, plan.chunks, results);
    return launched();
  });
}

}  // namespace claa::cuda
