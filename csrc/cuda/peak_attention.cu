// peak_attention: the most attention any head pays from each query to each key.
//
// The softmax comes first (softmax.cu); then a block owns kBlockKeys keys and up to kBlockTiles
// tiles of queries of a prompt and goes over all heads: a warp keeps the largest probability of its
// 16 keys and all queries of the block in registers, merges `running`, and writes once. Queries go
// through shared memory, as many heads at a time as fit.
//
// Compute bound: 4 * heads * queries * keys * dim operations in two passes over the keys. Writes
// queries * keys floats once. A maximum does not depend on its order.

#include "csrc/cuda/attention.cuh"

namespace claa::cuda {
namespace {

constexpr int kBlockTiles = 8;
constexpr int kBlockKeys = kAttentionWarps * kTileKeys;

struct EmitParams {
  WindowAttention attention;  // its window: the queries
  const float* running;       // [batch, queries, total], may be nullptr
  float* out;                 // [batch, queries, total]
  int64_t running_stride_b, running_stride_t;
  const float2* columns;
  int64_t key_blocks, query_blocks;
  int block_tiles;  // tiles of queries of a block
  int batch_heads;  // heads whose queries are in shared memory together
  bool queries_aligned;
};

template <class Product>
__global__ __launch_bounds__(kAttentionThreads,
                             Product::kBlocks) void emit_kernel(const EmitParams p) {
  using T = typename Product::Type;
  using Math = typename Product::Math;
  extern __shared__ uint4 shared[];
  const WindowAttention& a = p.attention;
  const int64_t b = blockIdx.x / p.query_blocks / p.key_blocks;
  const int first_tile = int(blockIdx.x % p.query_blocks) * p.block_tiles;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t key =
      blockIdx.x / p.query_blocks % p.key_blocks * kBlockKeys + warp * kTileKeys;

  const int dim = int(a.dim), group = int(a.group()), head_tiles = tiles_of_head(a);
  const int n_tiles = min(p.block_tiles, head_tiles - first_tile);
  float2* columns = reinterpret_cast<float2*>(shared);  // [batch_heads, n_tiles * kTileColumns]
  void* queries = columns + p.batch_heads * p.block_tiles * kTileColumns;

  const Visibility visible(a, b, key, false);
  const Logit<Math> logit(a);
  const bool is_needed = visible.end > 0 && visible.start < kTileKeys;
  const bool is_plain = visible.all_see(0, min(kTileKeys, visible.end));

  float peak[kBlockTiles][4] = {};
  for (int64_t g = 0; g < a.kv_heads; ++g) {
    Product keys[1];
    if (is_needed)
      keys[0].template load_keys<false>(key_rows<T>(a, b, g, key), 0,
                                         min(kTileKeys, visible.end));
    for (int first_head = 0; first_head < group; first_head += p.batch_heads) {
      const int n_heads = min(p.batch_heads, group - first_head);
      __syncthreads();  // the queries before are still being read
      const auto column_at = [&](int i) {  // of the group
        const int head = first_head + i / (n_tiles * kTileColumns);
        return (head * head_tiles + first_tile) * kTileColumns + i % (n_tiles * kTileColumns);
      };
      Product::load_queries(queries, n_heads * n_tiles, query_rows<T>(a, b, g, p.queries_aligned),
                            [&](int i) { return Column(a, column_at(i)).query_offset(a); });
      const float2* of_group = p.columns + (b * a.kv_heads + g) * columns_of_group(a);
      for (int i = threadIdx.x; i < n_heads * n_tiles * kTileColumns; i += kAttentionThreads)
        columns[i] = of_group[column_at(i)];
      __syncthreads();
      if (!is_needed) continue;

      for (int head = 0; head < n_heads; ++head) {
#pragma unroll
        for (int t = 0; t < kBlockTiles; ++t) {
          if (t >= n_tiles) continue;
          const int tile = head * n_tiles + t;
          float product[1][4];
          Product::multiply(keys, queries, tile, dim, product);
          const float4 pair = reinterpret_cast<const float4*>(columns)[tile * 4 + lane % 4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float z = product[0][i] * logit.factor();
            if (!is_plain && !visible.sees(0, lane / 4 + i / 2 * 8)) z = -INFINITY;
            const float x = Math::exp(z - (i % 2 ? pair.z : pair.x)) * (i % 2 ? pair.w : pair.y);
            peak[t][i] = max_or_nan(peak[t][i], x);
          }
        }
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kBlockTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t query = int64_t(first_tile + t) * kTileColumns + lane % 4 * 2 + i % 2;
      const int64_t at = key + lane / 4 + i / 2 * 8;
      if (t >= n_tiles || query >= a.window || at >= a.total) continue;
      float value = peak[t][i];
      if (p.running)
        value = max_or_nan(
            value, p.running[b * p.running_stride_b + query * p.running_stride_t + at]);
      p.out[(b * a.window + query) * a.total + at] = value;
    }
  }
}

WindowAttention attention_of(const PeakAttentionParams& p) {
  return {.query = p.query,
          .key = p.key,
          .lse = nullptr,
          .start = p.start,
          .sinks = nullptr,
          .workspace = p.workspace,
          .dtype = p.dtype,
          .sinks_dtype = DType::f32,
          .batch = p.batch,
          .heads = p.heads,
          .kv_heads = p.kv_heads,
          .window = p.queries,
          .total = p.total,
          .dim = p.dim,
          .query_stride_b = p.query_stride_b,
          .query_stride_h = p.query_stride_h,
          .query_stride_w = p.query_stride_t,
          .key_stride_b = p.key_stride_b,
          .key_stride_g = p.key_stride_g,
          .key_stride_n = p.key_stride_n,
          .lse_stride_b = 0,
          .lse_stride_h = 0,
          .scale = p.scale,
          .softcap = 0.f,
          .sliding_window = 0,
          .workers = 1};
}

}  // namespace

int64_t workspace_bytes(const PeakAttentionParams& p) { return softmax_bytes(attention_of(p)); }

cudaError_t run(const PeakAttentionParams& params, cudaStream_t stream) {
  const WindowAttention a = attention_of(params);
  const cudaError_t status = run_softmax(a, false, stream);
  if (status != cudaSuccess) return status;
  EmitParams p{.attention = a,
               .running = params.running,
               .out = params.out,
               .running_stride_b = params.running_stride_b,
               .running_stride_t = params.running_stride_t,
               .columns = softmax_columns(a),
               .key_blocks = ceil_div(a.total, kBlockKeys),
               .query_blocks = 0,
               .block_tiles = 0,
               .batch_heads = 0,
               .queries_aligned = queries_are_aligned(a)};
  return with_product(a.dtype, a.dim, keys_are_aligned(a), [&](auto product) {
    using Product = decltype(product);
    const int64_t tile_bytes = Product::tile_bytes(a.dim);
    const int64_t most_tiles = max(int64_t(1), min(int64_t(kBlockTiles), kQueryBytes / tile_bytes));
    p.query_blocks = ceil_div(tiles_of_head(a), most_tiles);
    p.block_tiles = int(ceil_div(tiles_of_head(a), p.query_blocks));
    p.batch_heads = int(
        max(int64_t(1), min(a.group(), kQueryBytes / (p.block_tiles * tile_bytes))));
    const int64_t shared_bytes =
        p.batch_heads * p.block_tiles *
        (tile_bytes + kTileColumns * int64_t(sizeof(float2)));
    return launch_attention(emit_kernel<Product>, a.batch * p.key_blocks * p.query_blocks,
                            shared_bytes, stream, p);
  });
}

}  // namespace claa::cuda
