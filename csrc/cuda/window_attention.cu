// Window scores: probabilities of the context keys, summed over the window's queries, pooled along
// the keys and summed over the heads of a group, in one launch.
//
// A block owns a range of context keys of one (prompt, key head) and multiplies them, with a halo
// of half a pooling kernel on each side, by all columns: a warp takes 16 or 32 keys at a time and
// keeps their sums over a head's queries in registers. Shared memory holds the queries, in blocks of
// columns where they are many, and the sums of the range, from which it pools.
//
// Reads every key once, writes every score once; without `lse` the softmax (softmax.cu) reads every
// key before. Ranges go from the last to the first, as the softmax has left the last keys in the L2
// cache. A sum goes over its columns in order, whatever the range: the same bits in any batch.

#include "csrc/cuda/pool.cuh"
#include "csrc/cuda/window_attention.cuh"

namespace claa::cuda {
namespace {

constexpr int64_t kRangeKeys = 1024;
constexpr int64_t kSumBytes = 32 << 10;  // shared memory for the sums of a range

struct EmitParams {
  WindowScores scores;
  const float2* columns;  // of the softmax; nullptr with `lse`
  int64_t range, ranges;  // keys of a range; ranges of a head
  int sums_stride;
  int block_tiles;  // tiles of columns whose queries fit in shared memory
  bool queries_aligned;
};

// shift and factor of a column, from the softmax or from lse.
template <class Math>
__device__ float2 column_of(const EmitParams& p, int64_t b, int64_t g, int index) {
  const WindowAttention& a = p.scores.attention;
  if (p.columns) return p.columns[(b * a.kv_heads + g) * columns_of_group(a) + index];
  const Column column(a, index);
  if (!column.exists(a)) return {INFINITY, 0.f};
  // Padding sees no key, and its lse may be anything.
  if (a.start.data && a.context() + column.query < a.start[b]) return {0.f, 0.f};
  const int64_t head = g * a.group() + column.head;
  float lse = a.lse[b * a.lse_stride_b + head * a.lse_stride_h + column.query];
  if (a.sinks) {
    const float sink = load_sink(a, head), top = fmaxf(lse, sink);
    lse = top + logf(expf(lse - top) + expf(sink - top));
  }
  return {lse * Math::kUnit, 1.f};
}

template <class Product, int kKeyTiles>
__global__ __launch_bounds__(kAttentionThreads,
                             Product::kBlocks) void emit_kernel(const EmitParams p) {
  using T = typename Product::Type;
  using Math = typename Product::Math;
  constexpr bool kIsExact = Math::kUnit == 1.f;
  constexpr int kStep = kKeyTiles * kTileKeys;
  constexpr int kStride = kAttentionWarps * kStep;
  // A pair of key tiles leaves no registers for the next pair; the products last longer there.
  constexpr bool kPrefetch = kKeyTiles == 1 && Product::kIsFast;
  extern __shared__ uint4 shared[];
  const WindowAttention& a = p.scores.attention;
  const int64_t unit = gridDim.x - 1 - blockIdx.x, bg = unit / p.ranges;
  const int64_t b = bg / a.kv_heads, g = bg % a.kv_heads, context = a.context();
  const int64_t begin = unit % p.ranges * p.range, end = min(begin + p.range, context);
  const int64_t low = max(begin - p.scores.halo(), int64_t(0));
  const int64_t high = min(end + p.scores.halo(), context);
  const int n_keys = int(high - low), slots = int(p.scores.slots());
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  const int dim = int(a.dim), tiles = tiles_of_group(a), head_tiles = tiles_of_head(a);
  float* sums = reinterpret_cast<float*>(shared);  // [slots, sums_stride]
  float* shifts = sums + slots * p.sums_stride;    // [block_tiles * kTileColumns]
  float* factors = shifts + p.block_tiles * kTileColumns;
  void* queries = factors + (kIsExact ? p.block_tiles * kTileColumns : 0);

  const Visibility visible(a, b, low, true);  // here on keys count from low
  const Rows<T> keys = key_rows<T>(a, b, g, low);
  const Logit<Math> logit(a);

  // Whole steps of keys that no query sees.
  const int unseen = min(max(visible.first(), 0), n_keys) / kStep * kStep;
  for (int slot = 0; slot < slots; ++slot)
    for (int i = threadIdx.x; i < unseen; i += kAttentionThreads)
      sums[slot * p.sums_stride + i] = 0.f;

  const auto load = [&](Product(&to)[kKeyTiles], int k) {
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i)
      to[i].template load_keys<Product::kIsFast>(keys, k + i * kTileKeys, n_keys);
  };
  const int first = unseen + warp * kStep;
  for (int first_tile = 0; first_tile == 0 || first_tile < tiles; first_tile += p.block_tiles) {
    const int n_tiles = min(p.block_tiles, tiles - first_tile);
    Product current[kKeyTiles];
    if (first < n_keys) load(current, first);
    if (first_tile) __syncthreads();  // the queries before are still being read
    Product::load_queries(queries, n_tiles, query_rows<T>(a, b, g, p.queries_aligned),
                          [&](int column) {
                            return Column(a, first_tile * kTileColumns + column).query_offset(a);
                          });
    for (int i = threadIdx.x; i < n_tiles * kTileColumns; i += kAttentionThreads) {
      const float2 column = column_of<Math>(p, b, g, first_tile * kTileColumns + i);
      shifts[i] = column.x;
      if (kIsExact) factors[i] = column.y;
    }
    __syncthreads();

    for (int k = first; k < n_keys; k += kStride) {
      Product next[kKeyTiles];
      if (kPrefetch && k + kStride < n_keys) load(next, k + kStride);
      const bool is_plain =
          a.softcap == 0.f && visible.all_see(k, min(k + kStep, n_keys));

      // sum[i][0] is of key lane / 4 of key tile i, sum[i][1] of the key 8 later.
      const auto store = [&](int slot, float (&sum)[kKeyTiles][2], bool is_begun) {
#pragma unroll
        for (int i = 0; i < kKeyTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            sum[i][half] += __shfl_xor_sync(kFullMask, sum[i][half], 1);
            sum[i][half] += __shfl_xor_sync(kFullMask, sum[i][half], 2);
          }
          if (lane % 4 < 2) {
            float* to = sums + slot * p.sums_stride + k + i * kTileKeys + lane / 4 + lane % 4 * 8;
            const float mine = lane % 4 ? sum[i][1] : sum[i][0];
            *to = is_begun ? *to + mine : mine;
          }
        }
      };
      float total[kKeyTiles][2] = {};
      int head = first_tile / head_tiles;
      for (int t = 0; t < n_tiles; ++head) {
        const int head_end = min((head + 1) * head_tiles - first_tile, n_tiles);
        float sum[kKeyTiles][2] = {};
#pragma unroll 2
        for (; t < head_end; ++t) {
          float product[kKeyTiles][4];
          Product::multiply(current, queries, t, dim, product);
          const float2 shift = reinterpret_cast<const float2*>(shifts)[t * 4 + lane % 4];
#pragma unroll
          for (int i = 0; i < kKeyTiles; ++i) {
            float x[4];
            if (is_plain) {
#pragma unroll
              for (int j = 0; j < 4; ++j)
                x[j] = product[i][j] * logit.factor() - (j % 2 ? shift.y : shift.x);
            } else {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const Column column(a, (first_tile + t) * kTileColumns + lane % 4 * 2 + j % 2);
                const int key = k + i * kTileKeys + lane / 4 + j / 2 * 8;
                const float z = visible.sees(column.query, key) ? logit(product[i][j]) : -INFINITY;
                x[j] = z - (j % 2 ? shift.y : shift.x);
              }
            }
            if constexpr (kIsExact) {
              const float2 factor = reinterpret_cast<const float2*>(factors)[t * 4 + lane % 4];
              sum[i][0] += Math::exp(x[0]) * factor.x + Math::exp(x[1]) * factor.y;
              sum[i][1] += Math::exp(x[2]) * factor.x + Math::exp(x[3]) * factor.y;
            } else {
              sum[i][0] += Math::exp(x[0]) + Math::exp(x[1]);
              sum[i][1] += Math::exp(x[2]) + Math::exp(x[3]);
            }
          }
        }
        if (slots == 1) {
#pragma unroll
          for (int i = 0; i < kKeyTiles; ++i)
            total[i][0] += sum[i][0], total[i][1] += sum[i][1];
        } else {
          store(head, sum, head * head_tiles < first_tile);
        }
      }
      if (slots == 1) store(0, total, first_tile > 0);
      if constexpr (kPrefetch) {
        current[0] = next[0];
      } else if (k + kStride < n_keys) {
        load(current, k + kStride);
      }
    }
  }
  __syncthreads();

  for (int64_t j = begin + threadIdx.x; j < end; j += kAttentionThreads) {
    const int at = int(j - low);
    if (!p.scores.pooled) {
      float* out = p.scores.out + bg * a.group() * context + j;
      for (int slot = 0; slot < slots; ++slot)
        out[slot * context] = sums[slot * p.sums_stride + at];
      continue;
    }
    float score = 0.f;
    for (int slot = 0; slot < slots; ++slot)
      score += pool_token(sums + slot * p.sums_stride, at, 0, n_keys, int(p.scores.kernel_size),
                          p.scores.mode);
    p.scores.out[bg * context + j] = score;
  }
}

template <class Product, int kKeyTiles>
cudaError_t emit(EmitParams p, cudaStream_t stream) {
  const WindowScores& s = p.scores;
  const WindowAttention& a = s.attention;
  const int64_t context = a.context(), heads = a.batch * a.kv_heads;
  const int64_t tile_bytes = Product::tile_bytes(a.dim);
  p.block_tiles = int(max(int64_t(1), min(int64_t(tiles_of_group(a)), kQueryBytes / tile_bytes)));

  // As many ranges as make whole waves of blocks; ranges no longer than their sums may be, and
  // longer than the halo, which is multiplied twice.
  const int64_t longest =
      max(int64_t(kTileKeys),
          min(kRangeKeys, kSumBytes / int64_t(sizeof(float)) / s.slots() - 2 * s.halo()));
  const int64_t wave = Product::kBlocks * device_attribute(cudaDevAttrMultiProcessorCount);
  int64_t ranges = max(int64_t(1), wave / heads);
  if (ceil_div(context, ranges) > longest)
    ranges = max(int64_t(1), ceil_div(ceil_div(context, longest) * heads, wave) * wave / heads);
  p.range = min(longest, max(ceil_div(context, ranges), max(int64_t(kTileKeys), 2 * s.halo())));
  p.ranges = ceil_div(context, p.range);
  p.sums_stride = int(round_up(p.range + 2 * s.halo(), kKeyTiles * kTileKeys));

  const int64_t column_floats = std::is_same_v<typename Product::Math, ExactExp> ? 2 : 1;
  const int64_t shared_bytes =
      p.block_tiles * (tile_bytes + column_floats * kTileColumns * int64_t(sizeof(float))) +
      s.slots() * p.sums_stride * int64_t(sizeof(float));
  return launch_attention(emit_kernel<Product, kKeyTiles>, heads * p.ranges, shared_bytes, stream,
                          p);
}

}  // namespace

int64_t workspace_bytes(const WindowScores& p) {
  return p.attention.lse ? 0 : softmax_bytes(p.attention);
}

cudaError_t run(const WindowScores& s, cudaStream_t stream) {
  const WindowAttention& a = s.attention;
  if (!a.lse) {
    const cudaError_t status = run_softmax(a, true, stream);
    if (status != cudaSuccess) return status;
  }
  const EmitParams p{.scores = s,
                     .columns = a.lse ? nullptr : softmax_columns(a),
                     .range = 0,
                     .ranges = 0,
                     .sums_stride = 0,
                     .block_tiles = 0,
                     .queries_aligned = queries_are_aligned(a)};
  return with_product(a.dtype, a.dim, keys_are_aligned(a), [&](auto product) {
    using Product = decltype(product);
    if constexpr (Product::kIsFast)
      if (tiles_of_group(a) > 16) return emit<Product, 2>(p, stream);
    return emit<Product, 1>(p, stream);
  });
}

}  // namespace claa::cuda
