// Products of 16 keys with 8 query columns by one warp, in the layout of mma.m16n8k16: lane 4r + c
// gets the keys r and r + 8 of the columns 2c and 2c + 1.
//
// Keys go from global memory straight into the registers that the tensor cores read: a product does
// not care in which order the head dimension is summed, so a lane takes 16 consecutive bytes of its
// keys where the instruction's own layout has four times 4 bytes. Queries lie in shared memory in
// the matching order.

#pragma once

#include "csrc/cuda/common.cuh"

namespace claa::cuda {

constexpr int kTileKeys = 16;
constexpr int kTileColumns = 8;

// Keys of one head: row n starts at first + n * stride.
template <class T>
struct KeyRows {
  const T* first;
  int64_t stride;
};

__device__ inline void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// T is __half or __nv_bfloat16, the head dimension a multiple of 32, keys aligned to 16 bytes.
template <class T, int kDim>
struct TensorCoreProduct {
  using Type = T;
  static constexpr bool kIsExact = false;  // the dtype rounds more than a fast exponential
  static constexpr int kSlices = kDim / 32;  // 32 of the head dimension: two mma steps

  uint4 key[2][kSlices];  // of key r and key r + 8

  // Bytes of shared memory for `columns` queries.
  static int64_t query_bytes(int64_t columns, int64_t) { return columns * kDim * int64_t(sizeof(T)); }

  // `at(column)` is the query row of a column, or nullptr for zeros.
  template <class At>
  __device__ static void load_queries(void* shared, int columns, int64_t, At at) {
    uint4* to = static_cast<uint4*>(shared);
    for (int i = threadIdx.x; i < columns * kSlices * 4; i += blockDim.x) {
      const int piece = i % 4, slice = i / 4 % kSlices, column = i / 4 / kSlices;
      const T* row = at(column);
      uint4 value{};
      if (row) memcpy(&value, row + slice * 32 + piece * 8, sizeof(value));
      to[(column / kTileColumns * kSlices + slice) * kWarp + column % kTileColumns * 4 + piece] =
          value;
    }
  }

  __device__ void load_keys(const KeyRows<T>& keys, int64_t n, int64_t end, int64_t) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Beyond the end the last key is read again; its columns are dropped.
      const int64_t at = min(n + lane / 4 + half * 8, end - 1);
      const T* row = keys.first + at * keys.stride + lane % 4 * 8;
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice)
        key[half][slice] = load_streaming(row + slice * 32);
    }
  }

  __device__ void multiply(const void* shared, int tile, int64_t, float (&sum)[4]) const {
    const uint4* query = static_cast<const uint4*>(shared) + tile * kSlices * kWarp;
    sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const uint4 q = query[slice * kWarp + threadIdx.x % kWarp];
      const uint4 low = key[0][slice], high = key[1][slice];
      mma(sum, {low.x, high.x, low.y, high.y}, q.x, q.y, T{});
      mma(sum, {low.z, high.z, low.w, high.w}, q.z, q.w, T{});
    }
  }
};

// Any dtype, any head dimension: ordinary multiplications. Keys come through the L1 cache.
template <class T>
struct PlainProduct {
  using Type = T;
  static constexpr bool kIsExact = sizeof(T) == 4;

  const T* key[2];

  static int64_t query_bytes(int64_t columns, int64_t dim) {
    return columns * round_up(dim, 4) * int64_t(sizeof(float));
  }

  template <class At>
  __device__ static void load_queries(void* shared, int columns, int64_t dim, At at) {
    float* to = static_cast<float*>(shared);
    const int padded = int(round_up(dim, 4));
    for (int i = threadIdx.x; i < columns * padded; i += blockDim.x) {
      const int d = i % padded;
      const T* row = at(i / padded);
      to[i] = row && d < dim ? to_float(row[d]) : 0.f;
    }
  }

  __device__ void load_keys(const KeyRows<T>& keys, int64_t n, int64_t end, int64_t) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      key[half] = keys.first + min(n + threadIdx.x % kWarp / 4 + half * 8, end - 1) * keys.stride;
  }

  __device__ void multiply(const void* shared, int tile, int64_t dim, float (&sum)[4]) const {
    const int padded = int(round_up(dim, 4));
    const float* first = static_cast<const float*>(shared) +
                         (tile * kTileColumns + threadIdx.x % 4 * 2) * padded;
    const float* second = first + padded;
    sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
#pragma unroll 4
    for (int d = 0; d < dim; ++d) {
      const float low = to_float(key[0][d]), high = to_float(key[1][d]);
      sum[0] += low * first[d];
      sum[1] += low * second[d];
      sum[2] += high * first[d];
      sum[3] += high * second[d];
    }
  }
};

// Calls fn with the product that fits: tensor cores if the dtype, the head dimension and the
// alignment of the keys (`key_bits`: address and strides in bytes, or'ed together) allow them.
template <class Fn>
cudaError_t with_product(DType dtype, int64_t dim, uint64_t key_bits, Fn fn) {
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      if (key_bits % 16 == 0) {
        switch (dim) {
          case 64: return fn(TensorCoreProduct<T, 64>{});
          case 96: return fn(TensorCoreProduct<T, 96>{});
          case 128: return fn(TensorCoreProduct<T, 128>{});
          case 256: return fn(TensorCoreProduct<T, 256>{});
        }
      }
    }
    return fn(PlainProduct<T>{});
  });
}

}  // namespace claa::cuda
