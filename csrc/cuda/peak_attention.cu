// peak_attention: the most attention any head pays from each query to each key.
//
// The softmax comes first (softmax.cu). In the second pass a block owns some keys and some queries
// of a prompt and goes over all heads: a warp keeps the largest probability of its 16 or 32 keys
// and all queries of the block in registers, merges `running`, and writes once. Queries go through
// shared memory, as many heads at a time as fit.
//
// Compute bound: 4 * heads * queries * keys * dim operations in two passes over the keys. Writes
// queries * keys floats once. A maximum does not depend on its order.

#include "csrc/cuda/peak_attention.cuh"

namespace claa::cuda {
namespace {

constexpr int kMaxTiles = 4;  // of a block; with pairs of key tiles half as many

struct PeakParams {
  PeakSecondPass pass;
  int64_t key_blocks, query_blocks;
  int block_tiles;  // tiles of queries of a block
  int batch_heads;  // heads whose queries are in shared memory together
};

// Writes what a lane has of n_tiles tiles of queries, merged with `running`.
template <int kTiles, int kKeyTiles>
__device__ __forceinline__ void write(const PeakSecondPass& p, const WindowAttention& a,
                                      const float (&peak)[kTiles][kKeyTiles][2][4], int64_t b,
                                      int first_query, int64_t first_key, int n_tiles) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < kKeyTiles * 8; ++i) {
      const int64_t query = first_query + t * kTileQueries + lane / 4 + i % 4 / 2 * 8;
      const int64_t at = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (t >= n_tiles || query >= a.window || at >= a.total) continue;
      float value = peak[t][i / 8][i / 4 % 2][i % 4];
      if (p.running)
        value =
            max_or_nan(value, p.running[b * p.running_stride_b + query * p.running_stride_t + at]);
      p.out[b * p.out_stride_b + query * p.out_stride_t + at] = value;
    }
  }
}

template <class Product, int kKeyTiles, bool kQueriesAligned>
__global__ __launch_bounds__(kAttentionThreads, Product::kBlocksPerSm) void peak_kernel(
    const PeakParams p) {
  using T = typename Product::Type;
  using Math = typename Product::Math;
  constexpr int kTiles = kMaxTiles / kKeyTiles;
  constexpr int kStep = kKeyTiles * kTileKeys;
  constexpr bool kPaged = Product::Keys::kPaged;
  extern __shared__ uint4 shared[];
  const unsigned block = blockIdx.x / unsigned(p.query_blocks);
  const int64_t b = block / unsigned(p.key_blocks);
  const auto& a = attention_of_prompt<kPaged>(p.pass.attention, b);
  const int64_t first_key = int64_t(block % unsigned(p.key_blocks)) * kAttentionWarps * kStep;
  if (kPaged && first_key >= a.total) return;  // of a prompt shorter than the longest may be
  const int first_query = int(blockIdx.x % unsigned(p.query_blocks)) * p.block_tiles * kTileQueries;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t key = first_key + warp * kStep;

  const int dim = int(a.dim), group = int(a.group());
  const int n_tiles = min(p.block_tiles, int(ceil_div(a.window - first_query, kTileQueries)));
  const int n_rows = n_tiles * kTileQueries;
  // [batch_heads, n_tiles, 8]: the normalizers of query rows r and r + 8 of a tile.
  float4* normalizers = reinterpret_cast<float4*>(shared);
  void* queries = normalizers + p.batch_heads * p.block_tiles * 8;

  const Visibility visible(a, b, key, false);
  const float scale = a.scale * Math::kUnit;
  const bool is_needed = visible.end > 0 && visible.start < kStep;
  const bool is_plain = visible.all_see(0, min(kStep, visible.end));

  float peak[kTiles][kKeyTiles][2][4] = {};  // of the heads so far, in the layout of product.cuh
  for (int64_t g = 0; g < a.kv_heads; ++g) {
    Product keys[kKeyTiles];
    if (is_needed) {
      const auto rows = key_rows<typename Product::Keys>(a, b, g, key);
#pragma unroll
      for (int i = 0; i < kKeyTiles; ++i)
        keys[i].template load_keys<false>(rows, i * kTileKeys, visible.end);
    }
    for (int first_head = 0; first_head < group; first_head += p.batch_heads) {
      const int n_heads = min(p.batch_heads, group - first_head);
      __syncthreads();  // the queries before are still being read
      Product::template load_queries<kQueriesAligned>(
          queries, n_heads * n_tiles, query_rows<T>(a, b, g), [&](int i) {
            const int64_t query = min(int64_t(first_query + i % n_rows), a.window - 1);
            return (first_head + i / n_rows) * a.query_stride_h + query * a.query_stride_w;
          });
      const float2* of_group = p.pass.normalizers + (b * a.kv_heads + g) * group_rows(a);
      const auto normalizer_of = [&](int head, int query) {
        return query < a.window ? of_group[head * head_rows(a) + query] : float2{INFINITY, 0.f};
      };
      for (int i = threadIdx.x; i < n_heads * n_tiles * 8; i += kAttentionThreads) {
        const int head = first_head + i / (n_tiles * 8);
        const int query = first_query + i / 8 % n_tiles * kTileQueries + i % 8;
        const float2 upper = normalizer_of(head, query), lower = normalizer_of(head, query + 8);
        normalizers[i] = {upper.x, upper.y, lower.x, lower.y};
      }
      __syncthreads();
      if (!is_needed) continue;

      for (int head = 0; head < n_heads; ++head) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (t >= n_tiles) continue;
          const int tile = head * n_tiles + t;
          float x[kKeyTiles][2][4];
          Product::multiply(keys, queries, tile, dim, x);
          const float4 pair = normalizers[tile * 8 + lane / 4];
#pragma unroll
          for (int i = 0; i < kKeyTiles * 8; ++i) {
            // Rounded like the logits that the softmax saw, so that no probability exceeds 1.
            float value = __fmul_rn(x[i / 8][i / 4 % 2][i % 4], scale);
            if (!is_plain && i / 4 * 8 + lane % 4 * 2 + i % 2 < visible.start) value = -INFINITY;
            value -= i % 4 / 2 ? pair.z : pair.x;
            value = Math::exp(value);
            if constexpr (Math::kUnit == 1.f) value *= i % 4 / 2 ? pair.w : pair.y;
            float& largest = peak[t][i / 8][i / 4 % 2][i % 4];
            largest = max_or_nan(largest, value);
          }
        }
      }
    }
  }

  write<kTiles, kKeyTiles>(p.pass, a, peak, b, first_query, key, n_tiles);
}

template <class Product, int kKeyTiles, bool kQueriesAligned>
cudaError_t launch_peak(PeakParams p, cudaStream_t stream) {
  const WindowAttention& a = p.pass.attention;
  const int64_t tile_bytes = Product::tile_bytes(a.dim);
  const int64_t tiles = ceil_div(a.window, kTileQueries);
  const int64_t most_tiles =
      max(int64_t(1), min(int64_t(kMaxTiles / kKeyTiles), kQueryBytes / tile_bytes));
  p.query_blocks = ceil_div(tiles, most_tiles);
  p.block_tiles = int(ceil_div(tiles, p.query_blocks));
  p.query_blocks = ceil_div(tiles, p.block_tiles);
  p.key_blocks = ceil_div(a.total, kAttentionWarps * kKeyTiles * kTileKeys);
  p.batch_heads = int(max(int64_t(1), min(a.group(), kQueryBytes / (p.block_tiles * tile_bytes))));
  const int64_t shared_bytes =
      p.batch_heads * p.block_tiles * (tile_bytes + 8 * int64_t(sizeof(float4)));
  return launch_attention(peak_kernel<Product, kKeyTiles, kQueriesAligned>,
                          a.batch * p.key_blocks * p.query_blocks, shared_bytes, stream, p);
}

template <bool kPaged>
cudaError_t run_portable(const PeakSecondPass& pass, cudaStream_t stream) {
  const WindowAttention& a = pass.attention;
  const PeakParams p{
      .pass = pass, .key_blocks = 0, .query_blocks = 0, .block_tiles = 0, .batch_heads = 0};
  return with_product_of<kPaged>(a, [&](auto product) {
    using Product = decltype(product);
    if constexpr (Product::kIsFast && !kPaged) {
      if (queries_are_aligned(a))
        return a.window > kTileQueries ? launch_peak<Product, 2, true>(p, stream)
                                       : launch_peak<Product, 1, true>(p, stream);
    }
    return launch_peak<Product, 1, false>(p, stream);
  });
}

}  // namespace

cudaError_t run_peaks(PeakSecondPass pass, cudaStream_t stream) {
  const WindowAttention& a = pass.attention;
  const cudaError_t status = run_softmax(a, false, stream);
  if (status != cudaSuccess) return status;
  pass.normalizers = softmax_normalizers(a);
  if (hopper::takes(pass)) return hopper::run(pass, stream);
  return a.pages.table ? run_portable<true>(pass, stream) : run_portable<false>(pass, stream);
}

int64_t workspace_bytes(const PeakAttentionParams& p) {
  return softmax_bytes(attention_of_queries(p, p.queries, p.query_stride_t));
}

cudaError_t run(const PeakAttentionParams& p, cudaStream_t stream) {
  return run_peaks({.attention = attention_of_queries(p, p.queries, p.query_stride_t),
                    .running = p.running,
                    .out = p.out,
                    .running_stride_b = p.running_stride_b,
                    .running_stride_t = p.running_stride_t,
                    .out_stride_b = p.queries * p.total,
                    .out_stride_t = p.total,
                    .normalizers = nullptr},
                   stream);
}

}  // namespace claa::cuda
