// What score_window, score_tokens and peak_attention share: query columns, visibility, softmax.
//
// A (prompt, key head) has the queries of its group as columns, head after head. The queries of a
// head are filled up to a multiple of kTileColumns, so a tile of columns belongs to one head. The
// columns that fill up repeat the head's last query and get shift +infinity: no probability.
//
// The probability of a logit z, in units of Math, is exp(z - shift) * factor; factor is 1 where Math
// is FastExp, its logarithm being part of the shift.

#pragma once

#include <type_traits>

#include "csrc/cuda/product.cuh"

namespace claa::cuda {

constexpr int kAttentionThreads = 256;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;
constexpr int64_t kQueryBytes = 64 << 10;  // shared memory for the queries of a block

__host__ __device__ inline int tiles_of_head(const WindowAttention& a) {
  return int(ceil_div(a.window, kTileColumns));
}
__host__ __device__ inline int tiles_of_group(const WindowAttention& a) {
  return int(a.group()) * tiles_of_head(a);
}
__host__ __device__ inline int64_t columns_of_group(const WindowAttention& a) {
  return int64_t(tiles_of_group(a)) * kTileColumns;
}

// Keys from `base` on.
template <class T>
__device__ Rows<T> key_rows(const WindowAttention& a, int64_t b, int64_t g, int64_t base) {
  return {.first = static_cast<const T*>(a.key) + b * a.key_stride_b + g * a.key_stride_g +
                   base * a.key_stride_n,
          .stride = a.key_stride_n,
          .dim = int(a.dim),
          .is_aligned = false};
}

// Its stride is not used: a column says where its row is (query_offset).
template <class T>
__device__ Rows<T> query_rows(const WindowAttention& a, int64_t b, int64_t g, bool is_aligned) {
  return {.first = static_cast<const T*>(a.query) + b * a.query_stride_b +
                   g * a.group() * a.query_stride_h,
          .stride = 0,
          .dim = int(a.dim),
          .is_aligned = is_aligned};
}

struct Column {
  int head;   // of the group
  int query;  // may be beyond the last

  __device__ Column(const WindowAttention& a, int column)
      : head(column / kTileColumns / tiles_of_head(a)),
        query(column - head * tiles_of_head(a) * kTileColumns) {}

  __device__ bool exists(const WindowAttention& a) const { return query < a.window; }
  __device__ int64_t query_offset(const WindowAttention& a) const {
    return head * a.query_stride_h + min(int64_t(query), a.window - 1) * a.query_stride_w;
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

  __device__ bool sees(int query, int key) const {
    return key >= start && key < end && key <= context + query && key > lowest + query;
  }
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
    case DType::f32: return static_cast<const float*>(a.sinks)[head];
    case DType::f16: return to_float(static_cast<const __half*>(a.sinks)[head]);
    default: return to_float(static_cast<const __nv_bfloat16*>(a.sinks)[head]);
  }
}

// Logits from products.
template <class Math>
struct Logit {
  float scale, softcap;

  __device__ explicit Logit(const WindowAttention& a) : scale(a.scale), softcap(a.softcap) {}

  // The factor of a product where there is no softcap.
  __device__ float factor() const { return scale * Math::kUnit; }
  __device__ float operator()(float product) const {
    if (softcap == 0.f) return product * factor();
    return softcap * tanhf(product * scale / softcap) * Math::kUnit;
  }
};

inline bool keys_are_aligned(const WindowAttention& a) {
  return rows_are_aligned(a.dtype, a.dim, a.key, a.key_stride_b, a.key_stride_g, a.key_stride_n);
}
inline bool queries_are_aligned(const WindowAttention& a) {
  return rows_are_aligned(a.dtype, a.dim, a.query, a.query_stride_b, a.query_stride_h,
                          a.query_stride_w);
}

// shift and factor of every column of every (prompt, key head), from all keys: [batch * kv_heads,
// columns_of_group] at softmax_columns(a), in the workspace of softmax_bytes(a) at its front.
int64_t softmax_bytes(const WindowAttention& a);
const float2* softmax_columns(const WindowAttention& a);
cudaError_t run_softmax(const WindowAttention& a, bool is_causal, cudaStream_t stream);

// Launches a kernel that may need more shared memory than a kernel has without asking.
template <class... Params>
cudaError_t launch_attention(void (*kernel)(Params...), int64_t blocks, int64_t shared_bytes,
                             cudaStream_t stream, const Params&... params) {
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (status != cudaSuccess) return status;
  kernel<<<unsigned(blocks), kAttentionThreads, size_t(shared_bytes), stream>>>(params...);
  return launched();
}

}  // namespace claa::cuda
