// The softmax of query rows over all keys, without the probabilities: partials, then their join.
//
//   partials  a warp reads a chunk of keys, 16 or 32 at a time, and keeps the softmax partials of
//   up
//             to kWarpTiles tiles of query rows in registers; warps that share a chunk and differ
//             in query rows find the keys in the L1 cache
//   join      a block per kJoinRows query rows joins the partials of all chunks
//
// Reads every key once from memory. Chunks depend on the number of keys alone, and so does the
// order in which they are joined: a prompt gives the same bits in any batch.

#include "csrc/cuda/attention.cuh"

namespace claa::cuda {
namespace {

constexpr int kWarpTiles = 4;
constexpr int kJoinRows = 8;  // few, so that many threads share the chunks of a query row

constexpr int kChunkKeys = 256, kLeastChunkKeys = 2 * kTileKeys;

// Keys of a chunk: few where there are few chunks.
template <class Int>
__host__ __device__ Int chunk_keys(Int total) {
  return min(Int(kChunkKeys), Int(round_up(ceil_div(total, 256), kLeastChunkKeys)));
}

struct Plan {
  bool is_hopper;
  int64_t chunk, chunks;  // keys of a chunk; chunks of a key head, with pages the most there may be
  int64_t normalizers;    // first in the workspace; after them the partials, and with pages `parts`
  int64_t partials;
  int64_t bytes;

  explicit Plan(const WindowAttention& a) {
    const bool is_paged = a.pages.table;
    is_hopper = hopper::takes_softmax(a);
    chunk = chunk_keys(a.total);
    chunks = is_hopper  ? hopper::softmax_parts(a)
             : is_paged ? max(ceil_div(a.total, kChunkKeys),
                              min(ceil_div(a.total, kLeastChunkKeys), int64_t(256)))
                        : ceil_div(a.total, chunk);
    normalizers = a.batch * a.kv_heads * group_rows(a);
    partials = normalizers * chunks;
    bytes = normalizers * int64_t(sizeof(float2)) + partials * int64_t(sizeof(SoftmaxPartial)) +
            (is_paged ? a.batch * int64_t(sizeof(int)) : 0);
  }
};

struct PartialsParams {
  WindowAttention attention;
  SoftmaxPartial* partials;  // [batch * kv_heads, chunks, group_rows]
  int* parts;                // [batch], with pages: how many chunks of a prompt there are
  int chunk;                 // keys; with pages each prompt has its own
  int chunks, chunk_blocks;
  int warp_tiles;   // tiles of query rows of a warp
  int chunk_warps;  // warps of a block that share a chunk, a power of 2
  int spans;        // blocks that share a chunk
  bool is_causal;
};

// The partials of a thread: of query rows r and r + 8 of each tile in lane 4r + c, over the keys
// that the lane has seen.
struct ThreadPartials {
  float max[kWarpTiles][2], sum[kWarpTiles][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < kWarpTiles * 2; ++t) {
      max[t / 2][t % 2] = kLowest;
      sum[t / 2][t % 2] = 0.f;
    }
  }

  // Takes in the logits z of tile t.
  template <class Math, int kKeyTiles>
  __device__ __forceinline__ void add(int t, const float (&z)[kKeyTiles][2][4]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float before = max[t][row];
      float top = before, part = 0.f;
#pragma unroll
      for (int i = 0; i < kKeyTiles * 4; ++i)
        top = fmaxf(top, z[i / 4][i / 2 % 2][row * 2 + i % 2]);
#pragma unroll
      for (int i = 0; i < kKeyTiles * 4; ++i)
        part += Math::exp(z[i / 4][i / 2 % 2][row * 2 + i % 2] - top);
      sum[t][row] = sum[t][row] * Math::exp(before - top) + part;
      max[t][row] = top;
    }
  }

  // Joins the four lanes of each query row and writes the rows of the first n_tiles tiles.
  template <class Math>
  __device__ __forceinline__ void store(SoftmaxPartial* out, int n_tiles) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int t = 0; t < kWarpTiles; ++t) {
      if (t >= n_tiles) continue;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        SoftmaxPartial partial{max[t][row], sum[t][row]};
        partial.join_lanes<Math>(1);
        partial.join_lanes<Math>(2);
        if (lane % 4 == row) out[t * kTileQueries + row * 8 + lane / 4] = partial;
      }
    }
  }
};

// kPlain: no softcap, and queries that 16-byte loads may take.
template <class Product, int kKeyTiles, bool kPlain>
__global__ __launch_bounds__(kAttentionThreads, Product::kBlocksPerSm) void partials_kernel(
    const PartialsParams p) {
  using T = typename Product::Type;
  using Math = typename Product::Math;
  constexpr int kStep = kKeyTiles * kTileKeys;
  // With one tile of keys the next one is on its way during this product; two leave no registers.
  constexpr bool kPrefetch = kKeyTiles == 1 && Product::kIsFast;
  constexpr bool kPaged = Product::Keys::kPaged;
  extern __shared__ uint4 queries[];
  const int span = int(blockIdx.x % unsigned(p.spans));
  const int chunk_block = int(blockIdx.x / unsigned(p.spans) % unsigned(p.chunk_blocks));
  const unsigned bg = blockIdx.x / unsigned(p.spans) / unsigned(p.chunk_blocks);
  const int64_t b = bg / unsigned(p.attention.kv_heads), g = bg % unsigned(p.attention.kv_heads);
  const auto& a = attention_of_prompt<kPaged>(p.attention, b);
  const int warp = threadIdx.x / kWarp;
  int chunk_length = p.chunk, chunks = p.chunks;
  if constexpr (kPaged) {
    chunk_length = chunk_keys(int(a.total));
    chunks = a.total > 0 ? int(ceil_div(int(a.total), chunk_length)) : 0;
    if (g == 0 && span == 0 && chunk_block == 0 && threadIdx.x == 0) p.parts[b] = chunks;
    if (chunk_block * (kAttentionWarps / p.chunk_warps) >= chunks) return;
  }

  const int rows = group_rows(a), tiles = rows / kTileQueries;
  const int first_tile = span * p.chunk_warps * p.warp_tiles;
  const int warp_tile = first_tile + warp % p.chunk_warps * p.warp_tiles;
  const int n_tiles = min(p.warp_tiles, tiles - warp_tile);  // may be negative
  const int chunk = chunk_block * (kAttentionWarps / p.chunk_warps) + warp / p.chunk_warps;

  const int64_t base = int64_t(chunk) * chunk_length;  // keys count from here
  const Visibility visible(a, b, base, p.is_causal);
  const auto keys = key_rows<typename Product::Keys>(a, b, g, base);
  const int end = min(chunk_length, visible.end);
  const auto load = [&](Product(&to)[kKeyTiles], int k) {
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i)
      to[i].template load_keys<false>(keys, k + i * kTileKeys, end);
  };
  int k = max(visible.first(), 0) / kStep * kStep;
  Product current[kKeyTiles];
  if (k < end && n_tiles > 0) load(current, k);

  Product::template load_queries<kPlain>(
      queries, min(p.chunk_warps * p.warp_tiles, tiles - first_tile), query_rows<T>(a, b, g),
      [&](int row) { return QueryRow(a, first_tile * kTileQueries + row).offset(a); });
  __syncthreads();
  if (chunk >= chunks || n_tiles <= 0) return;

  ThreadPartials partials;
  partials.clear();
  for (; k < end; k += kStep) {
    Product next[kKeyTiles];
    if (kPrefetch && k + kStep < end) load(next, k + kStep);
    const bool all_see = (kPlain || a.softcap == 0.f) && visible.all_see(k, k + kStep);
#pragma unroll
    for (int t = 0; t < kWarpTiles; ++t) {
      if (t >= n_tiles) continue;
      float z[kKeyTiles][2][4];  // logits, as in product.cuh
      Product::multiply(current, queries, warp_tile - first_tile + t, int(a.dim), z);
      if (all_see) {
        scale_logits<Math>(a, z);
      } else {
        mask_logits<Math, !kPlain>(a, visible, (warp_tile + t) * kTileQueries, k, z);
      }
      partials.add<Math>(t, z);
    }
    if constexpr (kPrefetch) {
      current[0] = next[0];
    } else if (k + kStep < end) {
      load(current, k + kStep);
    }
  }

  partials.store<Math>(
      p.partials + (int64_t(bg) * p.chunks + chunk) * rows + warp_tile * kTileQueries, n_tiles);
}

template <class Math>
__global__ __launch_bounds__(kAttentionThreads) void join_kernel(const WindowAttention a,
                                                                 const SoftmaxPartial* partials,
                                                                 int64_t most_chunks,
                                                                 const int* parts, float2* out) {
  __shared__ SoftmaxPartial of_warp[kAttentionWarps][kJoinRows];
  constexpr int kSegments = kAttentionThreads / kJoinRows;
  const int rows = group_rows(a), blocks = rows / kJoinRows;
  const int64_t bg = blockIdx.x / blocks;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int in_block = threadIdx.x % kJoinRows;
  const int row = int(blockIdx.x % blocks) * kJoinRows + in_block;

  const int64_t chunks = parts ? parts[bg / a.kv_heads] : most_chunks;
  partials += bg * most_chunks * rows + row;
  SoftmaxPartial partial{kLowest, 0.f};
#pragma unroll 4
  for (int64_t chunk = threadIdx.x / kJoinRows; chunk < chunks; chunk += kSegments)
    partial.join<Math>(partials[chunk * rows]);
#pragma unroll
  for (int step = kJoinRows; step < kWarp; step *= 2) partial.join_lanes<Math>(step);
  if (lane < kJoinRows) of_warp[warp][in_block] = partial;
  __syncthreads();
  if (threadIdx.x >= kJoinRows) return;
  for (int i = 1; i < kAttentionWarps; ++i) partial.join<Math>(of_warp[i][in_block]);

  out[bg * rows + row] = normalizer_of_partial<Math>(a, bg % a.kv_heads, QueryRow(a, row), partial);
}

template <class Product, int kKeyTiles, bool kPlain>
cudaError_t launch_partials(PartialsParams p, cudaStream_t stream) {
  const WindowAttention& a = p.attention;
  const int64_t tile_bytes = Product::tile_bytes(a.dim);
  const int tiles = group_rows(a) / kTileQueries;
  p.warp_tiles = int(max(int64_t(1), min(int64_t(kWarpTiles), kQueryBytes / tile_bytes)));
  p.chunk_warps = 1;
  while (p.chunk_warps < kAttentionWarps && p.chunk_warps * p.warp_tiles < tiles &&
         2 * p.chunk_warps * p.warp_tiles * tile_bytes <= kQueryBytes)
    p.chunk_warps *= 2;
  const int block_tiles = p.chunk_warps * p.warp_tiles;
  p.spans = int(ceil_div(tiles, block_tiles));
  p.chunk_blocks = int(ceil_div(p.chunks, kAttentionWarps / p.chunk_warps));
  return launch_attention(partials_kernel<Product, kKeyTiles, kPlain>,
                          a.batch * a.kv_heads * p.chunk_blocks * p.spans,
                          min(block_tiles, tiles) * tile_bytes, stream, p);
}

}  // namespace

int64_t softmax_bytes(const WindowAttention& a) { return Plan(a).bytes; }

const float2* softmax_normalizers(const WindowAttention& a) {
  return static_cast<const float2*>(a.workspace);
}

namespace {

template <bool kPaged>
cudaError_t run_softmax_of(const WindowAttention& a, bool is_causal, cudaStream_t stream) {
  const Plan plan(a);
  float2* normalizers = static_cast<float2*>(a.workspace);
  SoftmaxPartial* partials = reinterpret_cast<SoftmaxPartial*>(normalizers + plan.normalizers);
  int* parts = kPaged ? reinterpret_cast<int*>(partials + plan.partials) : nullptr;
  const PartialsParams p{.attention = a,
                         .partials = partials,
                         .parts = parts,
                         .chunk = int(plan.chunk),
                         .chunks = int(plan.chunks),
                         .chunk_blocks = 0,
                         .warp_tiles = 0,
                         .chunk_warps = 0,
                         .spans = 0,
                         .is_causal = is_causal};
  return with_product_of<kPaged>(a, [&](auto product) {
    using Product = decltype(product);
    const int rows = group_rows(a);
    const auto run_partials = [&] {
      if (plan.is_hopper)
        return hopper::run_softmax_partials(a, is_causal, partials, parts, stream);
      if constexpr (Product::kIsFast && !kPaged) {
        if (a.softcap == 0.f && queries_are_aligned(a))
          return rows > kWarpTiles * kTileQueries ? launch_partials<Product, 2, true>(p, stream)
                                                  : launch_partials<Product, 1, true>(p, stream);
      }
      return launch_partials<Product, 1, false>(p, stream);
    };
    const cudaError_t status = run_partials();
    if (status != cudaSuccess) return status;
    join_kernel<typename Product::Math>
        <<<unsigned(a.batch * a.kv_heads * rows / kJoinRows), kAttentionThreads, 0, stream>>>(
            a, partials, plan.chunks, parts, normalizers);
    return launched();
  });
}

}  // namespace

cudaError_t run_softmax(const WindowAttention& a, bool is_causal, cudaStream_t stream) {
  return a.pages.table ? run_softmax_of<true>(a, is_causal, stream)
                       : run_softmax_of<false>(a, is_causal, stream);
}

}  // namespace claa::cuda
