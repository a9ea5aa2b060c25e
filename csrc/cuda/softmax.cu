// The softmax of query columns over all keys, without the probabilities: measure, then join.
//
//   measure  a warp reads a chunk of keys and keeps, for up to kColumnTiles tiles of columns, each
//            column's largest logit and sum of exponentials in registers; warps that share a chunk
//            and differ in columns find the keys in the L1 cache
//   join     one block per tile of columns goes over the chunks
//
// Reads every key once from memory. Chunks depend on the number of keys alone, and are joined in an
// order that depends on their number alone: a prompt gives the same bits in any batch.

#include "csrc/cuda/attention.cuh"

namespace claa::cuda {
namespace {

// Less than any logit, and no infinity: the difference of two of them is 0, not NaN.
constexpr float kLowest = -1.7e38f;

struct Measure {
  float largest, sum;

  template <class Math>
  __device__ void join(const Measure& other) {
    const float top = fmaxf(largest, other.largest);
    sum = sum * Math::exp(largest - top) + other.sum * Math::exp(other.largest - top);
    largest = top;
  }
  template <class Math>
  __device__ void add(float z0, float z1) {
    const float top = fmaxf(largest, fmaxf(z0, z1));
    sum = sum * Math::exp(largest - top) + (Math::exp(z0 - top) + Math::exp(z1 - top));
    largest = top;
  }
  template <class Math>
  __device__ void join_lanes(int step) {
    join<Math>({__shfl_xor_sync(kFullMask, largest, step), __shfl_xor_sync(kFullMask, sum, step)});
  }
};

struct Plan {
  int64_t chunk, chunks;  // keys of a chunk; chunks of a head
  int64_t columns;
  int64_t measures, bytes;

  explicit Plan(const WindowAttention& a) {
    chunk = min(int64_t(256), round_up(ceil_div(a.total, 256), kTileKeys));
    chunks = ceil_div(a.total, chunk);
    columns = columns_of_group(a);
    measures = a.batch * a.kv_heads * columns;  // the results come first in the workspace
    bytes = measures * (1 + chunks) * int64_t(sizeof(float2));
  }
};

struct MeasureParams {
  WindowAttention attention;
  Measure* measures;  // [batch * kv_heads, chunks, columns]
  int chunk;  // keys
  int64_t chunks, chunk_blocks;
  int warp_tiles;    // tiles of columns of a warp
  int column_warps;  // warps of a block that share a chunk, a power of 2
  int spans;         // blocks that share a chunk
  bool is_causal, queries_aligned;
};

template <class Product, int kColumnTiles>
__global__ __launch_bounds__(kAttentionThreads,
                             Product::kBlocks) void measure_kernel(const MeasureParams p) {
  using T = typename Product::Type;
  using Math = typename Product::Math;
  extern __shared__ uint4 queries[];
  const WindowAttention& a = p.attention;
  const int span = blockIdx.x % p.spans;
  const int64_t chunk_block = blockIdx.x / p.spans % p.chunk_blocks;
  const int64_t bg = blockIdx.x / p.spans / p.chunk_blocks;
  const int64_t b = bg / a.kv_heads, g = bg % a.kv_heads;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  const int tiles = tiles_of_group(a);
  const int first_tile = span * p.column_warps * p.warp_tiles;
  const int warp_tile = first_tile + warp % p.column_warps * p.warp_tiles;
  const int n_tiles = min(p.warp_tiles, tiles - warp_tile);  // may be negative
  const int64_t chunk =
      chunk_block * (kAttentionWarps / p.column_warps) + warp / p.column_warps;

  const int64_t base = chunk * p.chunk;
  const Visibility visible(a, b, base, p.is_causal);
  const Rows<T> keys = key_rows<T>(a, b, g, base);
  const int end = min(int(p.chunk), visible.end);
  int k = max(visible.first(), 0) / kTileKeys * kTileKeys;
  const bool has_keys = k < end && n_tiles > 0;
  Product current[1];
  if (has_keys) current[0].template load_keys<kColumnTiles <= 4>(keys, k, end);

  Product::load_queries(queries, min(p.column_warps * p.warp_tiles, tiles - first_tile),
                        query_rows<T>(a, b, g, p.queries_aligned), [&](int column) {
                          return Column(a, first_tile * kTileColumns + column).query_offset(a);
                        });
  __syncthreads();
  if (chunk >= p.chunks || n_tiles <= 0) return;

  const Logit<Math> logit(a);
  Measure measure[kColumnTiles][2];
#pragma unroll
  for (int t = 0; t < kColumnTiles; ++t) measure[t][0] = measure[t][1] = {kLowest, 0.f};

  while (k < end) {
    Product next[1];
    const int next_k = k + kTileKeys;
    // With few tiles the next keys are on their way during this product; with more, registers are
    // short, and the other warps fill the wait.
    if (kColumnTiles <= 4 && next_k < end)
      next[0].template load_keys<true>(keys, next_k, end);
    const bool is_plain = a.softcap == 0.f && visible.all_see(k, k + kTileKeys);
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
      if (t >= n_tiles) continue;
      float z[1][4];
      Product::multiply(current, queries, warp_tile - first_tile + t, int(a.dim), z);
      if (is_plain) {
#pragma unroll
        for (int i = 0; i < 4; ++i) z[0][i] *= logit.factor();
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Column column(a, (warp_tile + t) * kTileColumns + lane % 4 * 2 + i % 2);
          const bool is_seen = visible.sees(column.query, k + lane / 4 + i / 2 * 8);
          z[0][i] = is_seen ? logit(z[0][i]) : -INFINITY;
        }
      }
      measure[t][0].template add<Math>(z[0][0], z[0][2]);
      measure[t][1].template add<Math>(z[0][1], z[0][3]);
    }
    k = next_k;
    if (kColumnTiles <= 4) {
      current[0] = next[0];
    } else if (k < end) {
      current[0].template load_keys<false>(keys, k, end);
    }
  }

  float4* out = reinterpret_cast<float4*>(p.measures + (bg * p.chunks + chunk) * tiles * kTileColumns);
#pragma unroll
  for (int t = 0; t < kColumnTiles; ++t) {
    if (t >= n_tiles) continue;
#pragma unroll
    for (int step = 4; step < kWarp; step *= 2) {
      measure[t][0].template join_lanes<Math>(step);
      measure[t][1].template join_lanes<Math>(step);
    }
    if (lane < 4)
      out[(warp_tile + t) * (kTileColumns / 2) + lane] = {measure[t][0].largest, measure[t][0].sum,
                                                          measure[t][1].largest, measure[t][1].sum};
  }
}

template <class Math>
__global__ __launch_bounds__(kAttentionThreads) void join_kernel(const WindowAttention a,
                                                                const Measure* measures,
                                                                int64_t chunks, float2* out) {
  __shared__ Measure of_warp[kAttentionWarps][kTileColumns];
  constexpr int kSegments = kAttentionThreads / kTileColumns;
  const int tiles = tiles_of_group(a);
  const int64_t bg = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int column = threadIdx.x % kTileColumns;

  measures += bg * chunks * tiles * kTileColumns + tile * kTileColumns + column;
  Measure measure{kLowest, 0.f};
#pragma unroll 4
  for (int64_t chunk = threadIdx.x / kTileColumns; chunk < chunks; chunk += kSegments)
    measure.join<Math>(measures[chunk * tiles * kTileColumns]);
#pragma unroll
  for (int step = kTileColumns; step < kWarp; step *= 2) measure.join_lanes<Math>(step);
  if (lane < kTileColumns) of_warp[warp][column] = measure;
  __syncthreads();
  if (threadIdx.x >= kTileColumns) return;
  for (int i = 1; i < kAttentionWarps; ++i) measure.join<Math>(of_warp[i][column]);

  const Column at(a, int(tile) * kTileColumns + column);
  if (a.sinks) {
    const int64_t head = bg % a.kv_heads * a.group() + at.head;
    measure.join<Math>({load_sink(a, head) * Math::kUnit, 1.f});
  }
  float2 result{INFINITY, 0.f};  // no query, or one that sees no key
  if (at.exists(a) && measure.sum != 0.f)
    result = Math::kUnit == 1.f ? float2{measure.largest, 1.f / measure.sum}
                                : float2{measure.largest + Math::log(measure.sum), 1.f};
  out[(bg * tiles + tile) * kTileColumns + column] = result;
}

template <class Product, int kColumnTiles>
cudaError_t measure(MeasureParams p, cudaStream_t stream) {
  const WindowAttention& a = p.attention;
  const int64_t tile_bytes = Product::tile_bytes(a.dim);
  const int tiles = tiles_of_group(a);
  p.warp_tiles = int(max(int64_t(1), min(int64_t(kColumnTiles), kQueryBytes / tile_bytes)));
  p.column_warps = 1;
  while (p.column_warps < kAttentionWarps && p.column_warps * p.warp_tiles < tiles &&
         2 * p.column_warps * p.warp_tiles * tile_bytes <= kQueryBytes)
    p.column_warps *= 2;
  const int block_tiles = p.column_warps * p.warp_tiles;
  p.spans = int(ceil_div(tiles, block_tiles));
  p.chunk_blocks = ceil_div(p.chunks, kAttentionWarps / p.column_warps);
  return launch_attention(measure_kernel<Product, kColumnTiles>,
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
                        .chunks = plan.chunks,
                        .chunk_blocks = 0,
                        .warp_tiles = 0,
                        .column_warps = 0,
                        .spans = 0,
                        .is_causal = is_causal,
                        .queries_aligned = queries_are_aligned(a)};
  return with_product(a.dtype, a.dim, keys_are_aligned(a), [&](auto product) {
    using Product = decltype(product);
    const cudaError_t status = Product::kIsFast && tiles_of_group(a) <= 4
                                   ? measure<Product, Product::kIsFast ? 4 : 8>(p, stream)
                                   : measure<Product, 8>(p, stream);
    if (status != cudaSuccess) return status;
    join_kernel<typename Product::Math>
        <<<unsigned(a.batch * a.kv_heads * tiles_of_group(a)), kAttentionThreads, 0, stream>>>(
            a, measures, plan.chunks, results);
    return launched();
  });
}

}  // namespace claa::cuda
