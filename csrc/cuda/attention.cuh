// What score_window, score_tokens and peak_attention share: query columns, visibility, softmax.
//
// A (prompt, key head) has the queries of its group as columns, head after head. The queries of a
// head are filled up to a multiple of kHeadAlign, so the two halves of a tile of columns belong to
// one head each. The columns that fill up repeat a query and get shift +infinity: no probability.
//
// The probability of a logit z, in units of Math, is exp(z - shift) * factor; factor is 1 where
// Math is FastExp, its logarithm being part of the shift.

#pragma once

#include <type_traits>

#include "csrc/cuda/product.cuh"

namespace claa::cuda {

constexpr int kAttentionThreads = 256;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;
constexpr int64_t kQueryBytes = 64 << 10;  // shared memory for the queries of a block

constexpr int kHeadAlign = 8;

// Columns of a query head, and of all heads of a group.
__host__ __device__ inline int head_columns(const WindowAttention& a) {
  return int(round_up(a.window, kHeadAlign));
}
__host__ __device__ inline int group_columns(const WindowAttention& a) {
  return int(round_up(a.group() * head_columns(a), kTileColumns));
}

// Keys from `base` on.
template <class T>
__device__ Rows<T> key_rows(const WindowAttention& a, int64_t b, int64_t g, int64_t base) {
  return {.first = static_cast<const T*>(a.key) + b * a.key_stride_b + g * a.key_stride_g +
                   base * a.key_stride_n,
          .stride = a.key_stride_n,
          .dim = int(a.dim)};
}

// Its stride is not used: a column says where its row is (query_offset).
template <class T>
__device__ Rows<T> query_rows(const WindowAttention& a, int64_t b, int64_t g) {
  return {.first = static_cast<const T*>(a.query) + b * a.query_stride_b +
                   g * a.group() * a.query_stride_h,
          .stride = 0,
          .dim = int(a.dim)};
}

struct Column {
  int head;   // of the group; may be beyond the last
  int query;  // may be beyond the last

  __device__ Column(const WindowAttention& a, int column)
      : head(column / head_columns(a)), query(column % head_columns(a)) {}

  __device__ bool exists(const WindowAttention& a) const {
    return head < a.group() && query < a.window;
  }
  __device__ int64_t query_offset(const WindowAttention& a) const {
    return min(int64_t(head), a.group() - 1) * a.query_stride_h +
           min(int64_t(query), a.window - 1) * a.query_stride_w;
  }
};

// Which keys a query sees. Query w stands at position context + w. Keys count from `base`, so that
// 32 bits will do; what lies farther away than kFar is as good as at kFar.
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

// Replaces products by logits, of a tile of columns that sees all the keys. Every kernel rounds
// them, so whether a tile was masked, or what the softmax saw, makes no difference of a bit.
template <class Math, int kKeyTiles>
__device__ void scale_logits(const WindowAttention& a, float (&x)[kKeyTiles][2][4]) {
#pragma unroll
  for (int i = 0; i < kKeyTiles * 8; ++i)
    x[i / 8][i / 4 % 2][i % 4] = __fmul_rn(x[i / 8][i / 4 % 2][i % 4], a.scale * Math::kUnit);
}

// Replaces the products of one tile of columns by logits, -infinity where a query does not see the
// key. `tile_column` is the first column of the tile, `k` the first key.
template <class Math, bool kSoftcap, int kKeyTiles>
__device__ void mask_logits(const WindowAttention& a, const Visibility& visible, int tile_column,
                            int k, float (&x)[kKeyTiles][2][4]) {
  const int lane = threadIdx.x % kWarp;
  const Column low(a, tile_column + lane / 4), high(a, tile_column + lane / 4 + 8);
  const int from[2] = {visible.from(low.query), visible.from(high.query)};
  const int to[2] = {visible.to(low.query), visible.to(high.query)};
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
  return rows_are_aligned(a.dtype, a.dim, a.key, a.key_stride_b, a.key_stride_g, a.key_stride_n);
}
inline bool queries_are_aligned(const WindowAttention& a) {
  return rows_are_aligned(a.dtype, a.dim, a.query, a.query_stride_b, a.query_stride_h,
                          a.query_stride_w);
}

// Less than any logit, and no infinity: the difference of two of them is 0, not NaN.
constexpr float kLowest = -1.7e38f;

// A part of a softmax: of the logits it has seen, the largest one and the sum of exp(z - largest).
struct Measure {
  float largest, sum;

  template <class Math>
  __device__ void join(const Measure& other) {
    const float top = fmaxf(largest, other.largest);
    sum = sum * Math::exp(largest - top) + other.sum * Math::exp(other.largest - top);
    largest = top;
  }
  template <class Math>
  __device__ void join_lanes(int step) {
    join<Math>({__shfl_xor_sync(kFullMask, largest, step), __shfl_xor_sync(kFullMask, sum, step)});
  }
};

// shift and factor of a column whose logsumexp is given.
template <class Math>
__device__ float2 column_of_lse(const WindowAttention& a, int64_t b, int64_t g,
                                const Column& column) {
  if (!column.exists(a)) return {INFINITY, 0.f};
  // Padding sees no key, and its lse may be anything.
  if (a.start.data && a.context() + column.query < a.start[b]) return {0.f, 0.f};
  const int64_t head = g * a.group() + column.head;
  float lse = a.lse[b * a.lse_stride_b + head * a.lse_stride_h + column.query];
  if (a.sink_logits) {
    const float sink = load_sink(a, head), top = fmaxf(lse, sink);
    lse = top + logf(expf(lse - top) + expf(sink - top));
  }
  return {lse * Math::kUnit, 1.f};
}

// shift and factor of a column, from the measure of all its keys.
template <class Math>
__device__ float2 column_of_measure(const WindowAttention& a, int64_t g, const Column& column,
                                    Measure measure) {
  if (!column.exists(a)) return {INFINITY, 0.f};
  if (a.sink_logits) {
    const int64_t head = g * a.group() + column.head;
    measure.join<Math>({load_sink(a, head) * Math::kUnit, 1.f});
  }
  if (measure.sum == 0.f) return {INFINITY, 0.f};  // it sees no key
  return Math::kUnit == 1.f ? float2{measure.largest, 1.f / measure.sum}
                            : float2{measure.largest + Math::log(measure.sum), 1.f};
}

// shift and factor of every column of every (prompt, key head), from all keys: [batch * kv_heads,
// group_columns] at softmax_columns(a), in the workspace of softmax_bytes(a) at its front.
int64_t softmax_bytes(const WindowAttention& a);
const float2* softmax_columns(const WindowAttention& a);
cudaError_t run_softmax(const WindowAttention& a, bool is_causal, cudaStream_t stream);

// The measures on Hopper (hopper_softmax.cu): [batch * kv_heads, measure_parts(a), group_columns].
namespace hopper {
#ifdef CLAA_HOPPER
bool measures(const WindowAttention& a);
int64_t measure_parts(const WindowAttention& a);
cudaError_t run_measures(const WindowAttention& a, bool is_causal, Measure* measures,
                         cudaStream_t stream);
#else
inline bool measures(const WindowAttention&) { return false; }
inline int64_t measure_parts(const WindowAttention&) { return 0; }
inline cudaError_t run_measures(const WindowAttention&, bool, Measure*, cudaStream_t) {
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
