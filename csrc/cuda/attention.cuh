// What score_window, score_tokens and peak_attention share: query rows, visibility, softmax.
//
// The queries of a (prompt, key head) are those of its group, one query row each, head after head.
// Every head is padded to a multiple of kHeadAlign rows, so either half of a tile of query rows
// belongs to one head. A padding row repeats a query and has the normalizer +infinity, which leaves
// it no probability.
//
// The normalizer of a query row is a pair (shift, factor): the probability of a logit z, in units
// of Math, is exp(z - shift) * factor. Where Math is FastExp, shift is the logsumexp and factor 1;
// where it is ExactExp, shift is the largest logit and factor 1 / (the sum of exponentials).

#pragma once

#include <type_traits>

#include "csrc/cuda/product.cuh"

namespace claa::cuda {

constexpr int kAttentionThreads = 256;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;
constexpr int64_t kQueryBytes = 64 << 10;  // shared memory for the queries of a block

constexpr int kHeadAlign = 8;

// Query rows of a head, and of all heads of a group, with padding rows.
__host__ __device__ inline int head_rows(const WindowAttention& a) {
  return int(round_up(a.window, kHeadAlign));
}
__host__ __device__ inline int group_rows(const WindowAttention& a) {
  return int(round_up(a.group() * head_rows(a), kTileQueries));
}

// The attention of one prompt: where its keys lie in pages, their number and the factor on them are
// in device memory.
template <bool kPaged>
__device__ __forceinline__ decltype(auto) attention_of_prompt(const WindowAttention& a, int64_t b) {
  if constexpr (kPaged) {
    WindowAttention of_prompt = a;
    of_prompt.total = a.pages.length(b, a.total);
    if (a.pages.key_scale) of_prompt.scale *= *a.pages.key_scale;
    return of_prompt;
  } else {
    return (a);
  }
}

// Keys from `base` on.
template <class Keys>
__device__ Keys key_rows(const WindowAttention& a, int64_t b, int64_t g, int64_t base) {
  using Item = typename Keys::Item;
  const Item* head = static_cast<const Item*>(a.key) + g * a.key_stride_g;
  if constexpr (Keys::kPaged) {
    return {.first = head,
            .table = a.pages.of(b),
            .page_stride = a.key_stride_b,
            .stride = a.key_stride_n,
            .base = int(base),
            .log2_size = a.pages.log2_size,
            .dim = int(a.dim)};
  } else {
    return {.first = head + b * a.key_stride_b + base * a.key_stride_n,
            .stride = a.key_stride_n,
            .dim = int(a.dim)};
  }
}

// The stride is not used: QueryRow::offset says where a row is.
template <class T>
__device__ Rows<T> query_rows(const WindowAttention& a, int64_t b, int64_t g) {
  return {.first = static_cast<const T*>(a.query) + b * a.query_stride_b +
                   g * a.group() * a.query_stride_h,
          .stride = 0,
          .dim = int(a.dim)};
}

// Row `index` of a group's query rows.
struct QueryRow {
  int head;   // of the group; in a padding row maybe beyond the last
  int query;  // in a padding row maybe beyond the last

  __device__ QueryRow(const WindowAttention& a, int index)
      : head(index / head_rows(a)), query(index % head_rows(a)) {}

  __device__ bool is_query(const WindowAttention& a) const {
    return head < a.group() && query < a.window;
  }
  __device__ int64_t offset(const WindowAttention& a) const {
    return min(int64_t(head), a.group() - 1) * a.query_stride_h +
           min(int64_t(query), a.window - 1) * a.query_stride_w;
  }
};

// Which keys a query sees. Query w is at position context + w. Keys count from `base`, so that 32
// bits suffice; positions farther away than kFar are taken as kFar.
struct Visibility {
  static constexpr int64_t kFar = 1 << 30;
  int start, end;
  int context, lowest;  // query w sees (lowest + w, context + w]
  int window;

  __device__ static int near(int64_t position) { return int(min(max(position, -kFar), kFar)); }

  __device__ Visibility(const WindowAttention& a, int64_t b, int64_t base, bool is_causal)
      : start(near((a.start.data ? a.start[b] : 0) - base)),
        end(near(a.total - base)),
        context(is_causal ? near(a.context() - base) : int(kFar)),
        lowest(a.sliding_window ? near(a.context() - a.sliding_window - base) : -int(kFar)),
        window(int(a.window)) {}

  // The keys [from, to) that a query sees.
  __device__ int from(int query) const { return max(start, lowest + query + 1); }
  __device__ int to(int query) const { return min(end, context + query + 1); }
  // The first key that any query sees.
  __device__ int first() const { return max(start, lowest + 1); }
  // Whether every query sees all keys [from, to).
  __device__ bool all_see(int from, int to) const {
    return from >= start && to <= end && to <= context + 1 && from >= lowest + window;
  }
};

// The sink logit of a query head.
__device__ inline float load_sink(const WindowAttention& a, int64_t head) {
  switch (a.sinks_dtype) {
    case DType::f32: return static_cast<const float*>(a.sink_logits)[head];
    case DType::f16: return to_float(static_cast<const __half*>(a.sink_logits)[head]);
    default: return to_float(static_cast<const __nv_bfloat16*>(a.sink_logits)[head]);
  }
}

// Replaces products by logits, where all queries of the tile see all its keys. Every kernel rounds
// them to float32 here, so the bits do not depend on whether a tile was masked, and the second pass
// sees the logits that the softmax saw.
template <class Math, int kKeyTiles>
__device__ void scale_logits(const WindowAttention& a, float (&x)[kKeyTiles][2][4]) {
#pragma unroll
  for (int i = 0; i < kKeyTiles * 8; ++i)
    x[i / 8][i / 4 % 2][i % 4] = __fmul_rn(x[i / 8][i / 4 % 2][i % 4], a.scale * Math::kUnit);
}

// Replaces the products of a tile by logits, -infinity where a query does not see the key.
// `tile_row` is the first query row of the tile, `k` the first key. x as in product.cuh.
template <class Math, bool kSoftcap, int kKeyTiles>
__device__ void mask_logits(const WindowAttention& a, const Visibility& visible, int tile_row,
                            int k, float (&x)[kKeyTiles][2][4]) {
  const int lane = threadIdx.x % kWarp;
  const QueryRow upper(a, tile_row + lane / 4), lower(a, tile_row + lane / 4 + 8);
  const int from[2] = {visible.from(upper.query), visible.from(lower.query)};
  const int to[2] = {visible.to(upper.query), visible.to(lower.query)};
#pragma unroll
  for (int i = 0; i < kKeyTiles * 8; ++i) {
    float& value = x[i / 8][i / 4 % 2][i % 4];
    const int key = k + i / 4 * 8 + lane % 4 * 2 + i % 2, row = i % 4 / 2;
    if (kSoftcap && a.softcap != 0.f) {
      value = a.softcap * tanhf(value * a.scale / a.softcap) * Math::kUnit;
    } else {
      value = __fmul_rn(value, a.scale * Math::kUnit);
    }
    if (key < from[row] || key >= to[row]) value = -INFINITY;
  }
}

inline bool keys_are_aligned(const WindowAttention& a) {
  // Of e4m3 items 8 are 8 bytes: an address that is a multiple of 8, doubled, is one of 16.
  const uint64_t address = uint64_t(a.key) * (a.pages.is_e4m3 ? 2 : 1);
  return rows_are_aligned(a.dtype, a.dim, reinterpret_cast<const void*>(address), a.key_stride_b,
                          a.key_stride_g, a.key_stride_n);
}

// Calls fn with the product that fits the keys: those of an op whose keys may lie in pages.
template <bool kPaged, class Fn>
cudaError_t with_product_of(const WindowAttention& a, Fn fn) {
  if constexpr (kPaged)
    return with_paged_product(a.dtype, a.pages.is_e4m3, a.dim, keys_are_aligned(a), fn);
  else
    return with_product(a.dtype, a.dim, keys_are_aligned(a), fn);
}
inline bool queries_are_aligned(const WindowAttention& a) {
  return rows_are_aligned(a.dtype, a.dim, a.query, a.query_stride_b, a.query_stride_h,
                          a.query_stride_w);
}

// Less than any logit, but finite: the difference of two of them is 0, not NaN.
constexpr float kLowest = -1.7e38f;

// The softmax over some of the keys: their largest logit, and the sum of exp(logit - max).
struct SoftmaxPartial {
  float max, sum;

  template <class Math>
  __device__ void join(const SoftmaxPartial& other) {
    const float top = fmaxf(max, other.max);
    sum = sum * Math::exp(max - top) + other.sum * Math::exp(other.max - top);
    max = top;
  }
  template <class Math>
  __device__ void join_lanes(int step) {
    join<Math>({__shfl_xor_sync(kFullMask, max, step), __shfl_xor_sync(kFullMask, sum, step)});
  }
};

// The normalizer {shift, factor} of a query row whose logsumexp is given.
template <class Math>
__device__ float2 normalizer_of_lse(const WindowAttention& a, int64_t b, int64_t g,
                                    const QueryRow& row) {
  if (!row.is_query(a)) return {INFINITY, 0.f};
  // A query in the prompt's left padding sees no key, and its lse may be anything.
  if (a.start.data && a.context() + row.query < a.start[b]) return {0.f, 0.f};
  const int64_t head = g * a.group() + row.head;
  float lse = a.lse[b * a.lse_stride_b + head * a.lse_stride_h + row.query];
  if (a.sink_logits) {
    const float sink = load_sink(a, head), top = fmaxf(lse, sink);
    lse = top + logf(expf(lse - top) + expf(sink - top));
  }
  return {lse * Math::kUnit, 1.f};
}

// The normalizer of a query row, from the partial over all its keys.
template <class Math>
__device__ float2 normalizer_of_partial(const WindowAttention& a, int64_t g, const QueryRow& row,
                                        SoftmaxPartial partial) {
  if (!row.is_query(a)) return {INFINITY, 0.f};
  if (a.sink_logits) {
    const int64_t head = g * a.group() + row.head;
    partial.join<Math>({load_sink(a, head) * Math::kUnit, 1.f});
  }
  if (partial.sum == 0.f) return {INFINITY, 0.f};  // it sees no key
  return Math::kUnit == 1.f ? float2{partial.max, 1.f / partial.sum}
                            : float2{partial.max + Math::log(partial.sum), 1.f};
}

// The normalizers of all query rows, over all keys: [batch * kv_heads, group_rows] at
// softmax_normalizers(a), the front of the workspace, which has softmax_bytes(a). The keys may lie
// in pages.
int64_t softmax_bytes(const WindowAttention& a);
const float2* softmax_normalizers(const WindowAttention& a);
cudaError_t run_softmax(const WindowAttention& a, bool is_causal, cudaStream_t stream);

// The partials on Hopper (hopper/softmax.cu): [batch * kv_heads, softmax_parts(a), group_rows].
// With pages there are at most so many parts of a key head, and of prompt b there are parts[b].
namespace hopper {
#ifdef CLAA_HOPPER
bool takes_softmax(const WindowAttention& a);
int64_t softmax_parts(const WindowAttention& a);
cudaError_t run_softmax_partials(const WindowAttention& a, bool is_causal, SoftmaxPartial* partials,
                                 int* parts, cudaStream_t stream);
#else
inline bool takes_softmax(const WindowAttention&) { return false; }
inline int64_t softmax_parts(const WindowAttention&) { return 0; }
inline cudaError_t run_softmax_partials(const WindowAttention&, bool, SoftmaxPartial*, int*,
                                        cudaStream_t) {
  return cudaErrorNotSupported;
}
#endif
}  // namespace hopper

// Launches a kernel that may need more shared memory than a kernel has without asking.
template <class... Params>
cudaError_t launch_attention(void (*kernel)(Params...), int64_t blocks, int64_t shared_bytes,
                             cudaStream_t stream, const Params&... params) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (status != cudaSuccess) return status;
  kernel<<<unsigned(blocks), kAttentionThreads, size_t(shared_bytes), stream>>>(params...);
  return launched();
}

}  // namespace claa::cuda
