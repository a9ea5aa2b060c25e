// Products of 16 query rows with 16 keys by one warp, in the layout of two mma.m16n8k16. Lane
// 4r + c holds query rows r and r + 8 and keys 2c, 2c + 1, 2c + 8 and 2c + 9:
//
// |              | query row | key              |
// |--------------|-----------|------------------|
// | sum[half][0] | r         | 8 * half + 2c    |
// | sum[half][1] | r         | 8 * half + 2c + 1|
// | sum[half][2] | r + 8     | 8 * half + 2c    |
// | sum[half][3] | r + 8     | 8 * half + 2c + 1|
//
// Keys go from global memory straight into the registers that the tensor cores read: the order in
// which the head dimension is summed is free, so a lane takes 16 consecutive bytes of its keys
// where the instruction's own layout has four times 4 bytes. Queries lie in shared memory in the
// matching order.

#pragma once

#include <cstring>

#include "csrc/cuda/common.cuh"

namespace claa::cuda {

constexpr int kTileKeys = 16;
constexpr int kTileQueries = 16;  // query rows

// Exponentials for half-width inputs, whose rounding exceeds their error: base 2, approximate.
struct FastExp {
  static constexpr float kUnit = kLog2E;  // a natural logarithm times this is one of this base
  __device__ static float exp(float x) { return exp2_approx(x); }
  __device__ static float log(float x) { return log2f(x); }
};

struct ExactExp {
  static constexpr float kUnit = 1.f;
  __device__ static float exp(float x) { return expf(x); }
  __device__ static float log(float x) { return logf(x); }
};

// Rows of one head, of queries or of keys: row n starts at first + n * stride.
template <class T>
struct Rows {
  using Item = T;
  static constexpr bool kPaged = false;
  const T* first;
  int64_t stride;
  int dim;

  __device__ const T* at(int64_t n) const { return first + n * stride; }
};

// Keys of one head of a prompt that lie in pages: row n is that of token base + n.
template <class Item_>
struct RowsInPages {
  using Item = Item_;
  static constexpr bool kPaged = true;
  const Item* first;     // of page 0
  const int32_t* table;  // the prompt's pages
  int64_t page_stride, stride;
  int base, log2_size, dim;

  __device__ const Item* at(int n) const {
    const int token = base + n, page = table[token >> log2_size];
    return first + page * page_stride + (token & ((1 << log2_size) - 1)) * stride;
  }
};

__device__ inline void mma(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1,
                           __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ inline void mma(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

template <int kKeyTiles>
__device__ void clear(float (&sum)[kKeyTiles][2][4]) {
#pragma unroll
  for (int i = 0; i < kKeyTiles * 8; ++i) sum[i / 8][i / 4 % 2][i % 4] = 0.f;
}

// Items [d, d + 8) of a key, of which one load may take all.
template <bool kReadOnce, class T>
__device__ uint4 load_eight(const T* items, T) {
  return kReadOnce ? load_streaming(items) : __ldg(reinterpret_cast<const uint4*>(items));
}
template <bool kReadOnce, class T>
__device__ uint4 load_eight(const __nv_fp8_e4m3* items, T) {
  const uint2 narrow = __ldg(reinterpret_cast<const uint2*>(items));
  uint4 value;
  uint32_t* const pair = &value.x;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pair[i] = widen_pair((i < 2 ? narrow.x : narrow.y) >> i % 2 * 16, T{});
  return value;
}

// T is __half or __nv_bfloat16; the head dimension is filled up to kDim with zeros. kAligned: every
// 8 items of a key are 16 bytes that one load may take, or 8 bytes of e4m3 items.
template <class T, int kDim, bool kAligned, class Keys_ = Rows<T>>
struct TensorCoreProduct {
  using Type = T;
  using Keys = Keys_;
  using Math = FastExp;
  static constexpr int kBlocksPerSm = kDim > 128 ? 1 : 2;  // as registers allow
  static constexpr bool kIsFast = kAligned;                // worth a kernel of its own
  static constexpr int kSlices = kDim / 32;  // of the head dimension: two mma steps each

  // Lane 4r + c: items 32 * slice + 8c to + 7 of keys r (first index 0) and r + 8.
  uint4 key[2][kSlices];

  // Bytes of shared memory for the queries of one tile.
  static int64_t tile_bytes(int64_t) { return kTileQueries * kDim * int64_t(sizeof(T)); }

  // Items [d, d + 8) of a row, one by one.
  __device__ static uint4 gather_eight(const T* row, int d, int dim) {
    alignas(16) T item[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) item[i] = d + i < dim ? row[d + i] : T(0.f);
    uint4 value;
    memcpy(&value, item, sizeof(value));
    return value;
  }

  // Fills the shared memory of `tiles` tiles; `at(i)` is the offset of query row i.
  template <bool kQueriesAligned, class At>
  __device__ static void load_queries(void* shared, int tiles, const Rows<T>& rows, At at) {
    uint4* to = static_cast<uint4*>(shared);
    for (int i = threadIdx.x; i < tiles * kSlices * kWarp; i += blockDim.x) {
      const int lane = i % kWarp, slice = i / kWarp % kSlices, tile = i / kWarp / kSlices;
      const int query_row = tile * kTileQueries + lane / 4, d = slice * 32 + lane % 4 * 8;
      uint4 upper{}, lower{};  // of query rows r = lane / 4 and r + 8
      const T* upper_row = rows.first + at(query_row);
      const T* lower_row = rows.first + at(query_row + 8);
      if constexpr (!kQueriesAligned) {
        upper = gather_eight(upper_row, d, rows.dim);
        lower = gather_eight(lower_row, d, rows.dim);
      } else if (d < rows.dim) {
        upper = *reinterpret_cast<const uint4*>(upper_row + d);
        lower = *reinterpret_cast<const uint4*>(lower_row + d);
      }
      // The A fragments of the slice's two mma steps: rows r and r + 8, first 8 and last 8 items.
      uint4* fragments = to + i / kWarp * 2 * kWarp + lane;
      fragments[0] = {upper.x, lower.x, upper.y, lower.y};
      fragments[kWarp] = {upper.z, lower.z, upper.w, lower.w};
    }
  }

  // Keys from n on; beyond the end the last key stands in, and the caller drops its products.
  template <bool kReadOnce>
  __device__ void load_keys(const Keys& rows, int n, int end) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto* row = rows.at(min(n + lane / 4 + half * 8, end - 1));
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        const int d = slice * 32 + lane % 4 * 8;
        if constexpr (!kAligned) {
          key[half][slice] = gather_eight(row, d, rows.dim);
        } else {
          key[half][slice] = {};
          if (d < rows.dim) key[half][slice] = load_eight<kReadOnce>(row + d, T{});
        }
      }
    }
  }

  // One read of the queries of a tile serves kKeyTiles tiles of keys.
  template <int kKeyTiles>
  __device__ static void multiply(const TensorCoreProduct (&keys)[kKeyTiles], const void* shared,
                                  int tile, int, float (&sum)[kKeyTiles][2][4]) {
    const uint4* query =
        static_cast<const uint4*>(shared) + tile * kSlices * 2 * kWarp + threadIdx.x % kWarp;
    clear(sum);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const uint4 first = query[slice * 2 * kWarp], second = query[(slice * 2 + 1) * kWarp];
#pragma unroll
      for (int i = 0; i < kKeyTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4& k = keys[i].key[half][slice];
          mma(sum[i][half], first, k.x, k.y, T{});
          mma(sum[i][half], second, k.z, k.w, T{});
        }
      }
    }
  }
};

// Any dtype, any head dimension: ordinary multiplications. Keys come through the L1 cache.
template <class T, class Keys_ = Rows<T>>
struct PlainProduct {
  using Type = T;
  using Keys = Keys_;
  using Math = ExactExp;
  static constexpr bool kIsFast = false;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kSumBlock = 32;  // products summed on their own: the error grows less

  const typename Keys::Item* key[4];  // lane 4r + c: keys 2c, 2c + 1, 2c + 8 and 2c + 9

  // An odd number of floats to a query row keeps the rows of a warp on different banks.
  __host__ __device__ static int padded(int64_t dim) { return int(dim | 1); }

  static int64_t tile_bytes(int64_t dim) {
    return kTileQueries * padded(dim) * int64_t(sizeof(float));
  }

  template <bool kQueriesAligned, class At>
  __device__ static void load_queries(void* shared, int tiles, const Rows<T>& rows, At at) {
    float* to = static_cast<float*>(shared);
    for (int i = threadIdx.x; i < tiles * kTileQueries * rows.dim; i += blockDim.x) {
      const int query_row = i / rows.dim, d = i % rows.dim;
      to[query_row * padded(rows.dim) + d] = to_float(rows.first[at(query_row) + d]);
    }
  }

  template <bool kReadOnce>
  __device__ void load_keys(const Keys& rows, int n, int end) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      key[i] = rows.at(min(n + int(threadIdx.x) % 4 * 2 + i % 2 + i / 2 * 8, end - 1));
  }

  template <int kKeyTiles>
  __device__ static void multiply(const PlainProduct (&keys)[kKeyTiles], const void* shared,
                                  int tile, int dim, float (&sum)[kKeyTiles][2][4]) {
    const float* upper = static_cast<const float*>(shared) +
                         (tile * kTileQueries + int(threadIdx.x) % kWarp / 4) * padded(dim);
    const float* lower = upper + 8 * padded(dim);
    clear(sum);
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i) {
      for (int begin = 0; begin < dim; begin += kSumBlock) {
        float part[2][4] = {};
        const int end = min(begin + kSumBlock, dim);
#pragma unroll 4
        for (int d = begin; d < end; ++d) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float k = to_float(keys[i].key[j][d]);
            part[j / 2][j % 2] += k * upper[d];
            part[j / 2][j % 2 + 2] += k * lower[d];
          }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j / 4][j % 4] += part[j / 4][j % 4];
      }
    }
  }
};

// Calls fn with the product that fits: tensor cores for the half-width dtypes.
template <class Fn>
cudaError_t with_product(DType dtype, int64_t dim, bool keys_aligned, Fn fn) {
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      if (keys_aligned) {
        if (dim <= 64) return fn(TensorCoreProduct<T, 64, true>{});
        if (dim <= 128) return fn(TensorCoreProduct<T, 128, true>{});
        if (dim <= 256) return fn(TensorCoreProduct<T, 256, true>{});
      } else {
        if (dim <= 64) return fn(TensorCoreProduct<T, 64, false>{});
        if (dim <= 128) return fn(TensorCoreProduct<T, 128, false>{});
        if (dim <= 256) return fn(TensorCoreProduct<T, 256, false>{});
      }
    }
    return fn(PlainProduct<T>{});
  });
}

// The same for keys in pages, of which Item is the dtype.
template <class T, class Item, class Fn>
cudaError_t with_paged_product_of(int64_t dim, bool keys_aligned, Fn fn) {
  using Keys = RowsInPages<Item>;
  if constexpr (sizeof(T) == 2) {
    if (keys_aligned && dim <= 64) return fn(TensorCoreProduct<T, 64, true, Keys>{});
    if (keys_aligned && dim <= 128) return fn(TensorCoreProduct<T, 128, true, Keys>{});
    if (keys_aligned && dim <= 256) return fn(TensorCoreProduct<T, 256, true, Keys>{});
  }
  return fn(PlainProduct<T, Keys>{});
}
template <class Fn>
cudaError_t with_paged_product(DType dtype, bool is_e4m3, int64_t dim, bool keys_aligned, Fn fn) {
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    return is_e4m3 ? with_paged_product_of<T, __nv_fp8_e4m3>(dim, keys_aligned, fn)
                   : with_paged_product_of<T, T>(dim, keys_aligned, fn);
  });
}

// Whether every 8 items of rows with this address and these strides (in items) are 16 bytes at a
// multiple of 16.
inline bool rows_are_aligned(DType dtype, int64_t dim, const void* first, int64_t stride_0,
                             int64_t stride_1, int64_t stride_2) {
  return dtype != DType::f32 && dim % 8 == 0 && uint64_t(first) % 16 == 0 &&
         (stride_0 | stride_1 | stride_2) % 8 == 0;
}

}  // namespace claa::cuda
