// Window scores: probabilities of the context keys, summed over the window's queries, pooled along
// the keys and summed over the heads of a group, in one launch.
//
// A block owns a key range of one (prompt, key head) and multiplies it, with a halo of half a
// pooling kernel on each side, by all query rows: a warp takes 16 or 32 keys at a time and keeps
// their sums over a head's queries in registers. Shared memory holds the queries, some tiles at a
// time where they are many, and the sums of the range, from which it pools.
//
// Reads every key once, writes every score once; without `lse` the softmax (softmax.cu) reads every
// key before. Key ranges go from the last to the first, as the softmax has left the last keys in
// the L2 cache. A sum goes over its query rows in order, whatever the range: the same bits in any
// batch.

#include "csrc/cuda/pool.cuh"
#include "csrc/cuda/window_attention.cuh"

namespace claa::cuda {
namespace {

constexpr int64_t kRangeKeys = 1024;
constexpr int64_t kSumBytes = 32 << 10;  // shared memory for the sums of a range

struct ScoresParams {
  WindowScores scores;
  const float2* normalizers;  // of the softmax; nullptr with `lse`
  int range, ranges;          // keys of a key range; key ranges of a key head
  int sums_stride;
  int block_tiles;  // tiles whose queries fit in shared memory
};

// The normalizer of a query row, from the softmax or from lse.
template <class Math>
__device__ float2 normalizer_of(const ScoresParams& p, int64_t b, int64_t g, int row) {
  const WindowAttention& a = p.scores.attention;
  if (p.normalizers) return p.normalizers[(b * a.kv_heads + g) * group_rows(a) + row];
  return normalizer_of_lse<Math>(a, b, g, QueryRow(a, row));
}

// What a block has in shared memory: sums of its key range, and some tiles of query rows.
struct Shared {
  float* sums;      // [slots, sums_stride], a multiple of 16 bytes
  float2* shifts;   // [block_tiles, 8], of query rows r and r + 8 of a tile
  float2* factors;  // the same, where they are not 1
  void* queries;
};

// Fills the shared memory of `n_tiles` tiles from `first_tile` on.
template <class Product, bool kPlain>
__device__ __forceinline__ void load_tiles(const ScoresParams& p, const Shared& shared, int64_t b,
                                           int64_t g, int first_tile, int n_tiles) {
  using T = typename Product::Type;
  using Math = typename Product::Math;
  const WindowAttention& a = p.scores.attention;  // its total is not asked for
  Product::template load_queries<kPlain>(
      shared.queries, n_tiles, query_rows<T>(a, b, g),
      [&](int row) { return QueryRow(a, first_tile * kTileQueries + row).offset(a); });
  for (int i = threadIdx.x; i < n_tiles * 8; i += kAttentionThreads) {
    const int row = (first_tile + i / 8) * kTileQueries + i % 8;
    const float2 upper = normalizer_of<Math>(p, b, g, row);
    const float2 lower = normalizer_of<Math>(p, b, g, row + 8);
    shared.shifts[i] = {upper.x, lower.x};
    if constexpr (Math::kUnit == 1.f) shared.factors[i] = {upper.y, lower.y};
  }
}

// Adds up a tile's logits over the lanes that share keys, into shared memory. sum[i][j] is of key
// 2 * (lane % 4) + j % 2 + j / 2 * 8 of key tile i. At each step a lane hands over half of its keys
// and keeps the other half.
template <int kKeyTiles>
__device__ __forceinline__ void store_sums(float* sums, const float (&sum)[kKeyTiles][4],
                                           bool is_begun, int lane) {
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i) {
    const bool upper = lane & 16, odd = lane & 8;
    float even_sum = upper ? sum[i][2] : sum[i][0], odd_sum = upper ? sum[i][3] : sum[i][1];
    even_sum += __shfl_xor_sync(kFullMask, upper ? sum[i][0] : sum[i][2], 16);
    odd_sum += __shfl_xor_sync(kFullMask, upper ? sum[i][1] : sum[i][3], 16);
    float mine = odd ? odd_sum : even_sum;
    mine += __shfl_xor_sync(kFullMask, odd ? even_sum : odd_sum, 8);
    mine += __shfl_xor_sync(kFullMask, mine, 4);
    if (lane & 4) continue;
    float* to = sums + i * kTileKeys + upper * 8 + lane % 4 * 2 + odd;
    *to = is_begun ? *to + mine : mine;
  }
}

// Sums the probabilities of keys [k, k + kKeyTiles * kTileKeys) over the tiles from `first_tile`
// on. `probabilities(t, x)` gives those of tile t, in the layout of product.cuh.
template <int kKeyTiles, class Probabilities>
__device__ __forceinline__ void add_tiles(const ScoresParams& p, float* sums, int k, int slots,
                                          int first_tile, int n_tiles, int lane,
                                          Probabilities probabilities) {
  float sum[kKeyTiles][4] = {};  // as store_sums has it
  if (slots == 1) {
#pragma unroll 2
    for (int t = 0; t < n_tiles; ++t) {
      float x[kKeyTiles][2][4];
      probabilities(t, x);
#pragma unroll
      for (int i = 0; i < kKeyTiles * 4; ++i)
        sum[i / 4][i % 4] += x[i / 4][i / 2 % 2][i % 2] + x[i / 4][i / 2 % 2][i % 2 + 2];
    }
    store_sums(sums + k, sum, first_tile > 0, lane);
    return;
  }
  // Half tiles: each of them belongs to one head.
  const int head_halves = head_rows(p.scores.attention) / kHeadAlign;
  int half = first_tile * 2, head = half / head_halves;
  for (int t = 0; t < n_tiles; ++t) {
    float x[kKeyTiles][2][4];
    probabilities(t, x);
#pragma unroll
    for (int row = 0; row < 2; ++row, ++half) {
#pragma unroll
      for (int i = 0; i < kKeyTiles * 4; ++i)
        sum[i / 4][i % 4] += x[i / 4][i / 2 % 2][i % 2 + row * 2];
      const bool is_last = half + 1 == (head + 1) * head_halves;
      if ((is_last || (row == 1 && t + 1 == n_tiles)) && head < slots) {
        store_sums(sums + head * p.sums_stride + k, sum, head * head_halves < first_tile * 2, lane);
#pragma unroll
        for (int i = 0; i < kKeyTiles * 4; ++i) sum[i / 4][i % 4] = 0.f;
      }
      head += is_last;
    }
  }
}

// Pools the sums of a key range, which has n_keys from `halo_begin` on, and writes the scores. What
// the kernel knew of the range is computed anew: kept until here, it would spill.
template <bool kPaged>
__device__ __forceinline__ void pool_and_write(const ScoresParams& p, const float* sums,
                                               unsigned range, int slots, int64_t halo_begin,
                                               int n_keys) {
  const unsigned bg = range / unsigned(p.ranges);
  const unsigned b = bg / unsigned(p.scores.attention.kv_heads);
  const int64_t context = attention_of_prompt<kPaged>(p.scores.attention, b).context();
  const int64_t begin = int64_t(range % unsigned(p.ranges)) * p.range;
  const int64_t to = min(begin + p.range, context) - halo_begin;
  for (int at = int(begin - halo_begin) + threadIdx.x; at < to; at += kAttentionThreads) {
    const int64_t j = halo_begin + at;
    if (!p.scores.pooled) {
      float* out = p.scores.out + int64_t(bg) * slots * context + j;
      for (int slot = 0; slot < slots; ++slot)
        out[slot * context] = sums[slot * p.sums_stride + at];
      continue;
    }
    float score = 0.f;
    for (int slot = 0; slot < slots; ++slot)
      score += pool_token(sums + slot * p.sums_stride, at, 0, n_keys, int(p.scores.kernel_size),
                          p.scores.pool_mode);
    if constexpr (!kPaged) p.scores.out[bg * context + j] = score;
    join_running(p.scores, b, j, score);
  }
}

// kPlain: every query sees every context key, no softcap, and queries that 16-byte loads may take.
template <class Product, int kKeyTiles, bool kPlain>
__global__ __launch_bounds__(kAttentionThreads, Product::kBlocksPerSm) void scores_kernel(
    const ScoresParams p) {
  using Math = typename Product::Math;
  constexpr bool kIsExact = Math::kUnit == 1.f;
  constexpr int kStep = kKeyTiles * kTileKeys;
  constexpr int kStride = kAttentionWarps * kStep;
  // A pair of key tiles leaves no registers for the next pair; the products last longer there.
  constexpr bool kPrefetch = kKeyTiles == 1 && Product::kIsFast;
  constexpr bool kPaged = Product::Keys::kPaged;
  extern __shared__ uint4 dynamic[];

  // ---- setup: the block's key range, from the last to the first, and its shared memory
  const unsigned range = gridDim.x - 1 - blockIdx.x, bg = range / unsigned(p.ranges);
  const unsigned kv_heads = unsigned(p.scores.attention.kv_heads);
  const int64_t b = bg / kv_heads, g = bg % kv_heads;
  const auto& a = attention_of_prompt<kPaged>(p.scores.attention, b);
  const int64_t context = a.context();
  const int64_t begin = int64_t(range % unsigned(p.ranges)) * p.range;
  if (kPaged && begin >= context) return;  // of a prompt shorter than the longest may be
  const int64_t end = min(begin + p.range, context);
  const int64_t halo_begin = max(begin - p.scores.halo(), int64_t(0));
  const int64_t halo_end = min(end + p.scores.halo(), context);
  const int n_keys = int(halo_end - halo_begin), slots = int(p.scores.slots());
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  const int dim = int(a.dim), tiles = group_rows(a) / kTileQueries;
  Shared shared;
  shared.sums = reinterpret_cast<float*>(dynamic);
  shared.shifts = reinterpret_cast<float2*>(shared.sums + slots * p.sums_stride);
  shared.factors = shared.shifts + p.block_tiles * 8;
  shared.queries = shared.factors + (kIsExact ? p.block_tiles * 8 : 0);

  const Visibility visible(a, b, halo_begin, true);  // from here on keys count from halo_begin
  const auto keys = key_rows<typename Product::Keys>(a, b, g, halo_begin);

  // Whole steps of keys that no query sees.
  const int unseen = kPlain ? 0 : min(max(visible.first(), 0), n_keys) / kStep * kStep;
  for (int slot = 0; slot < slots; ++slot)
    for (int i = threadIdx.x; i < unseen; i += kAttentionThreads)
      shared.sums[slot * p.sums_stride + i] = 0.f;

  const auto load = [&](Product(&to)[kKeyTiles], int k) {
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i)
      to[i].template load_keys<Product::kIsFast>(keys, k + i * kTileKeys, n_keys);
  };

  // ---- sums: as many query rows at a time as fit in shared memory, by all keys of the range
  const int first = unseen + warp * kStep;
  for (int first_tile = 0; first_tile == 0 || first_tile < tiles; first_tile += p.block_tiles) {
    const int n_tiles = min(p.block_tiles, tiles - first_tile);
    Product current[kKeyTiles];
    if (first < n_keys) load(current, first);
    if (first_tile) __syncthreads();  // the queries before are still being read
    load_tiles<Product, kPlain>(p, shared, b, g, first_tile, n_tiles);
    __syncthreads();

    for (int k = first; k < n_keys; k += kStride) {
      Product next[kKeyTiles];
      if (kPrefetch && k + kStride < n_keys) load(next, k + kStride);
      const bool all_see =
          kPlain || (a.softcap == 0.f && visible.all_see(k, min(k + kStep, n_keys)));
      const auto probabilities = [&](int t, float (&x)[kKeyTiles][2][4]) {
        Product::multiply(current, shared.queries, t, dim, x);
        if (kPlain || all_see) {
          scale_logits<Math>(a, x);
        } else {
          mask_logits<Math, true>(a, visible, (first_tile + t) * kTileQueries, k, x);
        }
        const float2 shift = shared.shifts[t * 8 + lane / 4];
        const float2 factor = kIsExact ? shared.factors[t * 8 + lane / 4] : float2{1.f, 1.f};
#pragma unroll
        for (int i = 0; i < kKeyTiles * 8; ++i) {
          float& value = x[i / 8][i / 4 % 2][i % 4];
          const bool is_lower = i % 4 / 2;  // of query rows r and r + 8
          value = Math::exp(value - (is_lower ? shift.y : shift.x));
          if constexpr (kIsExact) value *= is_lower ? factor.y : factor.x;
        }
      };
      add_tiles<kKeyTiles>(p, shared.sums, k, slots, first_tile, n_tiles, lane, probabilities);
      if constexpr (kPrefetch) {
        current[0] = next[0];
      } else if (k + kStride < n_keys) {
        load(current, k + kStride);
      }
    }
  }
  __syncthreads();

  // ---- pool and write
  pool_and_write<kPaged>(p, shared.sums, range, slots, halo_begin, n_keys);
}

template <class Product, int kKeyTiles, bool kPlain>
cudaError_t launch_scores(ScoresParams p, cudaStream_t stream) {
  const WindowScores& s = p.scores;
  const WindowAttention& a = s.attention;
  const int64_t context = a.context(), heads = a.batch * a.kv_heads;
  const int64_t tile_bytes = Product::tile_bytes(a.dim);
  p.block_tiles =
      int(max(int64_t(1), min(int64_t(group_rows(a) / kTileQueries), kQueryBytes / tile_bytes)));

  // As many key ranges as make whole waves of blocks; none longer than its sums may be, nor shorter
  // than the two halos, which are multiplied twice.
  const int64_t longest =
      max(int64_t(kTileKeys),
          min(kRangeKeys, kSumBytes / int64_t(sizeof(float)) / s.slots() - 2 * s.halo()));
  const int64_t wave = Product::kBlocksPerSm * device_attribute(cudaDevAttrMultiProcessorCount);
  int64_t ranges = max(int64_t(1), wave / heads);
  if (ceil_div(context, ranges) > longest)
    ranges = max(int64_t(1), ceil_div(ceil_div(context, longest) * heads, wave) * wave / heads);
  p.range =
      int(min(longest, max(ceil_div(context, ranges), max(int64_t(kTileKeys), 2 * s.halo()))));
  p.ranges = int(ceil_div(context, p.range));
  p.sums_stride = int(round_up(p.range + 2 * s.halo(), kKeyTiles * kTileKeys));

  const int64_t row_floats = std::is_same_v<typename Product::Math, ExactExp> ? 2 : 1;
  const int64_t shared_bytes =
      p.block_tiles * (tile_bytes + row_floats * kTileQueries * int64_t(sizeof(float))) +
      s.slots() * p.sums_stride * int64_t(sizeof(float));
  return launch_attention(scores_kernel<Product, kKeyTiles, kPlain>, heads * p.ranges, shared_bytes,
                          stream, p);
}

}  // namespace

int64_t workspace_bytes(const WindowScores& p) {
  if (hopper::takes(p)) return hopper::workspace_bytes(p);
  return p.attention.lse ? 0 : softmax_bytes(p.attention);
}

namespace {

template <bool kPaged>
cudaError_t run_portable(const WindowScores& s, cudaStream_t stream) {
  const WindowAttention& a = s.attention;
  if (!a.lse) {
    const cudaError_t status = run_softmax(a, true, stream);
    if (status != cudaSuccess) return status;
  }
  const ScoresParams p{.scores = s,
                       .normalizers = a.lse ? nullptr : softmax_normalizers(a),
                       .range = 0,
                       .ranges = 0,
                       .sums_stride = 0,
                       .block_tiles = 0};
  return with_product_of<kPaged>(a, [&](auto product) {
    using Product = decltype(product);
    if constexpr (Product::kIsFast && !kPaged) {
      if (a.softcap == 0.f && !a.start.data && !a.sliding_window && queries_are_aligned(a))
        return group_rows(a) > 64 ? launch_scores<Product, 2, true>(p, stream)
                                  : launch_scores<Product, 1, true>(p, stream);
    }
    return launch_scores<Product, 1, false>(p, stream);
  });
}

}  // namespace

cudaError_t run(const WindowScores& s, cudaStream_t stream) {
  if (hopper::takes(s)) return hopper::run(s, stream);
  return s.attention.pages.table ? run_portable<true>(s, stream) : run_portable<false>(s, stream);
}

}  // namespace claa::cuda
